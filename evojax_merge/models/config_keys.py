"""The valid values of a key in a config.json: a test, and its description in messages."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from evojax_merge.errors import InputError, shown
from evojax_merge.models.config import NO_WINDOW

# A larger number of layers is a mistake or an attack: tables as long as the model is deep are allocated before a tensor
# is read.
MOST_LAYERS = 10_000


# The form in which transformers writes an infinite number.
INFINITY = {"__float__": "Infinity"}


@dataclass(frozen=True)
class Expected:
    """The expected value of a key. accepts: returns whether a value is valid; words: the expected values, for a
    message; keys: the keys of a mapping that are read, each with its expected value; read_if: returns whether the value
    is read at all, given the whole config."""

    accepts: Callable[[Any], bool]
    words: str
    keys: Mapping[str, "Expected"] = field(default_factory=dict)
    read_if: Callable[[Mapping[str, Any]], bool] = lambda config: True

    def check(self, where: object, key: str, value: Any) -> Any:
        """The value of a key. Raises InputError for an invalid one."""
        if not self.accepts(value):
            raise InputError(where, f"{key}: {shown(value)}; expected {self.words}")
        return value


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def whole(low: int, high: int) -> Expected:
    return Expected(
        lambda value: isinstance(value, int) and not isinstance(value, bool) and low <= value <= high,
        f"a whole number from {low:,} to {high:,}",
    )


def above(low: float) -> Expected:
    # A comparison that NaN and infinity fail, and numbers so near to zero that float32 cannot divide by them.
    return Expected(
        lambda value: is_number(value) and max(low, 1e-30) < value <= 1e30, f"a finite number above {low:g}"
    )


def one_of(*names: str) -> Expected:
    return Expected(lambda value: value in names, f"one of {', '.join(names)}")


def mapping(keys: Mapping[str, Expected]) -> Expected:
    return Expected(lambda value: isinstance(value, dict), "a mapping", keys)


def list_of(expected: Expected, words: str, count: int | None = None) -> Expected:
    """A list of so many values, or of any number."""
    return Expected(
        lambda value: isinstance(value, list) and count in (None, len(value)) and all(map(expected.accepts, value)),
        words,
    )


def or_null(expected: Expected) -> Expected:
    return replace(
        expected, accepts=lambda value: value is None or expected.accepts(value), words=f"null or {expected.words}"
    )


SIZE = whole(1, 2**31 - 1)
SWITCH = Expected(lambda value: isinstance(value, bool), "true or false")
OFF = Expected(lambda value: value is None or value is False, "null or false")
ANYTHING = Expected(lambda value: True, "any value")
TEXT = Expected(lambda value: isinstance(value, str), "a text")
TEXTS = list_of(TEXT, "a list of texts")
# Not beyond float32, nor an integer of hundreds of digits, of which Python makes no float.
FINITE = Expected(lambda value: is_number(value) and abs(value) <= 1e30, "a finite number")
EPSILON = Expected(lambda value: is_number(value) and 0 <= value < 1, "a number from 0 to 1")
DEPTH = whole(1, MOST_LAYERS)
CONTEXT = whole(1, NO_WINDOW)
# The tokens that a convolution sums over: a program has a step for each, and keeps all but one.
KERNEL = whole(2, 256)
