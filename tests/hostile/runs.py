"""Hostile runs."""

from hostile import Case

CASES: list[Case] = []
