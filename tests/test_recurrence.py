"""Recurrent layers against a loop over tokens in float64, whatever shares a row or a step of decoding."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.sampling import sample
from hypothesis import given, settings
from hypothesis import strategies as st

from evojax_merge.models.config import RecurrentShape
from evojax_merge.models.layers import SequenceLayout, padded_layout
from evojax_merge.models.recurrence import (
    DraftState,
    RecurrentState,
    RowRecurrence,
    StepRecurrence,
    empty_state,
    histories,
    unit_inverse,
)

SHAPE = RecurrentShape(channels=5, kernel=4, groups=2, repeats=3, key=4, value=6)
WIDTH = 90
CLOSE = {"rtol": 2e-4, "atol": 2e-5}


@dataclass
class Inputs:
    """Inputs of one row: T tokens."""

    x: np.ndarray
    query: np.ndarray
    key: np.ndarray
    value: np.ndarray
    decay: np.ndarray
    beta: np.ndarray
    kernel: np.ndarray
    bias: np.ndarray

    @property
    def scanned(self) -> tuple[np.ndarray, ...]:
        return self.query, self.key, self.value, self.decay, self.beta

    def rows(self, which: Any) -> "Inputs":
        arrays = {name: getattr(self, name)[which] for name in ("x", "query", "key", "value", "decay", "beta")}
        return Inputs(**arrays, kernel=self.kernel, bias=self.bias)


def draw(tokens: int, seed: int = 0) -> Inputs:
    rng = np.random.default_rng(seed)
    heads = (SHAPE.groups, SHAPE.repeats)

    def unit(*shape: int) -> np.ndarray:
        array = rng.normal(size=shape)
        return (array / np.linalg.norm(array, axis=-1, keepdims=True)).astype(np.float32)

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    return Inputs(
        normal(tokens, SHAPE.channels), unit(tokens, SHAPE.groups, SHAPE.key), unit(tokens, SHAPE.groups, SHAPE.key),
        normal(tokens, *heads, SHAPE.value), -rng.exponential(0.3, (tokens, *heads)).astype(np.float32),
        rng.random((tokens, *heads)).astype(np.float32), normal(SHAPE.channels, SHAPE.kernel), normal(SHAPE.channels),
    )  # fmt: skip


@dataclass
class Looped:
    """The state of a loop over tokens, float64. before: the inputs of the convolution at the last tokens."""

    before: list[np.ndarray]
    heads: np.ndarray

    @classmethod
    def empty(cls) -> "Looped":
        zeros = np.zeros((SHAPE.groups, SHAPE.repeats, SHAPE.key, SHAPE.value))
        return cls([np.zeros(SHAPE.channels)] * (SHAPE.kernel - 1), zeros)

    def run(self, inputs: Inputs, is_delta: bool) -> tuple[np.ndarray, np.ndarray, "Looped"]:
        """The convolution's outputs and o of each token, and the state behind the last one."""
        window, heads, mixed, read = list(self.before), self.heads.copy(), [], []
        for t in range(len(inputs.x)):
            window = [*window, inputs.x[t].astype(np.float64)]
            taps = window[-SHAPE.kernel :]
            mixed.append(sum(inputs.kernel[:, i] * taps[i] for i in range(SHAPE.kernel)) + inputs.bias)
            query, key, value, decay, beta = (array[t].astype(np.float64) for array in inputs.scanned)
            heads = np.exp(decay)[..., None, None] * heads
            if is_delta:
                value = beta[..., None] * (value - np.einsum("grkv,gk->grv", heads, key))
            heads = heads + np.einsum("gk,grv->grkv", key, value)
            read.append(np.einsum("grkv,gk->grv", heads, query))
        return np.array(mixed), np.array(read), Looped(window[-(SHAPE.kernel - 1) :], heads)


def run_rows(inputs: Inputs, layout: SequenceLayout, is_delta: bool, before: RecurrentState | None = None) -> Any:
    """The outputs of one row with a layout, and the state that is kept."""
    scanned = inputs.scanned if is_delta else inputs.scanned[:4]
    state = before or empty_state(SHAPE, 1, "float32")
    mixed, read, kept = run_row(layout, state, inputs.x[None], inputs.kernel, inputs.bias, [x[None] for x in scanned])
    return mixed[0], read[0], kept


@jax.jit
def run_row(layout: SequenceLayout, state: RecurrentState, x: Any, kernel: Any, bias: Any, scanned: Any) -> Any:
    recur = RowRecurrence(layout, histories(layout, SHAPE.kernel), state)
    mixed, columns = recur.convolve(x, kernel, bias)
    read, heads = recur.scan(*scanned)
    return mixed, read, recur.keep(columns, heads)


def assert_state(kept: RecurrentState, looped: Looped) -> None:
    np.testing.assert_allclose(kept.columns[0], np.array(looped.before), **CLOSE)
    np.testing.assert_allclose(kept.heads[0], looped.heads, **CLOSE)


def one_sequence(tokens: int) -> SequenceLayout:
    return padded_layout(tokens, jnp.zeros(1, jnp.int32), jnp.full(1, tokens, jnp.int32))


@pytest.mark.parametrize("is_delta", [True, False])
@pytest.mark.parametrize("tokens", sample([1, 63, 2, 64, 200, 65], 3))
def test_chunks_are_a_loop_over_tokens(tokens: int, is_delta: bool) -> None:
    inputs = draw(tokens)
    mixed, read, kept = run_rows(inputs, one_sequence(tokens), is_delta)
    expected_mixed, expected_read, looped = Looped.empty().run(inputs, is_delta)
    np.testing.assert_allclose(mixed, expected_mixed, **CLOSE)
    np.testing.assert_allclose(read, expected_read, **CLOSE)
    assert_state(kept, looped)


@pytest.mark.parametrize("size", sample([1, 2, 5, 63, 64], 2))
def test_the_inverse_of_a_unit_triangle_and_its_derivative(size: int) -> None:
    # Keys that are all alike: the worst that a delta rule can have.
    strictly = np.tril(np.stack([np.ones((size, size)), np.random.default_rng(0).normal(size=(size, size))]), -1) * 0.9
    expected = np.linalg.inv(np.eye(size) + strictly)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(unit_inverse(jnp.asarray(strictly, jnp.float32)) / scale, expected / scale, atol=1e-5)
    change = np.tril(np.random.default_rng(1).normal(size=strictly.shape), -1)
    with jax.enable_x64(True):
        _, tangent = jax.jvp(unit_inverse, (jnp.asarray(strictly),), (jnp.asarray(change),))
    np.testing.assert_allclose(tangent, -expected @ change @ expected, rtol=1e-9, atol=1e-9 * scale**2)


@pytest.mark.parametrize("is_delta", [True, False])
@settings(max_examples=25, deadline=None)
@given(left=st.integers(0, 70), tokens=st.integers(1, 80), seed=st.integers(0, 9))
def test_pads_change_no_state(is_delta: bool, left: int, tokens: int, seed: int) -> None:
    # One width, and so one program.
    inputs, tokens = draw(WIDTH, seed), min(tokens, WIDTH - left)
    layout = padded_layout(WIDTH, jnp.full(1, left, jnp.int32), jnp.full(1, tokens, jnp.int32))
    mixed, read, kept = run_rows(inputs, layout, is_delta)
    inside = slice(left, left + tokens)
    expected_mixed, expected_read, looped = Looped.empty().run(inputs.rows(inside), is_delta)
    np.testing.assert_allclose(mixed[inside], expected_mixed, **CLOSE)
    np.testing.assert_allclose(read[inside], expected_read, **CLOSE)
    assert_state(kept, looped)


@pytest.mark.parametrize("is_delta", [True, False])
@pytest.mark.parametrize("has_prefix", [True, False])
@settings(max_examples=25, deadline=None)
@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=5), shared=st.integers(0, 70))
def test_each_segment_follows_what_all_share(is_delta: bool, has_prefix: bool, sizes: list[int], shared: int) -> None:
    """The segments of a row begin anew behind the row's shared tokens, and these behind the prefix of all rows."""
    segments = np.concatenate([np.zeros(shared, int), *(np.full(n, i + 1) for i, n in enumerate(sizes))])
    segments = np.concatenate([segments, np.full(WIDTH, -1)]).astype(np.int32)[:WIDTH]
    inputs, ahead = draw(WIDTH, 1), draw(5, 2)
    state, looped = None, Looped.empty()
    if has_prefix:
        *_, state = run_rows(ahead, one_sequence(5), is_delta)
        *_, looped = looped.run(ahead, is_delta)
    layout = SequenceLayout(jnp.zeros((1, len(segments)), jnp.int32), jnp.asarray(segments)[None])
    mixed, read, _ = run_rows(inputs, layout, is_delta, state)
    for number in range(1, segments.max() + 1):
        places = np.flatnonzero((segments == 0) | (segments == number))
        expected_mixed, expected_read, _ = looped.run(inputs.rows(places), is_delta)
        np.testing.assert_allclose(np.asarray(mixed)[places], expected_mixed, **CLOSE)
        np.testing.assert_allclose(np.asarray(read)[places], expected_read, **CLOSE)


@pytest.mark.parametrize("is_delta", [True, False])
@pytest.mark.parametrize("accepted", [0, 1, 3, 4])
def test_a_rejected_draft_leaves_the_state_as_if_it_had_not_been(accepted: int, is_delta: bool) -> None:
    prompt, step = draw(9, 3), draw(4, 4)
    *_, before = run_rows(prompt, one_sequence(9), is_delta)
    recur = StepRecurrence(before)
    one = jax.tree.map(lambda array: jnp.asarray(array)[None], step.scanned if is_delta else step.scanned[:4])
    mixed, columns = recur.convolve(jnp.asarray(step.x)[None], jnp.asarray(step.kernel), jnp.asarray(step.bias))
    read, updates = recur.scan(*one)
    draft = recur.keep(columns, updates)
    assert isinstance(draft, DraftState)
    *_, looped = Looped.empty().run(prompt, is_delta)
    expected_mixed, expected_read, _ = looped.run(step, is_delta)
    np.testing.assert_allclose(mixed[0], expected_mixed, **CLOSE)
    np.testing.assert_allclose(read[0], expected_read, **CLOSE)
    *_, behind = looped.run(step.rows(slice(accepted)), is_delta) if accepted else (looped,)
    kept = draft.accept(jnp.array([accepted], jnp.int32))
    assert_state(kept, behind)
    if not accepted:
        np.testing.assert_array_equal(kept.heads, before.heads)
        np.testing.assert_array_equal(kept.columns, before.columns)


def test_a_layer_with_a_convolution_alone_keeps_columns_alone() -> None:
    shape = RecurrentShape(channels=5, kernel=3)
    state = empty_state(shape, 2, "bfloat16")
    assert state.heads is None and state.columns.shape == (2, 2, 5) and state.columns.dtype == jnp.bfloat16
    step = StepRecurrence(state)
    mixed, columns = step.convolve(jnp.ones((2, 3, 5), jnp.float32), jnp.ones((5, 3)))
    np.testing.assert_array_equal(mixed[0, :, 0], [1, 2, 3])
    kept = step.keep(columns).accept(jnp.array([1, 3], jnp.int32))
    np.testing.assert_array_equal(kept.columns[:, :, 0].astype(jnp.float32), [[0, 1], [1, 1]])


def test_derivatives_are_those_of_the_loop() -> None:
    """The derivatives of a sum over outputs with respect to every input, by differences of the loop in float64."""
    inputs = draw(70, 5)
    layout = one_sequence(70)

    def total(scanned: tuple[jax.Array, ...]) -> jax.Array:
        recur = RowRecurrence(layout, histories(layout, SHAPE.kernel), empty_state(SHAPE, 1, "float32"))
        return jnp.sum(jnp.sin(recur.scan(*scanned)[0]))

    one = tuple(jnp.asarray(array)[None] for array in inputs.scanned)
    gradients = jax.grad(total)(one)
    rng, step = np.random.default_rng(0), 1e-5
    for number, gradient in enumerate(gradients):
        direction = rng.normal(size=gradient.shape[1:])

        def moved(by: float, number: int = number, direction: np.ndarray = direction) -> float:
            scanned = [array.astype(np.float64) for array in inputs.scanned]
            scanned[number] = scanned[number] + by * direction
            varied = Inputs(inputs.x, *scanned, kernel=inputs.kernel, bias=inputs.bias)  # type: ignore[arg-type]
            return float(np.sin(Looped.empty().run(varied, True)[1]).sum())

        expected = (moved(step) - moved(-step)) / (2 * step)
        np.testing.assert_allclose(np.vdot(gradient[0], direction), expected, rtol=1e-3, atol=1e-3)
