"""Hostile tokenizers."""

from hostile import Case

CASES: list[Case] = []
