"""The choices that a judge of two answers has."""

from typing import Literal

Choice = Literal["left", "right", "tie", "both_bad"]
