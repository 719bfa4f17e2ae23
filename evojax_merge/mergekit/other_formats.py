"""YAML files of other programs, which are taken for recipes: each is named as what it is."""

from typing import Any

from merge_kernels import METHODS

MOE = "is a config of mergekit-moe, which makes a mixture of experts; that is not supported"
# What the YAML files of other programs have, and no recipe: the keys, and what to say of it.
OTHER_FORMATS = {
    frozenset({"parents", "tasks"}): "is the config of a search, not a recipe; run it with evojax-merge search",
    frozenset({"genome"}): "is a config of mergekit-evolve, not a recipe; run it with evojax-merge search",
    frozenset({"experts"}): MOE,
    frozenset({"gate_mode"}): MOE,
    frozenset({"layer_slices"}): "is a config of mergekit's bakllama; say its layers as slices of a passthrough merge",
    frozenset({"metric_method"}): "is a config of mergekit-metrics, which merges nothing; that is not supported",
}
# The same by what their `merge_method` says.
OTHER_METHODS = {"moe": MOE}


def other_format(document: Any) -> str | None:
    """What to say of a document that is no recipe but another program's; None for any other."""
    if not isinstance(document, dict):
        return None
    method = document.get("merge_method")
    if isinstance(method, str) and method in METHODS:
        return None
    if isinstance(method, str) and method in OTHER_METHODS:
        return OTHER_METHODS[method]
    return next((said for keys, said in OTHER_FORMATS.items() if keys <= set(document)), None)
