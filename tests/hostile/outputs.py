"""Hostile outputs."""

from hostile import Case

CASES: list[Case] = []
