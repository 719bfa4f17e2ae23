"""Hostile recipes."""

from hostile import MERGE, Case

CASES: list[Case] = [
    Case("a list", lambda w: w.write("recipe.yaml", "- 1\n"), ("recipe.yaml", "expected a mapping"), MERGE),
]
