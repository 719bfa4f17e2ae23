"""Tables for the terminal: merge methods, search strategies, architectures, the keys of a config."""

import inspect

from merge_kernels import METHODS, Method, Parameter
from rich.table import Table

from evojax_merge.checkpoints.config_file import LARGER_MODELS
from evojax_merge.config.documents import keys_of
from evojax_merge.config.search_config import Config
from evojax_merge.errors import InputError, did_you_mean
from evojax_merge.models.architecture import model_types
from evojax_merge.report.progress import cell
from evojax_merge.search.strategies.registry import find_strategy, strategy_names

# The name that stands for all sections of a config.
ALL = "all"
BASES = {"required": "required", "optional": "optional", "parent": "one of the models"}


def methods_table() -> Table:
    """Each method: its base and models, and its parameters with the bounds that a search has by default."""
    table = _table("method", "base", "models", "searched parameters [low, high] default", "fixed", "options")
    for method in METHODS.values():
        searched = [_parameter(parameter) for parameter in method.parameters if parameter.searched]
        fixed = [_parameter(parameter) for parameter in method.parameters if not parameter.searched]
        _row(table, method.name, BASES[method.base], _models(method), searched, fixed, method.yaml_options)
    return table


def strategies_table() -> Table:
    """Each strategy, by the name that `search.strategy` takes, with the first paragraph of its maker's docstring."""
    table = _table("strategy", "what it is")
    for name in strategy_names():
        description = inspect.getdoc(find_strategy("strategies", name)) or ""
        _row(table, name, " ".join(description.split("\n\n")[0].split()))
    return table


def architectures_table() -> Table:
    table = _table("model_type", "search, evaluate", "merge")
    for name in model_types():
        _row(table, name, "yes", "yes")
    _row(table, sorted(LARGER_MODELS), "their text decoder, of an architecture above", "yes")
    _row(table, "any other", "no", "yes, where tensors and shapes match (safetensors)")
    return table


def sections_table() -> Table:
    """Each key at the top of a search's config, with the number of the keys in it and its meaning."""
    keys = list(keys_of(Config))
    table = _table("section", "keys in it", "meaning")
    for top in keys:
        if top.name.partition(".")[0] == top.name:
            inner = {key.name for key in keys if key.name.startswith((f"{top.name}.", f"{top.name}["))}
            _row(table, top.name, len(inner) or "", top.meaning)
    return table


def keys_table(section: str) -> Table:
    """A section of a search's config, or `all`: its keys, with their types, defaults and meanings. Raises InputError
    for an unknown section."""
    keys = list(keys_of(Config))
    if section != ALL:
        chosen = [key for key in keys if key.name == section or key.name.startswith((f"{section}.", f"{section}["))]
        if not chosen:
            raise InputError("keys", f"{section}: no such key{did_you_mean(section, {key.name for key in keys})}")
        keys = chosen
    table = _table("key", "takes", "default", "meaning")
    table.columns[0].no_wrap = True
    of: tuple[str, ...] = ()
    for key in keys:
        if key.of != of:
            of = key.of
            kinds = f"of kind {', '.join(of)}:"
            _row(table, *((key.name.partition(".")[0], "", "", kinds) if of else ("",)))
        _row(table, key.name, key.takes, key.default, key.meaning)
    return table


def _models(method: Method) -> str:
    if method.max_parents is None:
        return f"{method.min_parents} or more"
    few = f"{method.min_parents} to {method.max_parents}"
    return str(method.max_parents) if method.min_parents == method.max_parents else few


def _parameter(parameter: Parameter) -> str:
    default = "" if parameter.default is None else f" {parameter.default:g}"
    if parameter.default is None and parameter.per_parent:
        default = " 1/K"
    each = " per parent" if parameter.per_parent else ""
    return f"{parameter.name}{each} [{parameter.low:g}, {parameter.high:g}]{default}"


def _table(*columns: str) -> Table:
    table = Table()
    for column in columns:
        table.add_column(cell(column))
    return table


def _row(table: Table, *cells: object) -> None:
    lines = ("\n".join(cell) if isinstance(cell, list | tuple) else str(cell) for cell in cells)
    table.add_row(*map(cell, lines))
