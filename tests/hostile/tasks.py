"""Hostile tasks."""

from hostile import Case

CASES: list[Case] = []
