"""The uniform numbers of random methods: the same everywhere, of any rows, and as good as random."""

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from merge_kernels import METHODS, device_uniform, draw_row_keys, host_uniform, keys_from_column, merge_tensor

SEED = 11
ONE, TWO = b"one's q_proj", b"two's q_proj"
ROWS, COLUMNS = 512, 4096
# Standard deviations that a statistic of a fixed sample may be away from its mean.
SIGMAS = 4.5


def numbers_of(seed: int = SEED, digest: bytes = ONE, shape: tuple[int, ...] = (ROWS, COLUMNS)) -> np.ndarray:
    return host_uniform(draw_row_keys(seed, digest, shape), shape)


def test_numbers_are_what_they_were() -> None:
    """A search that is continued, and a recipe that is merged again, rely on it."""
    keys = [[4143520238, 2261220336], [2069103020, 3817018997]]
    np.testing.assert_array_equal(draw_row_keys(SEED, ONE, (2, 5)), keys)
    numbers = [[60325, 28622, 2510, 16265, 35616], [13052, 53419, 23039, 16961, 57440]]
    np.testing.assert_array_equal(numbers_of(shape=(2, 5)), numbers)


@pytest.mark.parametrize("shape", [(), (7,), (1, 1), (5, 9), (70, 1100), (4, 3, 5)], ids=str)
def test_host_and_device_give_the_same_bits(shape: tuple[int, ...]) -> None:
    keys = draw_row_keys(SEED, ONE, shape)
    assert keys.shape == (*shape[:1], 2)
    expected = host_uniform(keys, shape)
    assert expected.dtype == np.uint16
    assert expected.shape == shape
    found = jax.jit(lambda keys: device_uniform(keys, shape))(keys)
    np.testing.assert_array_equal(np.asarray(found), expected)
    # A column of many axes counts as it lies in the file.
    np.testing.assert_array_equal(host_uniform(keys, (*shape[:1], int(np.prod(shape[1:])))).reshape(shape), expected)


def test_rows_have_their_numbers_wherever_they_are() -> None:
    keys, whole = draw_row_keys(SEED, ONE, (40, 33)), numbers_of(shape=(40, 33))
    for rows in (np.arange(7, 19), np.array([[3, 39, 3], [0, 12, 5]])):
        found = device_uniform(jnp.asarray(keys[rows]), (*rows.shape, 33))
        np.testing.assert_array_equal(np.asarray(found), whole[rows])
    # One row alone, as where rows are mapped over.
    found = jax.vmap(lambda own: device_uniform(own, (33,)))(jnp.asarray(keys))
    np.testing.assert_array_equal(np.asarray(found), whole)
    # Some columns of all rows.
    found = device_uniform(keys_from_column(jnp.asarray(keys), jnp.int32(11)), (40, 22))
    np.testing.assert_array_equal(np.asarray(found), whole[:, 11:])
    # Of a larger tensor's keys the first ones are a smaller one's.
    np.testing.assert_array_equal(draw_row_keys(SEED, ONE, (50, 33))[:40], keys)


@pytest.mark.parametrize("shape", [(300, 1000), (3, 300_000), (300_001,), (11, 8, 9, 10)], ids=str)
def test_tensors_that_are_merged_in_pieces_have_the_numbers_of_the_whole(shape: tuple[int, ...]) -> None:
    method, keys = METHODS["dare_linear"], draw_row_keys(SEED, ONE, shape)
    numbers: dict[str, Any] = {"weight": np.ones(1), "density": np.array([0.3]), "lambda": np.array(1.0)}
    sources = [np.zeros(shape, np.float32), np.ones(shape, np.float32)]
    merged = merge_tensor(method, method.options, sources, numbers, lambda k: keys, np.dtype(np.float32))
    np.testing.assert_array_equal(merged != 0, host_uniform(keys, shape) < round(0.3 * 2**16))


# ---------------------------------------------------------------------------------------------------------------
# As good as random


def chi_square(counts: np.ndarray) -> float:
    """How many standard deviations the statistic of counts that should be equal is above its mean."""
    expected = counts.sum() / counts.size
    freedom = counts.size - 1
    return float((((counts - expected) ** 2).sum() / expected - freedom) / np.sqrt(2 * freedom))


def dependence(one: np.ndarray, other: np.ndarray) -> float:
    """The same for pairs of numbers, by their upper four bits each."""
    pairs = (one.astype(np.int64) >> 12) * 16 + (other.astype(np.int64) >> 12)
    return chi_square(np.bincount(pairs.ravel(), minlength=256))


def test_numbers_are_uniform() -> None:
    numbers = numbers_of()
    for shift in (0, 8, 12):
        assert abs(chi_square(np.bincount(numbers.ravel() >> shift, minlength=2**16 >> shift))) < SIGMAS
    # The lower byte alone.
    assert abs(chi_square(np.bincount(numbers.ravel() & 255, minlength=256))) < SIGMAS
    # Rows and columns, each for itself.
    by_row = [chi_square(np.bincount(row >> 11, minlength=32)) for row in numbers]
    by_column = [chi_square(np.bincount(column >> 12, minlength=16)) for column in numbers.T]
    for found in (by_row, by_column):
        assert abs(np.mean(found)) < SIGMAS / np.sqrt(len(found))
        assert abs(np.std(found) - 1) < 0.2
        # The tail of a chi-square of few degrees of freedom is longer than a normal one's.
        assert max(found) < 7


@pytest.mark.parametrize("density", [0.02, 0.3, 0.5, 0.9])
def test_rows_and_columns_keep_as_many_as_of_independent_entries(density: float) -> None:
    mask = numbers_of() < round(density * 2**16)
    for axis in (0, 1):
        counts = mask.sum(axis=axis)
        expected = mask.shape[axis] * density * (1 - density)
        assert abs(counts.var() / expected - 1) < SIGMAS * np.sqrt(2 / counts.size) + 0.01


PAIRS: dict[str, Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]] = {
    **{f"columns {lag} apart": lambda x, lag=lag: (x[:, lag:], x[:, :-lag]) for lag in (1, 2, 3, 7, 64, 256, 1024)},
    **{f"columns {bit} flipped": lambda x, bit=bit: (x, x[:, np.arange(COLUMNS) ^ bit]) for bit in (1, 16, 256, 2048)},
    **{f"rows {lag} apart": lambda x, lag=lag: (x[lag:], x[:-lag]) for lag in (1, 2, 16, 128)},
    "a diagonal": lambda x: (x[1:, 1:], x[:-1, :-1]),
    "another parent or tensor": lambda x: (x, numbers_of(digest=TWO)),
    "a digest of another bit": lambda x: (x, numbers_of(digest=bytes([ONE[0] ^ 1]) + ONE[1:])),
    "another seed": lambda x: (x, numbers_of(seed=SEED + 1)),
    "rows of another tensor": lambda x: (x[1:], numbers_of(digest=TWO)[:-1]),
}


@pytest.mark.parametrize("pair", PAIRS)
def test_pairs_of_entries_are_independent(pair: str) -> None:
    one, other = PAIRS[pair](numbers_of())
    assert abs(dependence(one, other)) < SIGMAS
    correlation = np.corrcoef(one.ravel().astype(float), other.ravel().astype(float))[0, 1]
    assert abs(correlation) < SIGMAS / np.sqrt(one.size)


@pytest.mark.parametrize("half", [0, 1], ids=["first half", "second half"])
def test_rows_that_share_half_of_their_keys_have_other_masks(half: int) -> None:
    """One row in 2^32 does. Nor is it the other row with its columns in another order, as it would be were the key but
    XORed into the column."""
    keys = draw_row_keys(SEED, ONE, (ROWS, COLUMNS))
    shared = keys.copy()
    shared[:, half] = keys[0, half]
    numbers = host_uniform(shared, (ROWS, COLUMNS))
    mask = numbers < 2**15
    agree = np.array([(one == other).mean() for one, other in itertools.pairwise(mask)])
    assert abs(agree - 0.5).max() < 5.5 * 0.5 / np.sqrt(COLUMNS)
    assert agree.std() < 1.2 * 0.5 / np.sqrt(COLUMNS)
    in_order = np.sort(numbers, axis=1)
    assert not (in_order[1:] == in_order[:-1]).all(axis=1).any()


def test_digests_and_seeds_that_differ_in_one_bit_draw_other_masks() -> None:
    shape = (64, 256)
    mask = numbers_of(shape=shape) < 2**15
    flipped = [bytes(x ^ ((1 << bit % 8) if i == bit // 8 else 0) for i, x in enumerate(ONE)) for bit in range(64)]
    others = [numbers_of(digest=one, shape=shape) for one in flipped]
    others += [numbers_of(seed=SEED ^ (1 << bit), shape=shape) for bit in range(32)]
    agree = np.array([(mask == (other < 2**15)).mean() for other in others])
    assert abs(agree - 0.5).max() < SIGMAS * 0.5 / np.sqrt(mask.size)
