"""Hostile configs."""

from hostile import Case

CASES: list[Case] = []
