"""Checks a folder's tensors against its own config.json: a folder that contradicts itself cannot be loaded.

A known architecture gives every tensor's shape. In other architectures the usual keys of configs and the usual names of
tensors give some shapes. A config with further keys of a kind (`moe_intermediate_size`) is not judged by that kind:
such a model has several sizes of it.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from evojax_merge.checkpoints.config_file import check_values
from evojax_merge.checkpoints.decoder_folder import DecoderFolder
from evojax_merge.checkpoints.folder import Tensor, is_float
from evojax_merge.checkpoints.hints import WRAPPERS, wrapper_hint
from evojax_merge.checkpoints.parents import EMBEDDINGS, find_token_tensors, tensor_shapes
from evojax_merge.errors import InputError
from evojax_merge.models.architecture import HEAD, find_architecture
from evojax_merge.models.config import DecoderConfig

# The name of a layer's tensor, by the outermost list of layers.
LAYER = re.compile(r"^(?P<stack>(?:.*?\.)?(?:layers|layer|h|blocks|block)\.)(?P<index>[0-9]{1,9})\.(?P<tail>.+)$")
# The matrices of attention and of gated MLPs, and the names of their rows and columns in `_layer_sizes`.
MATRIX = re.compile(
    r"(?:self_attn|self_attention|attention|attn)\.(?:self\.|attention\.)?"
    r"(?P<attention>[qkvo]_proj|query|key|value|out_proj)\.weight"
    r"|(?:mlp\.)?(?P<mlp>gate_proj|up_proj|down_proj)\.weight"
)
MATRICES = {
    **dict.fromkeys(("q_proj", "query"), ("queries", "hidden")),
    **dict.fromkeys(("k_proj", "v_proj", "key", "value"), ("keys", "hidden")),
    **dict.fromkeys(("o_proj", "out_proj"), ("hidden", "queries")),
    **dict.fromkeys(("gate_proj", "up_proj"), ("mlp", "hidden")), "down_proj": ("hidden", "mlp"),
}  # fmt: skip
HEADS, KV_HEADS = "num_attention_heads", "num_key_value_heads"
# The first matrix of an MLP of two, which some architectures keep transposed, and some widen for a gate.
TWO_MATRICES = re.compile(r"(?:mlp\.)?(?:c_fc|fc1|fc_in|dense_h_to_4h)\.weight|intermediate\.dense\.weight")
# The names under which larger models keep their text decoder.
TEXT = re.compile(r"(?:^|\.)(?:language_model|text_model)\.")
# Classes whose models have a head.
WITH_HEAD = ("ForCausalLM", "LMHeadModel")
# Keys that mean that layers differ, and that there are layers which `num_hidden_layers` does not count.
LAYERS_DIFFER, MORE_LAYERS = re.compile(r"per_layer|layer_config|block_config"), re.compile(r"nextn|mtp")

Size = tuple[int | None, ...]


def depth_error(folder: DecoderFolder, depth: object, layers: int) -> InputError:
    """The error of a config with another number of layers than the tensors have."""
    hint = wrapper_hint({WRAPPERS.sub("", name) for name in folder.entries if WRAPPERS.match(name)}, folder.entries)
    return InputError(folder.where, f"num_hidden_layers: {depth}, but its tensors are of {layers}{hint}")


def check_against_config(folder: DecoderFolder, is_checked: Callable[[str], bool] = lambda name: True) -> None:
    """Raises InputError where the folder's config.json implies a tensor that it lacks, or another shape than a tensor
    has. is_checked: whether a tensor of that name is compared. A folder without a config is not checked."""
    if not folder.whole.config:
        return
    architecture, shapes, fault = folder.architecture, None, None

    def config_in_file() -> DecoderConfig:
        """The config by the keys that the file has, which may lack some: raises KeyError. RoPE changes no shape, and
        has many spellings: it is left out."""
        check_values(folder.where, folder.config)
        assert architecture is not None
        values = {key: value for key, value in folder.config.items() if key in architecture.keys}
        return architecture.read_config(values | {"rope_parameters": {"rope_theta": 10_000.0}})

    # transformers' class, whose import takes seconds, is only asked where the file by itself does not agree.
    readings = () if architecture is None else (config_in_file, folder.decoder_config)
    for read in readings:
        try:
            config = read()
            shapes = tensor_shapes(config)
        except (InputError, KeyError, TypeError, ValueError):
            # It cannot be read, or no forward pass of this program supports it: a merge does not run the model.
            shapes = None
            continue
        head, classes = find_architecture(config.architecture).leaf(HEAD), folder.whole.config.get("architectures")
        if head is not None and not (
            isinstance(classes, list) and any(str(class_name).endswith(WITH_HEAD) for class_name in classes)
        ):
            # A model that was saved without its head has no such tensor.
            shapes.pop(head.tensor, None)
        fault = _fault(folder, shapes, is_checked)
        if fault is None:
            return
    if shapes is None:
        fault = _fault(folder, dict(_usual_shapes(folder)), is_checked)
    if fault is not None:
        raise fault


def _fault(
    folder: DecoderFolder, shapes: Mapping[str, Size], is_checked: Callable[[str], bool]
) -> InputError | None:  # fmt: skip
    """The first tensor that is missing or has another shape; None: each of them is as `shapes` says."""
    for name, expected in shapes.items():
        if not is_checked(name):
            continue
        tensor, in_file = folder.entries.get(name), folder.names.in_file(name)
        if tensor is None:
            hint = wrapper_hint([in_file], map(folder.names.in_file, folder.entries))
            return InputError(folder.path, f"has no tensor {in_file}, which its config.json asks for{hint}")
        if not is_float(tensor.dtype):
            expected_dtype = "expected float weights (a quantised model?)"
            return InputError(tensor.file, f"{in_file} holds {tensor.dtype}; {expected_dtype}")
        fits = len(tensor.shape) == len(expected) and all(
            size in (None, actual) for size, actual in zip(expected, tensor.shape, strict=True)
        )
        if not fits:
            sizes = ", ".join("…" if size is None else str(size) for size in expected)
            return InputError(folder.path, f"{in_file} has shape {list(tensor.shape)}; its config.json says [{sizes}]")
    return None


# ---------------------------------------------------------------------------------------------------------------
# Architectures that are not known


def _size(config: Mapping[str, Any], key: str, kind: str, alike: tuple[str, ...] = ()) -> int | None:
    """The value of a key; None where it is no size, or where keys other than `alike` describe the same `kind`."""
    value = config.get(key)
    is_size = isinstance(value, int) and not isinstance(value, bool) and value > 0
    return value if is_size and all(other in (key, *alike) for other in config if kind in other) else None


def _layer_sizes(config: Mapping[str, Any]) -> dict[str, int | None]:
    """The sizes of a layer's matrices, by their names in `MATRICES`; None: unknown."""
    hidden, alike = _size(config, "hidden_size", "hidden_size"), (HEADS, KV_HEADS, "head_dim")
    heads = _size(config, HEADS, "head", alike)
    kv_heads = heads if config.get(KV_HEADS) is None else _size(config, KV_HEADS, "head", alike)
    dim = _size(config, "head_dim", "head", alike)
    if heads and hidden and config.get("head_dim") is None:
        dim = hidden // heads
    return {
        "hidden": hidden, "mlp": _size(config, "intermediate_size", "intermediate"),
        "queries": heads and dim and heads * dim, "keys": kv_heads and dim and kv_heads * dim,
    }  # fmt: skip


def _usual_shapes(folder: DecoderFolder) -> Iterator[tuple[str, Size]]:
    """Tensors of a folder's only stack of layers, or of its text decoder's, with the shapes that the usual keys imply;
    None in a shape: any size. Raises InputError where config.json says another number of layers than the tensors.
    Yields nothing for several stacks, layers that differ, and a config without a vocabulary."""
    stacks: dict[str, dict[int, dict[str, Tensor]]] = {}
    for name, tensor in folder.entries.items():
        match = LAYER.match(name)
        if match is not None:
            stacks.setdefault(match["stack"], {}).setdefault(int(match["index"]), {})[match["tail"]] = tensor
    config: Any = folder.config
    if any(isinstance(value, dict) and "hidden_size" in value for value in config.values()):
        config = config.get("text_config")
        stacks = {stack: layers for stack, layers in stacks.items() if TEXT.search(stack)}
    # Encoders of images and sounds give these keys other meanings.
    if not isinstance(config, dict) or "vocab_size" not in config or any(map(LAYERS_DIFFER.search, config)):
        return
    if len(stacks) != 1:
        return
    (stack, layers), *_ = stacks.items()
    sizes, depth = _layer_sizes(config), _size(config, "num_hidden_layers", "num_hidden_layers")
    hidden, mlp, queries = sizes["hidden"], sizes["mlp"], sizes["queries"]
    # A model without a hidden size may count other layers; one that runs its layers several times counts each time.
    is_other = depth is not None and depth % len(layers) > 0 and hidden is not None
    if is_other and ((depth or 0) > len(layers) or not any(map(MORE_LAYERS.search, config))):
        raise depth_error(folder, depth, len(layers))
    name = find_token_tensors(folder).embedding
    embedding, is_part = folder.entries.get(name), TEXT.search(stack) is not None
    is_named = name.removesuffix(".weight").rpartition(".")[2] in EMBEDDINGS
    if embedding is not None and len(embedding.shape) == 2 and is_named and not (is_part and not TEXT.search(name)):
        rows = _size(config, "vocab_size", "vocab", ("type_vocab_size",))
        # Larger models may have rows for images besides, and some architectures project another width to the hidden
        # size.
        rows = None if is_part and rows is not None and embedding.shape[0] > rows else rows
        widths = [value for key, value in config.items() if "emb" in key or key == "hidden_size"]
        yield name, (rows, None if embedding.shape[1] in widths else hidden)
    for index, tensors in layers.items():
        for tail, tensor in tensors.items():
            match, shape = MATRIX.fullmatch(tail), None
            if len(tensor.shape) == 2 and match is not None:
                rows_of, columns_of = MATRICES[match["attention"] or match["mlp"]]
                # A gate of the attention's output is kept beside the queries.
                widened = match["attention"] == "q_proj" and queries is not None and tensor.shape[0] == 2 * queries
                shape = (None if widened else sizes[rows_of], sizes[columns_of])
            elif len(tensor.shape) == 2 and TWO_MATRICES.fullmatch(tail) and hidden and mlp:
                fitting = ((mlp, hidden), (2 * mlp, hidden), (hidden, mlp))
                shape = fitting[0] if tensor.shape not in fitting else None
            if shape is not None:
                yield f"{stack}{index}.{tail}", shape
