"""Recipes as YAML, in mergekit's format: read and checked, not yet matched with tensors.

Eight settings go beyond mergekit: `random_seed`, which fixes the masks of random methods and which mergekit ignores;
`rescale: density` (the DARE paper's 1/density), which mergekit refuses; `other_modules`, the model whose other modules
the result has where text decoders alone are merged; `on_mismatch`, the treatment of tensors that not all models have
alike; `calibration`, the prompts on which methods such as regmean look at activations; `components`, the parts of
diffusers folders that are merged or kept; and two settings of a passthrough merge of slices: `ends`, the model whose
embedding and head the result has, and `gain_offsets`, the numbers that are added to tensors before `scale` multiplies
them, and subtracted after.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from merge_kernels import METHODS, Method

from evojax_merge.checkpoints.folder import FLOAT_DTYPES
from evojax_merge.checkpoints.tokens import TokenRule
from evojax_merge.config.documents import parse
from evojax_merge.errors import InputError, did_you_mean, shown
from evojax_merge.plugins import RECIPE_HINT
from evojax_merge.schema.approximation import Approximation
from evojax_merge.schema.calibration import Calibration
from evojax_merge.schema.section import MAX_SEED

# The keys of each section.
KEYS: dict[str, frozenset[str]] = {
    name: frozenset(keys)
    for name, keys in {
        "document": (
            "merge_method", "base_model", "models", "slices", "modules", "parameters", "dtype", "out_dtype",
            "tokenizer_source", "tokenizer", "chat_template", "random_seed", "ends", "gain_offsets", "other_modules",
            "on_mismatch", "components", "calibration",
        ),
        "module": ("models", "slices", "parameters"),
        "slice": ("sources", "parameters", "base_model"),
        "model": ("model", "parameters"),
        "source": ("model", "parameters", "layer_range"),
        "filter": ("filter", "value"),
        "pair": ("model", "lora"),
        "path": ("path", "revision"),
        "tokenizer": ("source", "tokens", "pad_to_multiple_of"),
        "token": ("source", "force"),
        "row": ("kind", "model", "token", "token_id"),
    }.items()
}  # fmt: skip
# A recipe has one of these keys.
FORMS = ("models", "slices", "modules")
# Merging is done in float32; the result may be written in float64 as well.
RECIPE_DTYPES = FLOAT_DTYPES | {"float64": np.dtype(np.float64)}
ON_MISMATCH = ("refuse", "first", "skip")
# Merging is done in float32.
MAX_NUMBER = float(np.finfo(np.float32).max)
# The maximum of a gradient's entries: models have fewer layers.
MAX_GRADIENT = 10_000
# The maximum of a slice's end: the layers of a slice are listed.
MAX_LAYERS = 100_000
# The maximum of rows that no token has.
MAX_PADDING = 2**16

Setting = Any
Settings = Mapping[str, Setting]


@dataclass(frozen=True)
class Source:
    """One model of a slice: `first` is its first layer (0 in the `models` form), `settings` its parameters."""

    model: str
    first: int
    settings: Settings


@dataclass(frozen=True)
class Slice:
    """`count` output layers (None: all of the model's) made of the sources' layers in step, around `base`."""

    count: int | None
    sources: tuple[Source, ...]
    settings: Settings
    base: str | None


@dataclass(frozen=True)
class Module:
    """The slices that some of a model's tensors are made of: all tensors (`default`), or the tensors that
    `mergekit.modules` gives to a module of this name. A whole model is a single slice without a count."""

    name: str
    slices: tuple[Slice, ...]
    settings: Settings


@dataclass(frozen=True)
class TokenizerSetting:
    """The source of the tokens: union, base, or a model, which need not be a merged one. key: the recipe's key that
    names it, tokenizer_source or tokenizer.source; approximation: see `TokenizerChoice`."""

    key: str
    source: str
    tokens: Mapping[str, TokenRule[str]]
    pad_to_multiple_of: int
    approximation: Approximation | None = None


@dataclass(frozen=True)
class RecipeFile:
    """A recipe as it stands in the file, checked but not yet matched with tensors. Relative paths start in the folder
    of `path`; `where`: the recipe's name in messages; `name`: that of a stage, whose result other recipes of the file
    call by it; gain_offsets: a filter -> the number that is added to its
    tensors; other_modules: only the models' text decoders are merged, and the other modules come from this model (None:
    whole models are merged); on_mismatch: a setting of `ON_MISMATCH`'s words;
    components: a component of diffusers folders -> merge, or the model that gives it; calibration: the prompts of a
    method that looks at activations."""

    path: Path
    where: str
    method: Method
    base: str | None
    modules: tuple[Module, ...]
    settings: Settings
    dtype: str | None
    out_dtype: str | None
    tokenizer: TokenizerSetting | None
    chat_template: str | None
    seed: int
    ends: str | None = None
    gain_offsets: Mapping[str, float] = field(default_factory=dict)
    other_modules: str | None = None
    on_mismatch: Setting = "refuse"
    components: Mapping[str, str] = field(default_factory=dict)
    calibration: Calibration | None = None
    name: str = ""

    @property
    def models(self) -> list[str]:
        """Every model referred to, the base first, each once."""
        named = [model for model in (self.base, self.ends) if model is not None]
        for module in self.modules:
            for part in module.slices:
                named += [source.model for source in part.sources]
        named += [] if self.other_modules is None else [self.other_modules]
        return list(dict.fromkeys(named))

    @property
    def tokenizer_model(self) -> str | None:
        """The model whose tokenizer the result has, where it is none of `models`; else None."""
        source = "union" if self.tokenizer is None else self.tokenizer.source
        return None if source in ("union", "base") or source in self.models else source

    @property
    def references(self) -> list[str]:
        """Every model referred to, also one for its tokenizer alone."""
        return self.models if self.tokenizer_model is None else [*self.models, self.tokenizer_model]


def checked_mapping(where: str, value: Any, known: Collection[str]) -> dict[str, Any]:
    """The value as a mapping of known keys. Raises InputError for anything else, naming the first unknown key."""
    if not isinstance(value, dict):
        raise InputError(where, f"expected a mapping, found {type(value).__name__}")
    for key in value:
        if key not in known:
            raise InputError(where, f"{key}: unknown key{did_you_mean(str(key), known)}")
    return value


# ---------------------------------------------------------------------------------------------------------------
# YAML -> recipe


def parse_recipe(path: Path, document: Any, where: str | None = None) -> RecipeFile:
    """A mergekit recipe as plain data. Relative paths start in the folder of `path`; `where`: the recipe's name in
    messages, None: the path. Raises InputError."""
    where = str(path) if where is None else where
    top = checked_mapping(where, document, KEYS["document"])
    name = top.get("merge_method")
    if not isinstance(name, str):
        raise InputError(where, f"merge_method: {name!r}; expected one of {', '.join(METHODS)}")
    if name not in METHODS:
        raise InputError(where, f"merge_method: unknown method {name!r}{did_you_mean(name, METHODS)}{RECIPE_HINT}")
    method = METHODS[name]
    base = top.get("base_model")
    base = None if base is None else parse_reference(f"{where}: base_model", base)
    form = _form(where, top, FORMS)
    if form == "modules":
        sections = top["modules"]
        if not isinstance(sections, dict) or not sections:
            raise InputError(where, "modules: expected a mapping from modules' names to their models or slices")
        modules = [
            _module(f"{where}: modules.{key}", str(key), section, method, base) for key, section in sections.items()
        ]
    else:
        modules = [Module("default", _slices(f"{where}: ", top, form, method, base), {})]
    seed = top.get("random_seed", 0)
    if type(seed) is not int or not 0 <= seed <= MAX_SEED:
        raise InputError(where, f"random_seed: {seed!r}; expected a whole number from 0 to {MAX_SEED}")
    chat = top.get("chat_template")
    if chat is not None and not isinstance(chat, str):
        raise InputError(where, "chat_template: expected auto, a template's name or a Jinja template")
    dtype, out_dtype = (_dtype(where, key, top.get(key)) for key in ("dtype", "out_dtype"))
    prompts = top.get("calibration")
    recipe = RecipeFile(
        path, where, method, base, tuple(modules), _settings(f"{where}: parameters", top.get("parameters"), method),
        dtype, out_dtype, _tokenizer(where, top), chat or None, seed, _ends(where, top, method),
        _gain_offsets(where, top, method),
        None if top.get("other_modules") is None else parse_reference(f"{where}: other_modules", top["other_modules"]),
        _on_mismatch(where, top.get("on_mismatch")),
        _components(where, top.get("components")),
        None if prompts is None else parse(f"{where}: calibration", prompts, Calibration),
    )  # fmt: skip
    for module in recipe.modules:
        for part in module.slices:
            _check_models(where, method, part)
    return recipe


def _form(where: str, section: dict[str, Any], forms: Sequence[str]) -> str:
    """The form that a section has. An empty form does not count, unless there is no other. Raises InputError unless
    there is exactly one."""
    given = [form for form in forms if section.get(form)] or [form for form in forms if form in section]
    if len(given) != 1:
        raise InputError(where, f"expected exactly one of the keys {', '.join(forms)}")
    return given[0]


def _module(where: str, name: str, section: Any, method: Method, base: str | None) -> Module:
    section = checked_mapping(where, section, KEYS["module"])
    form = _form(where, section, FORMS[:2])
    settings = _settings(f"{where}.parameters", section.get("parameters"), method)
    return Module(name, _slices(f"{where}.", section, form, method, base), settings)


def _slices(prefix: str, section: dict[str, Any], form: str, method: Method, base: str | None) -> tuple[Slice, ...]:
    """The slices of a section that has models or slices. prefix: the section's name in messages, up to its keys."""
    entries = section[form]
    if not isinstance(entries, list) or not entries:
        raise InputError(prefix.rstrip(".: "), f"{form}: expected a list that is not empty")
    if form == "slices":
        return tuple(_slice(f"{prefix}slices[{i}]", entry, method, base) for i, entry in enumerate(entries))
    sources = [_source(f"{prefix}models[{i}]", entry, method, KEYS["model"]) for i, entry in enumerate(entries)]
    if base is not None and all(source.model != base for source in sources):
        sources.insert(0, Source(base, sources[0].first, {}))
    return (Slice(None, tuple(sources), {}, base),)


def _dtype(where: str, key: str, value: Any) -> str | None:
    """The name of a dtype, which may be written as torch's (torch.bfloat16)."""
    name = value.removeprefix("torch.") if isinstance(value, str) else value
    if name is not None and name not in [*RECIPE_DTYPES]:
        raise InputError(where, f"{key}: {value!r}; expected one of {', '.join(RECIPE_DTYPES)}")
    return name


def _on_mismatch(where: str, value: Any) -> Setting:
    setting = "refuse" if value is None else value
    _check_setting(where, "on_mismatch", setting)
    entries = setting if isinstance(setting, list) else [setting]
    for entry in entries:
        word = (
            checked_mapping(f"{where}: on_mismatch", entry, KEYS["filter"]).get("value")
            if entry is not setting
            else entry
        )
        if word not in ON_MISMATCH:
            expected = f"one of {', '.join(ON_MISMATCH)}, or a list of {{filter: …, value: …}}"
            raise InputError(where, f"on_mismatch: {word!r}; expected {expected}")
    return setting


def _components(where: str, value: Any) -> dict[str, str]:
    components = {} if value is None else value
    if not isinstance(components, dict) or not all(isinstance(name, str) for name in components):
        raise InputError(where, f"components: {shown(value)}; expected a mapping, such as {{unet: merge}}")
    return {
        name: model if model == "merge" else parse_reference(f"{where}: components.{name}", model)
        for name, model in components.items()
    }


def _ends(where: str, top: dict[str, Any], method: Method) -> str | None:
    """The model that gives a passthrough merge its tensors outside of the layers; None without one."""
    if top.get("ends") is None:
        return None
    if method.copies is None or "slices" not in top:
        raise InputError(where, "ends: only a passthrough merge of slices takes them from one model")
    return parse_reference(f"{where}: ends", top["ends"])


def _gain_offsets(where: str, top: dict[str, Any], method: Method) -> dict[str, float]:
    """Filters of tensors that hold a gain minus a number -> that number."""
    offsets = top.get("gain_offsets") or {}
    if offsets and (method.copies is None or "slices" not in top):
        raise InputError(where, "gain_offsets: only a passthrough merge of slices has them")
    if not isinstance(offsets, dict):
        raise InputError(where, f"gain_offsets: {offsets!r}; expected a mapping of filters and numbers")
    for text, offset in offsets.items():
        # A comparison that NaN and infinity fail.
        number = isinstance(offset, int | float) and not isinstance(offset, bool) and abs(offset) <= MAX_NUMBER
        if not isinstance(text, str) or not text or not number:
            raise InputError(where, f"gain_offsets: {text!r}: {offset!r}; expected a filter and a finite number")
    return {text: float(offset) for text, offset in offsets.items()}


def _check_models(where: str, method: Method, part: Slice) -> None:
    """Raises InputError unless a slice has the base that its method needs, and as many models as the method takes."""
    if method.base == "required" and part.base is None:
        raise InputError(where, f"{method.name} needs a base_model, from which task vectors are taken")
    models = [source.model for source in part.sources]
    if len(set(models)) != len(models):
        raise InputError(where, f"a slice names {max(models, key=models.count)} twice; expected each model once")
    parents = len(models)
    if method.uses_base(part.base is not None):
        parents -= part.base in models
        if parents == 0 and method.keeps_base:
            return
    check_parent_count(where, method, parents)


def check_parent_count(where: str, method: Method, parents: int) -> None:
    """Raises InputError where a method does not take this number of models besides the base that deltas are taken
    from."""
    if parents < method.min_parents or (method.max_parents is not None and parents > method.max_parents):
        least = f"at least {method.min_parents}"
        many = least if method.max_parents is None else f"at most {method.max_parents}"
        many = f"{method.min_parents}" if method.max_parents == method.min_parents else many
        besides = " besides the base" if method.base == "required" else ""
        raise InputError(where, f"{method.name} takes {many} models{besides}, found {parents}")


def parse_reference(where: str, value: Any) -> str:
    """A model as one text: a folder or a hub id, `@` its revision, `+` an adapter. mergekit also writes it as
    `{model: …, lora: …}`, in which each part may be `{path: …, revision: …}`; such a part alone is a model, too."""
    if isinstance(value, dict) and "path" in value and "model" not in value:
        value = _path(where, value)
    if isinstance(value, dict):
        value = checked_mapping(where, value, KEYS["pair"])
        if "model" not in value:
            raise InputError(where, "model: missing")
        value = "+".join(_path(where, value[key]) for key in ("model", "lora") if value.get(key) is not None)
    if not isinstance(value, str) or not value:
        raise InputError(where, f"{value!r}; expected a folder, a hub id, or base+adapter")
    return value


def _path(where: str, value: Any) -> str:
    value = checked_mapping(where, value, KEYS["path"]) if isinstance(value, dict) else {"path": value}
    path, revision = value.get("path"), value.get("revision")
    if not isinstance(path, str) or not isinstance(revision, (str, type(None))):
        raise InputError(where, f"{value!r}; expected a path or hub id, and the name of its revision")
    return path if revision is None else f"{path}@{revision}"


def _source(where: str, entry: Any, method: Method, keys: frozenset[str]) -> Source:
    entry = checked_mapping(where, entry, keys)
    for key in sorted(keys - {"parameters"}):
        if key not in entry:
            raise InputError(where, f"{key}: missing")
    first = _layer_range(where, entry["layer_range"])[0] if "layer_range" in entry else 0
    settings = _settings(f"{where}.parameters", entry.get("parameters"), method)
    return Source(parse_reference(f"{where}.model", entry["model"]), first, settings)


def _layer_range(where: str, value: Any) -> tuple[int, int]:
    """The first layer and the layer after the last; whole numbers, however they are written. Raises InputError for any
    other value."""
    try:
        first, end = (float(layer) for layer in value if isinstance(value, list))
        if 0 <= first < end <= MAX_LAYERS and first == int(first) and end == int(end):
            return int(first), int(end)
    except (TypeError, ValueError, OverflowError):
        pass
    raise InputError(where, f"layer_range: {value!r}; expected [first, end] with first < end <= {MAX_LAYERS:,}")


def _slice(where: str, entry: Any, method: Method, base: str | None) -> Slice:
    entry = checked_mapping(where, entry, KEYS["slice"])
    if not isinstance(entry.get("sources"), list) or not entry["sources"]:
        raise InputError(where, "sources: expected a list that is not empty")
    sources = [
        _source(f"{where}.sources[{i}]", source, method, KEYS["source"]) for i, source in enumerate(entry["sources"])
    ]
    ranges = [_layer_range(where, source["layer_range"]) for source in entry["sources"]]
    counts = {end - first for first, end in ranges}
    if len(counts) != 1:
        raise InputError(where, f"layer_range: sources of unlike length {sorted(counts)}; expected one length")
    slice_base = (
        base if entry.get("base_model") is None else parse_reference(f"{where}.base_model", entry["base_model"])
    )
    needed = method.base != "parent" or method.base_is_first_parent
    if needed and slice_base is not None and all(source.model != slice_base for source in sources):
        raise InputError(where, f"sources: the base_model {slice_base!r} is missing; list it with a layer_range")
    return Slice(
        counts.pop(), tuple(sources), _settings(f"{where}.parameters", entry.get("parameters"), method), slice_base
    )


def parameter_names(method: Method) -> set[str]:
    """The names that `parameters` of a recipe of this method may set."""
    return {p.name for p in method.parameters} | {*method.yaml_options, *method.ignored_settings}


def _settings(where: str, value: Any, method: Method) -> Settings:
    if value is None:
        return {}
    settings = checked_mapping(where, value, parameter_names(method))
    for name, setting in settings.items():
        _check_setting(where, name, setting)
    return settings


def _check_setting(where: str, name: str, setting: Any) -> None:
    """Raises InputError unless a setting is a scalar, a gradient of scalars, or filters with values of these kinds,
    whether or not a tensor uses it."""
    if isinstance(setting, (dict, list)):
        entries = [setting] if isinstance(setting, dict) else setting
        if len(entries) > MAX_GRADIENT:
            raise InputError(where, f"{name}: {len(entries):,} entries; expected at most {MAX_GRADIENT:,}")
        filtered = any(isinstance(entry, (dict, list)) for entry in entries)
        for entry in entries:
            if not filtered:
                _check_setting(where, name, entry)
                continue
            entry = checked_mapping(f"{where}: {name}", entry, KEYS["filter"])
            if not isinstance(entry.get("filter"), (str, type(None))):
                raise InputError(where, f"{name}: filter: {entry['filter']!r}; expected a part of tensors' names")
            _check_setting(where, name, entry.get("value"))
    elif isinstance(setting, (int, float)) and not abs(setting) <= MAX_NUMBER:
        raise InputError(where, f"{name}: {setting!r}; expected a finite number of at most {MAX_NUMBER:.4g}")
    elif not isinstance(setting, (int, float, str, type(None))):
        raise InputError(where, f"{name}: {setting!r}; expected a number, a gradient or filters")


def _tokenizer(where: str, top: dict[str, Any]) -> TokenizerSetting | None:
    source, section = top.get("tokenizer_source"), top.get("tokenizer")
    if source is not None and section is not None:
        raise InputError(where, "expected at most one of the keys tokenizer_source, tokenizer")
    if isinstance(source, dict) and "of" in source:
        how: Approximation = parse(f"{where}: tokenizer_source", source, Approximation)
        return TokenizerSetting("tokenizer_source", how.of, {}, 1, how)
    if source is not None:
        return TokenizerSetting("tokenizer_source", parse_reference(f"{where}: tokenizer_source", source), {}, 1)
    if section is None:
        return None
    where = f"{where}: tokenizer"
    section = checked_mapping(where, section, KEYS["tokenizer"])
    tokens = section.get("tokens") or {}
    if not isinstance(tokens, dict):
        raise InputError(where, "tokens: expected a mapping from token to its source")
    pad = section.get("pad_to_multiple_of") or 1
    if type(pad) is not int or not 1 <= pad <= MAX_PADDING:
        raise InputError(where, f"pad_to_multiple_of: {pad!r}; expected a whole number from 1 to {MAX_PADDING}")
    return TokenizerSetting(
        "tokenizer.source",
        parse_reference(f"{where}.source", section.get("source", "union")),
        {str(token): _token(f"{where}.tokens.{token}", entry) for token, entry in tokens.items()},
        pad,
    )


def _token(where: str, entry: Any) -> TokenRule[str]:
    entry = checked_mapping(where, entry, KEYS["token"])
    source, force = entry.get("source"), entry.get("force", False)
    if not isinstance(force, bool):
        raise InputError(where, f"force: {force!r}; expected true or false")
    if isinstance(source, str) or (isinstance(source, dict) and "kind" not in source and "model" in source):
        return TokenRule(parse_reference(f"{where}.source", source), None, force)
    if not isinstance(source, dict):
        raise InputError(where, "source: expected a model, {kind: zero} or {kind: model_token, model: …, token: …}")
    source = checked_mapping(f"{where}.source", source, KEYS["row"])
    if source.get("kind") == "zero":
        return TokenRule(None, None, force)
    given = [key for key in ("token", "token_id") if source.get(key) is not None]
    if source.get("kind") != "model_token" or "model" not in source or len(given) != 1:
        raise InputError(
            f"{where}.source", "expected kind: zero, or kind: model_token with model and token or token_id"
        )
    token = source[given[0]]
    if type(token) is not (str if given[0] == "token" else int):
        raise InputError(f"{where}.source", f"{given[0]}: {token!r}; expected a token, or its number as token_id")
    return TokenRule(parse_reference(f"{where}.source.model", source["model"]), token, force)
