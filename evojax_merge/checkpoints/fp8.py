"""FP8 checkpoints, dequantised as they are read: a weight `w float8_e4m3[out, in]` with scales in a second tensor, one
value for each block of n x m weights. The weight is `w · scale`.

A block may be all of the matrix (`weight_scale`, one value; transformers and Mistral call it `weight_scale_inv`), the
weights of an output (`weight_scale [out, 1]`, as FBGEMM's), or what `weight_block_size` says
(`weight_scale_inv [out / n, in / m]`, as DeepSeek-V3 was published; DeepSeek-AI 2024, arXiv:2412.19437, section 3.3.2).
"""

from evojax_merge.checkpoints.quantised import EXPONENT, FLOATS, FP8, QuantisedFolder, check_matrix, scaled
from evojax_merge.errors import InputError

SCALES = ("_scale_inv", "_scale")


def dequantise_fp8(folder: QuantisedFolder) -> None:
    """Exchange the matrices of an FP8 folder. Raises InputError for an invalid block, and for a weight without the
    scales that its shape needs."""
    size = folder.settings.get("weight_block_size")
    exchange_scaled(folder, None if size is None else folder.block_size("weight_block_size", size, ", or null"))


def exchange_scaled(folder: QuantisedFolder, block: tuple[int, int] | None) -> None:
    """Exchange a folder's matrices of FP8. block: the rows and columns that share a scale; None: one scale for a matrix
    or for each output, which the shape of each matrix's scales tells apart. Raises InputError where the parts of a
    matrix do not fit each other."""
    entries = folder.entries
    for name in [name for name, tensor in entries.items() if tensor.dtype == FP8 and not name.endswith(SCALES)]:
        weight = entries[name]
        scale_name = next((f"{name}{end}" for end in SCALES if f"{name}{end}" in entries), "")
        scale = entries.get(scale_name)
        check_matrix(name, weight, FP8)
        rows, columns = weight.shape
        if block is not None:
            grid = tuple(-(-size // step) for size, step in zip(weight.shape, block, strict=True))
            shapes, words = {grid: block}, f"the scales of its blocks, {list(grid)}"
        else:
            of_outputs, of_all = (1, columns), (rows, columns)
            shapes = {(rows,): of_outputs, (rows, 1): of_outputs, (): of_all, (1,): of_all, (1, 1): of_all}
            words = f"one scale, or one for each output, {[rows, 1]}"
        if scale is None or scale.shape not in shapes:
            actual = "no such tensor" if scale is None else str(list(scale.shape))
            end = SCALES[0] if block is not None else SCALES[1]
            raise InputError(
                weight.file, f"{name} is quantised (F8_E4M3): found {actual} for {name}{end}; expected {words}"
            )
        scales = folder.part(weight, scale_name, (*FLOATS, EXPONENT), *shapes)
        folder.exchange(name, weight.shape, (weight, scales), scaled, weight.shape, shapes[scales.shape])
    folder.check_dequantised("weight_scale")
