"""Hostile checkpoints."""

from hostile import Case

CASES: list[Case] = []
