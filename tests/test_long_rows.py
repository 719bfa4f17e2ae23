"""Attention over long rows: in blocks it is what it is at once, and its memory grows with the row's length."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import sample

from evojax_merge.evaluation.costs import temporary_bytes
from evojax_merge.models import decoder
from evojax_merge.models.decoder import prefill_attention
from evojax_merge.models.layers import SequenceLayout, padded_layout

HEADS, GROUPS, DIM, ROWS, STEPS, PREFIX = 4, 2, 8, 2, 37, 21
WIDE = 10**6


def packed_layout() -> SequenceLayout:
    """A shared beginning of ten tokens, three segments of eight that follow it, and padding."""
    segments = np.array([0] * 10 + [1] * 8 + [2] * 8 + [3] * 8 + [-1] * 3)
    positions = np.concatenate([np.arange(10), *[10 + np.arange(8)] * 3, np.zeros(3)])
    return SequenceLayout(*(jnp.asarray(np.tile(row, (ROWS, 1)), jnp.int32) for row in (positions, segments)))


def image_layout() -> SequenceLayout:
    layout = padded_layout(STEPS, jnp.asarray([0, 3]), jnp.asarray([37, 30]))
    images = np.full((ROWS, STEPS), -1)
    images[0, 5:20], images[1, 8:18] = 0, 2
    return replace(layout, image_ids=jnp.asarray(images))


def after_prefix(layout: SequenceLayout) -> SequenceLayout:
    return replace(layout, positions=layout.positions + PREFIX)


PADDED = padded_layout(STEPS, jnp.asarray([0, 5]), jnp.asarray([30, 32]))
CASES: dict[str, tuple[SequenceLayout, int, bool, dict[str, float]]] = {
    "padded on both sides": (PADDED, WIDE, False, {}),
    "a sliding window": (PADDED, 7, False, {"scale": 0.3}),
    "a cap": (PADDED, WIDE, False, {"softcap": 2.0}),
    "segments that share a beginning": (packed_layout(), WIDE, False, {}),
    "segments behind a prefix, a window, a cap": (after_prefix(packed_layout()), 25, True, {"softcap": 5.0}),
    "images that attend to themselves": (image_layout(), 9, False, {}),
    "images behind a prefix": (after_prefix(image_layout()), WIDE, True, {}),
}


def attention(layout: SequenceLayout, window: int, has_prefix: bool, options: dict[str, float]) -> Any:
    """A function of the attention's arrays, which are random, with the arrays."""
    rng = np.random.default_rng(0)
    shapes = [
        (ROWS, STEPS, HEADS, DIM),
        *[(ROWS, STEPS, GROUPS, DIM)] * 2,
        (GROUPS, DIM, PREFIX),
        (GROUPS, PREFIX, DIM),
    ]
    arrays = [jnp.asarray(2 * rng.standard_normal(shape), jnp.float32) for shape in shapes]

    def attend(query: jax.Array, key: jax.Array, value: jax.Array, *prefix: jax.Array) -> jax.Array:
        before = (prefix[0], prefix[1]) if has_prefix else None
        return prefill_attention(jnp.int32(window), layout, before)(query, key, value, **options)[0]

    return attend, arrays


@pytest.mark.parametrize("case", sample(CASES, 2))
def test_blocks_give_what_the_whole_gives_and_its_gradient(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layout, *_ = CASES[case]
    attend, arrays = attention(*CASES[case])
    # Padding attends to what it likes.
    kept = (layout.segment_ids >= 0)[..., None]
    weights = jnp.asarray(np.random.default_rng(1).standard_normal((ROWS, STEPS, HEADS * DIM)), jnp.float32) * kept

    def both(*arrays: jax.Array) -> Any:
        def total(*arrays: jax.Array) -> tuple[jax.Array, jax.Array]:
            out = attend(*arrays)
            return (out * weights).sum(), out

        return jax.value_and_grad(total, argnums=range(len(arrays)), has_aux=True)(*arrays)

    (_, whole), whole_gradients = jax.jit(both)(*arrays)
    monkeypatch.setattr(decoder, "MAX_PAIRS", 0)
    monkeypatch.setattr(decoder, "LONG_QUERIES", 4)
    monkeypatch.setattr(decoder, "LONG_COLUMNS", 6)
    # Another function: a compiled program is kept by its function.
    (_, blocks), gradients = jax.jit(lambda *arrays: both(*arrays))(*arrays)
    assert np.isfinite(np.asarray(blocks)).all()
    np.testing.assert_allclose(np.where(kept, blocks, 0), np.where(kept, whole, 0), atol=2e-6)
    for blockwise, at_once in zip(gradients, whole_gradients, strict=True):
        np.testing.assert_allclose(blockwise, at_once, atol=2e-5)


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
