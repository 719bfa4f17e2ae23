"""YAML files of other programs, which users take for recipes: a message names each format."""

from typing import Any

from merge_kernels import METHODS

MOE = "is a config of mergekit-moe, not a recipe; run it with evojax-merge moe"
# Keys that YAML files of other programs have and recipes lack, and the message about each format.
OTHER_FORMATS = {
    frozenset({"parents", "tasks"}): "is the config of a search, not a recipe; run it with evojax-merge search",
    frozenset({"genome"}): "is a config of mergekit-evolve, not a recipe; run it with evojax-merge search",
    frozenset({"experts"}): MOE,
    frozenset({"gate_mode"}): MOE,
    frozenset({"layer_slices"}): "is a config of mergekit's bakllama; say its layers as slices of a passthrough merge",
    frozenset({"metric_method"}): "is a config of mergekit-metrics, which merges nothing; that is not supported",
}
# The same messages by the value of `merge_method`.
OTHER_METHODS = {"moe": MOE}


def other_format(document: Any) -> str | None:
    """The message about a document that belongs to another program; None for any other document."""
    if not isinstance(document, dict):
        return None
    method = document.get("merge_method")
    if isinstance(method, str) and method in METHODS:
        return None
    if isinstance(method, str) and method in OTHER_METHODS:
        return OTHER_METHODS[method]
    return next((message for keys, message in OTHER_FORMATS.items() if keys <= set(document)), None)
