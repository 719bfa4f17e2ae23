"""Quantised tensors, packed number by number as their formats say, with the float64 values that the numbers mean.

A `Quantise` takes a weight `[out, in]`, of which most formats use the shape alone, and draws numbers and scales.
"""

import json
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

# Sizes of groups, of blocks of bitsandbytes, and of blocks of their nested scales.
GROUP, BLOCK, NESTED_BLOCK = 16, 64, 16
Tensors = dict[str, np.ndarray]
# Returns the stored tensors of a linear module, by the ends of their names, and its weight's values `[out, in]`.
Quantise = Callable[[np.ndarray, np.random.Generator], tuple[Tensors, np.ndarray]]
# NormalFloat's sixteen values (arXiv 2305.14314, appendix E).
NF4 = np.array(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634,
        0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ],
    np.float32,
)  # fmt: skip
# E2M1's magnitudes in the order of their codes (OCP Microscaling Formats 1.0). Codes from 8 on are their negatives.
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def words(numbers: np.ndarray, bits: int, order: list[int] | None = None) -> np.ndarray:
    """Pack integers `[rows, columns]`, 32 / bits to a word: int32 `[rows, columns * bits / 32]`.

    `order` says which integer of a word lies in the lowest bits, which in the next, and so on.
    """
    rows, per_word = [], 32 // bits
    for row in numbers.astype(int).tolist():
        row += [0] * (-len(row) % per_word)
        eights = [row[start : start + per_word] for start in range(0, len(row), per_word)]
        rows.append([sum(one[k] << bits * i for i, k in enumerate(order or range(per_word))) for one in eights])
    return np.array(rows, np.uint32).view(np.int32)


def grouped(
    weight: np.ndarray, rng: np.random.Generator, groups: np.ndarray, bits: int = 4
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Draw numbers `[in, out]`, zeros and scales `[groups, out]`; return them and the weight, `scale (number - zero)`.

    `groups`: int `[in]`, the group of each input.
    """
    outputs, inputs = weight.shape
    numbers = rng.integers(0, 2**bits, (inputs, outputs))
    zeros = rng.integers(0, 2**bits, (groups.max() + 1, outputs))
    scales = (0.02 + 0.02 * rng.random(zeros.shape)).astype(np.float16)
    values = [
        [(numbers[i, o] - zeros[g, o]) * float(scales[g, o]) for i, g in enumerate(groups)] for o in range(outputs)
    ]
    return numbers, zeros, scales, np.array(values)


def in_order(inputs: int) -> np.ndarray:
    """Return the group of each input, int `[in]`, where neighbours share one."""
    return np.arange(inputs) // GROUP


def gptq(bits: int = 4, version: int = 1, shuffled: bool = False, indexed: bool = True) -> Quantise:
    """GPTQ's files (arXiv 2210.17323), packed along inputs. Version 1 stores zeros less one; `shuffled` draws the order
    of the groups, as with act-order; `indexed` writes `g_idx`."""

    def quantise(weight: np.ndarray, rng: np.random.Generator) -> tuple[Tensors, np.ndarray]:
        groups = in_order(weight.shape[1])
        groups = rng.permutation(groups) if shuffled else groups
        numbers, zeros, scales, values = grouped(weight, rng, groups, bits)
        kept = (zeros - 1) % 2**bits if version == 1 else zeros
        parts = {"qweight": words(numbers.T, bits).T, "qzeros": words(kept, bits), "scales": scales}
        return parts | ({"g_idx": groups.astype(np.int32)} if indexed else {}), values

    return quantise


def awq(weight: np.ndarray, rng: np.random.Generator) -> tuple[Tensors, np.ndarray]:
    """AWQ's GEMM files (arXiv 2306.00978), packed along outputs in their interleaved order."""
    numbers, zeros, scales, values = grouped(weight, rng, in_order(weight.shape[1]))
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    return {"qweight": words(numbers, 4, order), "qzeros": words(zeros, 4, order), "scales": scales}, values


def eight_bits(weight: np.ndarray, rng: np.random.Generator) -> tuple[Tensors, np.ndarray]:
    """LLM.int8() of bitsandbytes (arXiv 2208.07339): a row's integers times its largest magnitude / 127."""
    numbers = rng.integers(-127, 128, weight.shape).astype(np.int8)
    largest = np.abs(weight).max(axis=1).astype(np.float32)
    parts = {"weight": numbers, "SCB": largest, "weight_format": np.array(0, np.uint8)}
    return parts, numbers * largest.astype(np.float64)[:, None] / 127


def four_bits(nested: bool, storage: Any = np.uint8) -> Quantise:
    """NF4 of bitsandbytes (arXiv 2305.14314), two codes to a byte, the first in the high bits. `nested` quantises the
    blocks' scales once more; `storage` is the dtype that the bytes are viewed in."""

    def quantise(weight: np.ndarray, rng: np.random.Generator) -> tuple[Tensors, np.ndarray]:
        blocks = weight.reshape(-1, BLOCK)
        largest = np.abs(blocks).max(axis=1).astype(np.float32)
        state: dict[str, Any] = {"quant_type": "nf4", "blocksize": BLOCK, "dtype": "float32", "shape": weight.shape}
        parts: Tensors = {"weight.quant_map": NF4, "weight.absmax": largest}
        if nested:
            codes = rng.integers(0, 256, len(largest))
            table = np.sort(rng.uniform(-1, 1, 256)).astype(np.float32)
            outer = rng.uniform(0.05, 0.1, -(-len(codes) // NESTED_BLOCK)).astype(np.float32)
            state |= {"nested_blocksize": NESTED_BLOCK, "nested_offset": 0.25, "nested_dtype": "float32"}
            parts |= {
                "weight.absmax": codes.astype(np.uint8), "weight.nested_quant_map": table,
                "weight.nested_absmax": outer,
            }  # fmt: skip
            whole = [float(table[code]) * float(outer[i // NESTED_BLOCK]) + 0.25 for i, code in enumerate(codes)]
            largest = np.array(whole)
        codes = np.abs(blocks[..., None] / largest[:, None, None] - NF4).argmin(axis=-1)
        flat = codes.reshape(-1)
        packed = (flat[0::2] * 16 + flat[1::2]).astype(np.uint8)
        parts["weight"] = packed.view(storage).reshape(-1, 1)
        parts["weight.quant_state.bitsandbytes__nf4"] = np.frombuffer(json.dumps(state).encode(), np.uint8)
        return parts, (NF4[codes].astype(np.float64) * largest[:, None]).reshape(weight.shape)

    return quantise


def packed(bits: int = 4, zeros: bool = False, shuffled: bool = False) -> Quantise:
    """compressed-tensors' `pack-quantized`: unsigned integers around the middle of their range, or around `zeros`."""

    def quantise(weight: np.ndarray, rng: np.random.Generator) -> tuple[Tensors, np.ndarray]:
        groups = in_order(weight.shape[1])
        groups = rng.permutation(groups) if shuffled else groups
        numbers, offsets, scales, values = grouped(weight, rng, groups, bits)
        parts = {
            "weight_packed": words(numbers.T, bits), "weight_scale": scales.T,
            "weight_shape": np.array(weight.shape, np.int64),
        }  # fmt: skip
        if zeros:
            parts["weight_zero_point"] = words(offsets, bits).T
        else:
            middle = [[2 ** (bits - 1) - offsets[g, o] for g in groups] for o in range(len(weight))]
            values = values - np.array(middle) * scales.astype(np.float64)[groups].T
        return parts | ({"weight_g_idx": groups.astype(np.int32)} if shuffled else {}), values

    return quantise


def rows(dtype: Any, axes: int = 2) -> Quantise:
    """Numbers of `dtype` with a scale for each row: scales `[out, 1]`, or `[out]` with one axis."""

    def quantise(weight: np.ndarray, rng: np.random.Generator) -> tuple[Tensors, np.ndarray]:
        numbers = rng.integers(-100, 100, weight.shape).astype(dtype)
        scales = rng.uniform(0.001, 0.002, (len(weight), 1)).astype(np.float32)
        kept = scales if axes == 2 else scales[:, 0]
        return {"weight": numbers, "weight_scale": kept}, numbers.astype(np.float64) * scales.astype(np.float64)

    return quantise


def blocks(weight: np.ndarray, rng: np.random.Generator) -> tuple[Tensors, np.ndarray]:
    """float8 with a scale for each block of 20 x 32; the last blocks are cut off."""
    numbers = rng.normal(0, 1, weight.shape).astype(ml_dtypes.float8_e4m3fn)
    scales = rng.uniform(0.1, 0.2, (-(-weight.shape[0] // 20), -(-weight.shape[1] // 32))).astype(np.float32)
    values = [
        [float(numbers[o, i]) * float(scales[o // 20, i // 32]) for i in range(weight.shape[1])]
        for o in range(weight.shape[0])
    ]
    return {"weight": numbers, "weight_scale": scales}, np.array(values)


def exponents(weight: np.ndarray, rng: np.random.Generator) -> tuple[Tensors, np.ndarray]:
    """MXFP8 (OCP Microscaling Formats 1.0): float8 with a power of two for each group, a biased exponent."""
    numbers = rng.normal(0, 1, weight.shape).astype(ml_dtypes.float8_e4m3fn)
    kept = rng.integers(120, 128, (len(weight), weight.shape[1] // GROUP)).astype(np.uint8)
    scales = 2.0 ** (kept.astype(np.float64) - 127)
    return {"weight": numbers, "weight_scale": kept}, numbers.astype(np.float64) * scales.repeat(GROUP, axis=1)


def one_scale(name: str = "weight_scale", shape: tuple[int, ...] = (1,), of_inputs: str = "input_scale") -> Quantise:
    """float8 with one scale for the whole matrix, beside a scale of activations that changes no weight."""

    def quantise(weight: np.ndarray, rng: np.random.Generator) -> tuple[Tensors, np.ndarray]:
        numbers = rng.normal(0, 1, weight.shape).astype(ml_dtypes.float8_e4m3fn)
        scale = np.full(shape, rng.uniform(0.1, 0.2), np.float32)
        parts = {"weight": numbers, name: scale, of_inputs: np.ones(shape, np.float32)}
        return parts, numbers.astype(np.float64) * float(scale.reshape(()))

    return quantise


def pairs(weight: np.ndarray, rng: np.random.Generator) -> tuple[Tensors, np.ndarray]:
    """Model Optimizer's AWQ: signed 4-bit integers, two outputs to a byte, with scales of groups and a factor of each
    input."""
    numbers, smooth = rng.integers(-8, 8, weight.shape), rng.uniform(0.5, 2, weight.shape[1]).astype(np.float32)
    scales = rng.uniform(0.01, 0.02, (len(weight), weight.shape[1] // GROUP)).astype(np.float32)
    values = [
        [one * float(scales[o, i // GROUP]) * float(smooth[i]) for i, one in enumerate(row)]
        for o, row in enumerate(numbers)
    ]
    kept = (numbers[0::2] % 16 + 16 * (numbers[1::2] % 16)).astype(np.uint8)
    return {"weight": kept, "weight_scale": scales, "pre_quant_scale": smooth}, np.array(values)


def mlx(bits: int) -> Quantise:
    """MLX's affine files, `scale number + bias`: a row's numbers are one bit string, lowest first, in 32-bit words."""

    def quantise(weight: np.ndarray, rng: np.random.Generator) -> tuple[Tensors, np.ndarray]:
        numbers, shape = rng.integers(0, 2**bits, weight.shape), (len(weight), weight.shape[1] // GROUP)
        rows = [sum(one << bits * i for i, one in enumerate(row)) for row in numbers.tolist()]
        nbytes = weight.shape[1] * bits // 8
        scales, biases = (rng.uniform(low, low + 0.02, shape).astype(np.float16) for low in (0.01, -0.1))
        values = numbers * scales.astype(float).repeat(GROUP, axis=1) + biases.astype(float).repeat(GROUP, axis=1)
        words = np.stack([np.frombuffer(row.to_bytes(nbytes, "little"), "<u4") for row in rows])
        return {"weight": words, "scales": scales, "biases": biases}, values

    return quantise


def four_bit_floats(
    shape: tuple[int, int], group: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw E2M1 codes of a weight `[out, in]`; return them two to a byte, the scales of groups, and the values.

    Groups of 16 have float8 scales (NVFP4); groups of 32 have powers of two, stored as biased exponents (MXFP4).
    """
    codes = rng.integers(0, 16, shape)
    packed = (codes[:, 0::2] + 16 * codes[:, 1::2]).astype(np.uint8)
    if group == 16:
        kept = rng.uniform(1, 400, (shape[0], shape[1] // group)).astype(ml_dtypes.float8_e4m3fn)
        scales = kept.astype(np.float64)
    else:
        kept = rng.integers(118, 128, (shape[0], shape[1] // group)).astype(np.uint8)
        scales = 2.0 ** (kept.astype(np.float64) - 127)
    values = [
        [(-1) ** (code // 8) * E2M1[code % 8] * scales[o, i // group] for i, code in enumerate(row)]
        for o, row in enumerate(codes)
    ]
    return packed, kept, np.array(values)
