"""`evojax-merge methods`, `strategies`, `architectures` and `keys`: tables for the terminal."""

import inspect

from merge_kernels import METHODS, Parameter

from evojax_merge import plugins
from evojax_merge.checkpoints.config_file import MULTIMODAL_MODEL_TYPES
from evojax_merge.config.documents import keys_of
from evojax_merge.config.search_config import Config
from evojax_merge.errors import InputError, did_you_mean
from evojax_merge.models.architecture import model_types
from evojax_merge.report.tables import Table, TerminalTable
from evojax_merge.search.strategies.registry import find_strategy, strategy_names
from evojax_merge.system.console import console

# The name that stands for all sections of a config.
ALL = "all"
BASES = {"required": "required", "optional": "optional", "parent": "one of the models"}


def methods_table() -> Table:
    """Each method: its base and models, and its parameters with the bounds that a search has by default."""
    rows = []
    for method in METHODS.values():
        searched = [_parameter(parameter) for parameter in method.parameters if parameter.searched]
        fixed = [_parameter(parameter) for parameter in method.parameters if not parameter.searched]
        few, most = method.min_parents, method.max_parents
        models = f"{few} or more" if most is None else str(most) if few == most else f"{few} to {most}"
        lists = ("\n".join(texts) for texts in (searched, fixed, method.yaml_options))
        rows.append((method.name, BASES[method.base], models, *lists))
    columns = ("method", "base", "models", "searched parameters [low, high] default", "fixed", "options")
    return Table(columns, rows)


def strategies_table() -> Table:
    """Each strategy, by the name that `search.strategy` takes, with the first paragraph of its maker's docstring."""
    descriptions = {name: inspect.getdoc(find_strategy("strategies", name)) or "" for name in strategy_names()}
    rows = [(name, " ".join(text.split("\n\n")[0].split())) for name, text in descriptions.items()]
    return Table(("strategy", "what it is"), rows)


def architectures_table() -> Table:
    """The model_types of known decoders, of larger models, and of the other decoders of the installed transformers."""
    # Imports torch, where it is installed.
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    native = model_types()
    others = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys() - {*native, *MULTIMODAL_MODEL_TYPES})
    rows = [
        *((name, "yes", "yes") for name in native),
        ("\n".join(sorted(MULTIMODAL_MODEL_TYPES)), "their text decoder, of an architecture above", "yes"),
        (", ".join(others), "with `backend: torch` alone", "yes, where tensors and shapes match (safetensors)"),
        ("any other", "no", "yes, where tensors and shapes match (safetensors)"),
    ]
    return Table(("model_type", "search, evaluate", "merge"), rows)


def sections_table() -> Table:
    """Each key at the top of a search's config, with the number of the keys in it and its meaning."""
    keys, rows = list(keys_of(Config)), []
    for top in keys:
        if top.name.partition(".")[0] == top.name:
            inner = {key.name for key in keys if key.name.startswith((f"{top.name}.", f"{top.name}["))}
            rows.append((top.name, len(inner) or "", top.meaning))
    return Table(("section", "keys in it", "meaning"), rows)


def keys_table(section: str) -> TerminalTable:
    """A section of a search's config, or `all`: its keys, with their types, defaults and meanings. Raises InputError
    for an unknown section."""
    keys = list(keys_of(Config))
    if section != ALL:
        chosen = [key for key in keys if key.name == section or key.name.startswith((f"{section}.", f"{section}["))]
        if not chosen:
            raise InputError("keys", f"{section}: no such key{did_you_mean(section, {key.name for key in keys})}")
        keys = chosen
    rows: list[tuple[str, str, str, str]] = []
    of: tuple[str, ...] = ()
    for key in keys:
        if key.of != of:
            of = key.of
            kinds = f"of kind {', '.join(of)}:"
            rows.append((key.name.partition(".")[0], "", "", kinds) if of else ("", "", "", ""))
        rows.append((key.name, key.takes, key.default, key.meaning))
    return Table(("key", "takes", "default", "meaning"), rows, whole={0}).terminal()


def _parameter(parameter: Parameter) -> str:
    default = "" if parameter.default is None else f" {parameter.default:g}"
    if parameter.default is None and parameter.per_parent:
        default = " 1/K"
    each = " per parent" if parameter.per_parent else ""
    return f"{parameter.name}{each} [{parameter.low:g}, {parameter.high:g}]{default}"


def list_known(what: str, section: str | None = None) -> None:
    """Print the tables of methods, strategies, architectures, the sections of a config, or the keys of one."""
    plugins.load()
    if what == "keys" and section is not None:
        console.print(keys_table(section))
        return
    tables = {
        "methods": methods_table, "strategies": strategies_table, "architectures": architectures_table,
        "keys": sections_table,
    }  # fmt: skip
    console.print(tables[what]().terminal())
    if what == "keys":
        console.print(
            f"evojax-merge keys search: the keys in one of these, here search; evojax-merge keys {ALL}: all keys"
        )
