"""Writing in windows: what is guessed saves passes and changes nothing that is written."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.decoders import greedy_tokens
from helpers.models import random_model, save, tiny_config
from helpers.sampling import sample, thorough

from evojax_merge.checkpoints.bank import load_stored
from evojax_merge.checkpoints.parents import open_sources
from evojax_merge.models.config import DecoderConfig
from evojax_merge.models.decoder import scatter_columns, select_columns
from evojax_merge.models.generate import NONFINITE_ID, PAD_ID, decode, init_decode_state, prefill, prompt_lookup_draft
from evojax_merge.models.sources import StackedWeights

ROWS, WIDTH, NEW = 4, 9, 21


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[DecoderConfig, StackedWeights]:
    folder = tmp_path_factory.mktemp("model")
    save(random_model(tiny_config(), std=0.22), folder)
    sources, config = open_sources([folder])
    return config, load_stored(sources, config)


@pytest.fixture(scope="module")
def prompts() -> tuple[np.ndarray, np.ndarray]:
    return np.random.default_rng(0).integers(3, 64, (ROWS, WIDTH)).astype(np.int32), np.array([0, 4, 7, 2], np.int32)


@pytest.fixture(scope="module")
def plain(model: Any, prompts: Any) -> np.ndarray:
    return greedy_tokens(*model, *prompts, NEW, ())


def hints(kind: str, plain: np.ndarray) -> np.ndarray:
    rng = np.random.default_rng(1)
    if kind == "right":
        return plain
    if kind == "another row's":
        return np.roll(plain, 1, axis=0)
    if kind == "wrong from the middle on":
        return np.concatenate([plain[:, : NEW // 2], rng.integers(3, 64, (ROWS, NEW // 2))], axis=1)
    if kind == "none":
        return np.full((ROWS, NEW), PAD_ID)
    return rng.integers(-2, 64, (ROWS, 3 * NEW))


@pytest.mark.parametrize("kind", ["right", "another row's", "wrong from the middle on", "none", "random"])
@pytest.mark.parametrize("window", sample([2, 5, 8], 1))
def test_guesses_change_nothing(kind: str, window: int, model: Any, prompts: Any, plain: np.ndarray) -> None:
    found = greedy_tokens(*model, *prompts, NEW, (), window, hints(kind, plain))
    assert found.tolist() == plain.tolist()


@pytest.mark.parametrize("window", [1, 4])
def test_a_stop_token_inside_a_window_ends_the_text(window: int, model: Any, prompts: Any, plain: np.ndarray) -> None:
    stop = (int(plain[0, 6]), int(plain[2, 11]))
    found = greedy_tokens(*model, *prompts, NEW, stop, window, plain)
    for row, whole in zip(found, plain, strict=True):
        ends = np.flatnonzero(np.isin(whole, stop))
        end = ends[0] if ends.size else NEW
        assert row.tolist() == whole[:end].tolist() + [PAD_ID] * (NEW - end)


def written_in(model: Any, prompts: Any, passes: int, window: int, seen: np.ndarray) -> np.ndarray:
    """How many tokens each row has after so many passes."""
    config, stored = model
    tokens, first = (jnp.asarray(part) for part in prompts)

    @partial(jax.jit, static_argnums=2)
    def run(stored: Any, seen: jax.Array, passes: int) -> jax.Array:
        def alone(_: Any) -> Any:
            return stored

        decode_state = init_decode_state(config, "float32", 1, ROWS, WIDTH, NEW, window)
        decode_state = prefill(config, alone, jnp.zeros(1), decode_state, WIDTH, jnp.int32(0), tokens, first, ())
        state = decode(config, alone, jnp.zeros(1), decode_state, passes, window, scatter_columns, (), (tokens, seen))
        return state.num_generated[0]

    return np.asarray(run(stored, jnp.asarray(seen, jnp.int32), passes))


def test_right_guesses_save_passes(model: Any, prompts: Any, plain: np.ndarray) -> None:
    # The first token is written when the prompt is read; a pass adds five where it is foretold what they are.
    right = np.concatenate([prompts[0], plain], axis=1)
    assert written_in(model, prompts, 4, 5, right).tolist() == [NEW] * ROWS
    assert written_in(model, prompts, 3, 5, right).tolist() == [16] * ROWS
    assert written_in(model, prompts, 7, 1, plain[:, :0]).tolist() == [8] * ROWS
    # A row that is guessed wrongly does not hold up the others.
    mixed = right.copy()
    mixed[1] = PAD_ID
    made = written_in(model, prompts, 3, 5, mixed)
    assert made[[0, 2, 3]].tolist() == [16] * 3
    assert 4 <= made[1] < 16


def test_a_population_writes_in_windows_as_each_alone(model: Any, prompts: Any) -> None:
    config, stored = model
    tokens, first = (jnp.asarray(part) for part in prompts)
    scales = jnp.array([1.0, 0.7, 1.3])

    def scaled(factor: jax.Array) -> StackedWeights:
        return StackedWeights(jax.tree.map(lambda leaf: leaf * factor, stored.stacks), stored.shared)

    expected = [greedy_tokens(config, scaled(factor), *prompts, NEW, ()) for factor in scales]
    assert len({row.tobytes() for row in expected}) == 3
    for window, update in ((1, scatter_columns), (4, scatter_columns), (4, select_columns)):
        decode_state = init_decode_state(config, "float32", 3, ROWS, WIDTH, NEW, window)
        # In two parts of their own widths.
        for row, end, width in ((0, 2, WIDTH), (2, ROWS, WIDTH)):
            part = tokens[row:end, WIDTH - width :], first[row:end] - (WIDTH - width)
            decode_state = prefill(config, scaled, scales, decode_state, WIDTH, jnp.int32(row), *part, ())
        seen = jnp.asarray(expected[0])
        found = decode(config, scaled, scales, decode_state, NEW, window, update, (), (tokens, seen))
        assert np.asarray(found.tokens).tolist() == [rows.tolist() for rows in expected]


@thorough
def test_narrow_prompts_are_read_as_wide_ones(model: Any, prompts: Any, plain: np.ndarray) -> None:
    config, stored = model
    tokens, first = prompts

    def alone(_: Any) -> StackedWeights:
        return stored

    decode_state = init_decode_state(config, "float32", 1, ROWS, WIDTH, NEW, 3)
    for row in range(ROWS):
        own = tokens[row : row + 1, first[row] :]
        decode_state = prefill(
            config, alone, jnp.zeros(1), decode_state, WIDTH, jnp.int32(row), own, np.zeros(1, np.int32), ()
        )
    found = decode(config, alone, jnp.zeros(1), decode_state, NEW, 3, select_columns, (), (jnp.asarray(tokens), tokens))
    assert np.asarray(found.tokens)[0].tolist() == plain.tolist()


def test_numbers_that_are_not_finite_are_marked(model: Any, prompts: Any) -> None:
    config, stored = model
    broken = StackedWeights(
        stored.stacks, stored.shared | {"final_norm": jnp.full_like(stored.shared["final_norm"], jnp.nan)}
    )
    for window in (1, 3):
        assert (greedy_tokens(config, broken, *prompts, NEW, (), window, np.zeros((ROWS, 4))) == NONFINITE_ID).all()


def test_the_longest_likeness_is_followed_and_of_equals_the_latest() -> None:
    one = [7, 8, 9, 1, 5, 9, 2, 8, 9, 3, 4, 0, 8, 9, -1, -1]
    two = [1, 2, 3, 4, 5, 6, 1, 2, 3, 9, 9, 9, 1, 2, 3, -1]
    text = jnp.array([one, two])
    found = prompt_lookup_draft(text, jnp.array([13, 14]), 3)
    assert found.tolist() == [[9, 3, 4], [3, 9, 9]]
    # Nothing alike: a guess all the same, of the shape that is asked.
    assert prompt_lookup_draft(jnp.array([[1, 2, 3, 4]]), jnp.array([3]), 3).shape == (1, 3)
