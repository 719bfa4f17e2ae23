"""Attention over long rows: in blocks, and by the kernels of libraries, it is what it is at once, and its memory grows
with the row's length."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.sampling import sample

from evojax_merge.evaluation.liveness import temporary_bytes
from evojax_merge.models import attention as attention_module
from evojax_merge.models import fused_attention
from evojax_merge.models.attention import prefill_attention
from evojax_merge.models.fused_attention import cudnn_attention, fused_kernels, splash_attention
from evojax_merge.models.layers import RecordedWeights, SequenceLayout, dense_parts, padded_layout

HEADS, GROUPS, DIM, ROWS, STEPS, PREFIX = 4, 2, 8, 2, 37, 21
WIDE = 10**6


def packed_layout() -> SequenceLayout:
    """A shared beginning of ten tokens, three segments of eight that follow it, and padding."""
    segments = np.array([0] * 10 + [1] * 8 + [2] * 8 + [3] * 8 + [-1] * 3)
    positions = np.concatenate([np.arange(10), *[10 + np.arange(8)] * 3, np.zeros(3)])
    return SequenceLayout(*(jnp.asarray(np.tile(row, (ROWS, 1)), jnp.int32) for row in (positions, segments)))


def answer_layout() -> SequenceLayout:
    """A prompt, and an answer that is scored, as a segment of its own."""
    layout = padded_layout(STEPS, jnp.asarray([0, 0]), jnp.asarray([37, 30]))
    return replace(layout, segment_ids=jnp.where(layout.segment_ids < 0, -1, jnp.arange(STEPS) >= 25))


def image_layout() -> SequenceLayout:
    layout = padded_layout(STEPS, jnp.asarray([0, 3]), jnp.asarray([37, 30]))
    images = np.full((ROWS, STEPS), -1)
    images[0, 5:20], images[1, 8:18] = 0, 2
    return replace(layout, image_ids=jnp.asarray(images))


def after_prefix(layout: SequenceLayout) -> SequenceLayout:
    return replace(layout, positions=layout.positions + PREFIX)


PADDED = padded_layout(STEPS, jnp.asarray([0, 5]), jnp.asarray([30, 32]))
CASES: dict[str, tuple[SequenceLayout, int, bool, dict[str, Any]]] = {
    "padded on both sides": (PADDED, WIDE, False, {}),
    "a sliding window": (PADDED, 7, False, {"scale": 0.3}),
    "a cap": (PADDED, WIDE, False, {"softcap": 2.0}),
    "segments that share a beginning": (packed_layout(), WIDE, False, {}),
    "a prompt and an answer behind a prefix": (after_prefix(answer_layout()), WIDE, True, {}),
    "sinks behind a prefix, and a window": (after_prefix(packed_layout()), 9, True, {"has_sinks": True}),
    "segments behind a prefix, a window, a cap": (after_prefix(packed_layout()), 25, True, {"softcap": 5.0}),
    "images that attend to themselves": (image_layout(), 9, False, {}),
    "images behind a prefix": (after_prefix(image_layout()), WIDE, True, {}),
}


def attention(layout: SequenceLayout, window: int, has_prefix: bool, options: dict[str, Any]) -> Any:
    """A function of the attention's arrays, which are random, with the arrays."""
    rng = np.random.default_rng(0)
    shapes = [
        (ROWS, STEPS, HEADS, DIM),
        *[(ROWS, STEPS, GROUPS, DIM)] * 2,
        (GROUPS, DIM, PREFIX),
        (GROUPS, PREFIX, DIM),
        (HEADS,),
    ]
    options = dict(options)
    has_sinks = options.pop("has_sinks", False)
    arrays = [jnp.asarray(2 * rng.standard_normal(shape), jnp.float32) for shape in shapes]

    def attend(query: jax.Array, key: jax.Array, value: jax.Array, *prefix: jax.Array) -> jax.Array:
        before = (prefix[0], prefix[1]) if has_prefix else None
        sinks = prefix[2] if has_sinks else None
        return prefill_attention(jnp.int32(window), layout, before)(query, key, value, sinks=sinks, **options)[0]

    return attend, arrays


def values_and_gradients(case: str) -> Any:
    """A function of nothing: the output of a case's attention, and the gradient of a weighted sum of it."""
    layout, *_ = CASES[case]
    attend, arrays = attention(*CASES[case])
    # Padding attends to what it likes.
    kept = (layout.segment_ids >= 0)[..., None]
    weights = jnp.asarray(np.random.default_rng(1).standard_normal((ROWS, STEPS, HEADS * DIM)), jnp.float32) * kept

    def total(*arrays: jax.Array) -> tuple[jax.Array, jax.Array]:
        out = attend(*arrays)
        return (out * weights).sum(), jnp.where(kept, out, 0)

    def both() -> tuple[jax.Array, Any]:
        # Another function each time: a compiled program is kept by its function.
        (_, out), gradients = jax.jit(jax.value_and_grad(lambda *each: total(*each), range(6), has_aux=True))(*arrays)
        return out, gradients

    return both


def is_close(got: Any, whole: Any) -> None:
    assert np.isfinite(np.asarray(got[0])).all()
    np.testing.assert_allclose(got[0], whole[0], atol=1e-5)
    for gradient, at_once in zip(got[1], whole[1], strict=True):
        np.testing.assert_allclose(gradient, at_once, atol=5e-5)


@pytest.mark.parametrize("case", sample(CASES, 2))
def test_blocks_give_what_the_whole_gives_and_its_gradient(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    both = values_and_gradients(case)
    whole = both()
    monkeypatch.setattr(attention_module, "MAX_PAIRS", 0)
    monkeypatch.setattr(attention_module, "LONG_QUERIES", 4)
    monkeypatch.setattr(attention_module, "LONG_COLUMNS", 6)
    is_close(both(), whole)


FUSED = {
    "cudnn": ("padded on both sides", "a prompt and an answer behind a prefix", "segments that share a beginning"),
    "splash": ("padded on both sides", "a prompt and an answer behind a prefix", "a cap", "a sliding window"),
}


@pytest.mark.parametrize(("kernel", "case"), sample([(name, case) for name in FUSED for case in FUSED[name]], 3))
def test_kernels_of_libraries_give_what_the_whole_gives_and_its_gradient(
    kernel: str, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU: splash attention is interpreted, and the form of `jax.nn.dot_product_attention` for all platforms
    stands for cuDNN's."""
    both = values_and_gradients(case)
    whole = both()

    def kernels(dtype: Any, head_dim: int, scale: float | None, softcap: float | None) -> dict[str, Any]:
        scale = head_dim**-0.5 if scale is None else scale
        if kernel == "cudnn":
            return {"cpu": partial(cudnn_attention, scale=scale, implementation="xla")}
        return {"cpu": partial(splash_attention, scale=scale, softcap=softcap, interpret=True)}

    monkeypatch.setattr(attention_module, "MAX_PAIRS", 0)
    monkeypatch.setattr(attention_module, "fused_kernels", kernels)
    monkeypatch.setattr(fused_attention, "SPLASH_BLOCK", 128)
    is_close(both(), whole)


def test_a_kernel_takes_what_its_library_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_attention, "_has_cudnn", lambda: True)
    assert set(fused_kernels(jnp.bfloat16, 128, None, None)) == {"tpu", "cuda"}
    for dtype, head_dim, softcap in ((jnp.float32, 128, None), (jnp.bfloat16, 256, None), (jnp.bfloat16, 128, 30.0)):
        assert set(fused_kernels(dtype, head_dim, None, softcap)) == {"tpu"}


@pytest.mark.parametrize("follows_gradient", [False, True])
def test_memory_grows_with_the_length_of_a_row(follows_gradient: bool) -> None:
    """A layer's attention of a 7B model, at lengths that each double: no array has an entry for every pair of
    positions. The estimate is that of plans."""

    def needed(length: int) -> int:
        layout = padded_layout(length, jnp.zeros(1, jnp.int32), jnp.full(1, length))

        def attend(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
            return prefill_attention(jnp.int32(WIDE), layout)(query, key, value)[0]

        def total(*arrays: jax.Array) -> jax.Array:
            return attend(*arrays).sum()

        arrays = [jax.ShapeDtypeStruct((1, length, heads, 128), jnp.bfloat16) for heads in (32, 8, 8)]
        return temporary_bytes(jax.make_jaxpr(jax.grad(total) if follows_gradient else attend)(*arrays))

    sizes = [needed(length) for length in (8192, 16384, 32768)]
    assert sizes[1] < 2.1 * sizes[0] and sizes[2] < 2.1 * sizes[1], sizes
    # A matrix of a head's float32 products alone is 4.3 GB.
    assert sizes[2] < 4 * 32768**2


@pytest.mark.parametrize("has_bias", [True, False])
def test_a_joined_matrix_gives_its_parts(has_bias: bool) -> None:
    rng = np.random.default_rng(0)
    x, weight, bias = (rng.normal(size=shape).astype(np.float32) for shape in ((2, 5, 8), (12, 8), (12,)))
    weights = RecordedWeights({"in": jnp.asarray(weight)} | ({"in_bias": jnp.asarray(bias)} if has_bias else {}))
    expected = x @ weight.T + (bias if has_bias else 0)
    parts = dense_parts(jnp.asarray(x), weights, "in", 3)
    np.testing.assert_allclose(parts, np.split(expected, 3, axis=-1), atol=1e-5)
    np.testing.assert_array_equal(weights.inputs["in"], x)
