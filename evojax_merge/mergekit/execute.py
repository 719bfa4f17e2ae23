"""One merge, no search: a recipe -> a model folder, tensor by tensor.

Uses the same kernels as a search, with each tensor measured exactly for the one recipe. Tensors stream: a few workers
each read a tensor from all sources, measure it, merge it, and drop it, while finished tensors are written in order. At
most `WORKERS + 2` tensors are in flight, so that memory does not grow with the model.
"""

import json
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial, reduce
from pathlib import Path
from typing import Any, Protocol

import jax.numpy as jnp
import merge_kernels
import numpy as np

from evojax_merge.checkpoints.config_file import LAYER_LISTS, layer_lists
from evojax_merge.checkpoints.decoder_folder import DecoderFolder
from evojax_merge.checkpoints.derived import Find, parts_of, resolve_model
from evojax_merge.checkpoints.folder import STEMS, Tensor, is_finite, is_float, read_metadata
from evojax_merge.checkpoints.json_files import read_json_object
from evojax_merge.checkpoints.kept_vectors import prepare_or_read
from evojax_merge.checkpoints.parents import Sources
from evojax_merge.checkpoints.tokens import (
    TOKENIZER_FILES,
    TokenizerChoice,
    TokenRule,
    has_tokenizer,
    load_tokenizer,
    vocabulary_warnings,
)
from evojax_merge.checkpoints.writer import (
    CARD,
    MAX_SHARD_BYTES,
    PROCESSOR_FILES,
    PYTORCH,
    RECIPE,
    ShardWriter,
    TensorSpec,
    write_marker,
)
from evojax_merge.errors import InputError, escaped_lines
from evojax_merge.mergekit.calibration import with_moments
from evojax_merge.mergekit.modules import module_kind
from evojax_merge.mergekit.opening import check_configs, check_inputs, fitting_inputs, open_models
from evojax_merge.mergekit.plan import (
    Layout,
    TensorPlan,
    module_layouts,
    plan,
    unmatched_filters,
)
from evojax_merge.mergekit.schema import RECIPE_DTYPES, RecipeFile, TokenizerSetting
from evojax_merge.mergekit.templates import CHAT_TEMPLATES
from evojax_merge.models.architecture import known_architecture
from evojax_merge.models.paths import scale_gain
from evojax_merge.system.file_system import atomic_folder
from evojax_merge.system.jinja_process import TemplateError, check_template
from evojax_merge.system.regular_file import copy_regular
from evojax_merge.tasks.task import local_file

Progress = Callable[[int], None]

# The keys of a config that name tokens by their ids.
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "decoder_start_token_id")
WORKERS = min(4, os.cpu_count() or 1)


@dataclass(frozen=True)
class MergePlan:
    """A recipe matched with opened folders: everything is checked, nothing is computed.

    `copied`: the tensors that are written as one model has them, beside those of `rows`: modules beside the decoder,
    and heads for several tokens that not all models have. `leader`: the folder that gives the result its tensors'
    names, its generation settings and, where only text decoders are merged, its other modules. `tokenizer`: the folder
    whose tokenizer is copied; None: none is written. `config`: the merged decoder's config, without the dtype.
    `unmatched`: the recipe's filters that mean no tensor, each with a sentence about it.
    """

    recipe: RecipeFile
    sources: Sources
    rows: tuple[TensorPlan, ...]
    specs: dict[str, TensorSpec]
    copied: Mapping[str, Tensor]
    leader: DecoderFolder
    tokenizer: Path | None
    chat_template: str | None
    config: dict[str, Any]
    allow_nonfinite: bool
    unmatched: Mapping[str, str]

    @property
    def inputs(self) -> list[Path]:
        """The files and folders that are read."""
        folders = self.sources.folders
        files = [file.resolve() for folder in folders for file in folder.files]
        parts = [part for folder in folders for part in parts_of(folder.path)]
        others = [self.recipe.path] if self.tokenizer is None else [self.tokenizer, self.recipe.path]
        prompts = [] if self.sources.moments is None else self.sources.moments.files
        return [*parts, *files, *others, *prompts]

    @property
    def nbytes(self) -> int:
        return sum(spec.nbytes for spec in self.specs.values())

    @property
    def generation_config(self) -> Path:
        """The settings of generation, which name tokens by their ids; copied where there are any."""
        vocabulary = self.sources.vocabulary
        donor = None if vocabulary is None else vocabulary.copied
        return (donor or self.leader.path) / "generation_config.json"

    @property
    def base(self) -> DecoderFolder:
        """The base of a merge that has one."""
        assert self.recipe.base is not None
        return self.sources.folders[self.recipe.models.index(self.recipe.base)]

    def write(self, folder: Path, progress: Progress, max_shard_bytes: int) -> None:
        """Merge into an empty folder."""
        write_weights(self, folder, progress, max_shard_bytes)
        write_small_files(self, folder)


class WritableMerge(Protocol):
    """A planned merge: `MergePlan`, or that of a diffusers folder."""

    def write(self, folder: Path, progress: Progress, max_shard_bytes: int) -> None: ...


@dataclass(frozen=True)
class MergeSettings:
    """How a recipe is merged, beside what it says itself.

    `dtype`, `seed`: in place of the recipe's. `allow_nonfinite`: merge and write values that are not finite, too.
    `copy_tokenizer`: write the first tokenizer of the models where the recipe asks for none. `allow_crimes` (mergekit's
    name): merge models of any architectures if their tensors agree. `strict`: configs of one architecture that mean
    other layers (another RoPE, say) are an error, not a warning.
    """

    dtype: str | None = None
    seed: int | None = None
    allow_nonfinite: bool = False
    copy_tokenizer: bool = True
    allow_crimes: bool = False
    strict: bool = True


DEFAULTS = MergeSettings()


def prepare(recipe: RecipeFile, settings: MergeSettings = DEFAULTS, find: Find = resolve_model) -> MergePlan:
    """Open every model of the recipe and plan the output. `find` returns a model's folder. Raises InputError where
    models cannot be merged."""
    if settings.seed is not None:
        recipe = replace(recipe, seed=settings.seed)
    paths = [find(recipe.where, reference, recipe.path.parent) for reference in recipe.models]
    choice = None if recipe.tokenizer is None else _tokenizer_choice(recipe, recipe.tokenizer, find)
    opened = open_models(recipe, paths, choice, settings.allow_crimes)
    sources, layouts = opened.sources, opened.layouts
    leader = sources.folders[0 if recipe.other_modules is None else recipe.models.index(recipe.other_modules)]
    if recipe.other_modules is not None and not leader.other_modules:
        raise InputError(
            recipe.where, f"other_modules: {recipe.other_modules} is a text decoder alone; expected a larger model"
        )
    planned = plan(recipe, layouts, partial(fitting_inputs, recipe, sources))
    config = _merged_config(recipe, sources, leader, layouts, opened.tied)
    if leader.names.layers:
        leader = leader.at_depth(config.get("num_hidden_layers", leader.names.depth))
    tensor_plans = [replace(tensor_plan, name=leader.names.in_file(tensor_plan.name)) for tensor_plan in planned]
    wanted = RECIPE_DTYPES.get(settings.dtype or recipe.out_dtype or recipe.dtype or "")
    specs = {}
    for tensor_plan in tensor_plans:
        check_inputs(recipe, sources, tensor_plan)
        source, tensor = tensor_plan.inputs[0]
        dtypes = [sources.entry(s, name).dtype for s, name in tensor_plan.inputs]
        # Without a dtype in the recipe, sources of unlike precision are merged into a dtype that holds all of them.
        common_dtype = reduce(jnp.promote_types, dtypes) if is_float(dtypes[0]) else dtypes[0]
        specs[tensor_plan.name] = TensorSpec(
            sources.shape(source, tensor), wanted if wanted is not None and is_float(common_dtype) else common_dtype
        )
    copied_tensors = dict(leader.other_modules)
    copied_tensors |= {
        leader.names.in_file(name): sources.folders[model].entries[name] for name, model in opened.kept.items()
    }
    specs |= {name: TensorSpec(entry.shape, entry.dtype) for name, entry in copied_tensors.items()}
    warnings = [*sources.warnings]
    if sources.vocabulary is None:
        warnings += vocabulary_warnings([folder.path for folder in sources.folders])
    if recipe.on_mismatch == "refuse":
        try:
            warnings += check_configs(sources)
        except InputError as error:
            if settings.strict:
                raise
            warnings.append(f"{error}; the merged model gets the config of {leader.path}")
    merged = {source.model for module in recipe.modules for part in module.slices for source in part.sources}
    if recipe.method.uses_base(recipe.base is not None):
        merged.discard(str(recipe.base))
    sources = with_moments(
        recipe.where, recipe.calibration, recipe.method, sources,
        [number for number, model in enumerate(recipe.models) if model in merged], recipe.path.parent, local_file,
        warnings.append,
    )  # fmt: skip
    sources = replace(sources, warnings=tuple(warnings))
    vocabulary = sources.vocabulary
    copied = None if vocabulary is None else vocabulary.copied
    if leader.other_modules and vocabulary is not None and copied != leader.path:
        raise InputError(
            recipe.where, "tokenizer_source: expected the model of other_modules, whose images have tokens of its own"
        )
    tokenizer, template = None, None
    if settings.copy_tokenizer or vocabulary is not None:
        tokenizer = copied or next(filter(has_tokenizer, (leader.path, *paths)), leader.path)
        template = _chat_template(recipe, paths)
        if template is not None:
            load_tokenizer(tokenizer)  # it is written anew, with the template
    merge_plan = MergePlan(
        recipe, sources, tuple(tensor_plans), specs, copied_tensors, leader, tokenizer, template, config,
        settings.allow_nonfinite,
        unmatched_filters(recipe, planned),
    )  # fmt: skip
    read_json_object(merge_plan.generation_config, missing={})  # it is copied, but only if it can be read
    return merge_plan


def _merged_config(
    recipe: RecipeFile, sources: Sources, leader: DecoderFolder, layouts: Sequence[Layout], tied: bool | None
) -> dict[str, Any]:
    """The leader's config, changed only in what the recipe changes. `tied`: whether the head is the embedding; None
    where the model is no known decoder with a head, so that the config's own value stays."""
    config = dict(leader.config)
    if not config:
        return {}
    if tied is not None:
        config["tie_word_embeddings"] = tied
    if sources.vocabulary is not None:
        # The number of rows for tokens, wherever the config says one.
        rows: dict[str, Any] = {"vocab_size": sources.vocabulary.size}
        text = config.get("text_config")
        if sources.vocabulary.copied is not None:
            # The ids of tokens such as that of the end are those of the model whose tokenizer it is.
            donor = read_json_object(sources.vocabulary.copied / "config.json", missing={})
            rows |= {key: donor.get(key) for key in TOKEN_IDS if key in donor or key in config}
        if "vocab_size" in config or not isinstance(text, dict):
            config |= rows
        if isinstance(text, dict) and ("vocab_size" in text or "vocab_size" not in leader.config):
            config["text_config"] = text | rows
    number, models = sources.folders.index(leader), recipe.models
    for module, module_layout in zip(recipe.modules, module_layouts(recipe, layouts), strict=True):
        layers = sum(len(rows) for rows in module_layout[number].stacks.values())
        # Of each layer, the model and the layer of its slice's first source; none for whole models.
        firsts = [(part.sources[0], part.count or 0) for part in module.slices]
        origins = [(models.index(source.model), source.first + i) for source, count in firsts for i in range(count)]
        if module.slices[0].count is not None and origins != [(number, i) for i in range(layers)]:
            _set_depth(config, sources, number, module_kind(module.name).depths, layers, origins)
    return config


def _varies(lists: Iterable[Mapping[str, Sequence[Any]]]) -> bool:
    """Return whether a list has different entries for different layers."""
    return any(len(set(entries)) > 1 for each in lists for entries in each.values())


def _set_depth(
    config: dict[str, Any],
    sources: Sources,
    leader: int,
    depths: Sequence[str],
    layers: int,
    origins: Sequence[tuple[int, int]],
) -> None:
    """Write the number of layers into the config of source number `leader`, under the first of the keys (`section.key`
    or `key`) whose value is `layers`, and lists with an entry per layer, such as layer_types, from the sources' entries
    of `origins`. Raises InputError where no key has that value."""
    configs, architecture = [folder.config for folder in sources.folders], known_architecture(config.get("model_type"))
    if architecture is not None and architecture.type_keys is not None:
        types = [folder.decoder_config().layer_types for folder in sources.folders]
        try:
            config.update(architecture.type_keys([types[model][layer] for model, layer in origins]))
        except ValueError as error:
            raise InputError(sources.folders[leader].where, f"{error}; slices: cannot bring the layers there") from None
    lists = [layer_lists(folder.where, folder.config) for folder in sources.folders]
    derived = (
        layer_lists(folder.where, folder.config | {"num_hidden_layers": len(origins)})
        for folder in sources.folders if not any(key in folder.config for key in LAYER_LISTS)
    )  # fmt: skip
    if _varies(lists) or _varies(derived):
        # Decoders derive a layer's kind from its number, which slices change.
        configs = [config | each for config, each in zip(configs, lists, strict=True)]
    config.update({key: configs[leader][key] for key in LAYER_LISTS if key in configs[leader]})

    def section_of(config: Mapping[str, Any], name: str) -> Any:
        return config if not name else config.get(name)

    def of_layer(model: int, name: str, key: str, layer: int) -> Any:
        section = section_of(configs[model], name)
        values = section.get(key) if isinstance(section, dict) else None
        if not isinstance(values, list) or layer >= len(values):
            where = sources.folders[model].path / "config.json"
            raise InputError(where, f"{key}: {values!r}; expected a list with an entry per layer")
        return values[layer]

    for name, _, depth in (key.rpartition(".") for key in depths):
        section = section_of(config, name)
        if not isinstance(section, dict):
            continue
        # A decoder's config may leave its depth to its class's default.
        possible_keys = section if name or architecture is None else architecture.keys
        if depth not in possible_keys or section.get(depth, layers) != layers:
            continue
        changed = {**section, depth: len(origins)}
        for key, value in section.items():
            if "layer" in key and isinstance(value, list) and len(value) == layers:
                changed[key] = [of_layer(model, name, key, i) for model, i in origins]
        config.update({name: changed} if name else changed)
        return
    raise InputError(
        sources.folders[leader].path / "config.json",
        f"does not say that there are {layers} layers (by {', '.join(depths)}); slices: cannot change their number",
    )


def _tokenizer_choice(recipe: RecipeFile, setting: TokenizerSetting, find: Find) -> TokenizerChoice:
    models = recipe.models

    def number(token: str, model: str) -> int:
        if model not in models:
            raise InputError(recipe.where, f"tokenizer.tokens.{token}: {model!r} is not a model of the recipe")
        return models.index(model)

    source: Any = setting.source
    if recipe.tokenizer_model is not None:
        source = find(
            f"{recipe.where}: {setting.key}", source, recipe.path.parent, weights=setting.approximation is not None
        )
    elif source not in ("union", "base"):
        source = models.index(source)
    if setting.approximation is not None and source in ("union", "base"):
        if source == "union":
            raise InputError(recipe.where, "tokenizer_source.of: union; expected base or a model, which has all tokens")
        source = 0 if recipe.base is None else models.index(recipe.base)
    rules = {
        token: TokenRule(None if rule.model is None else number(token, rule.model), rule.token, rule.force)
        for token, rule in setting.tokens.items()
    }
    base = None if recipe.base is None else models.index(recipe.base)
    return TokenizerChoice(source, base, rules, setting.pad_to_multiple_of, setting.approximation)


def _chat_template(recipe: RecipeFile, paths: list[Path]) -> str | None:
    """The Jinja template that the recipe asks for: its own, one by name, or the one that most of the models have."""
    wanted = recipe.chat_template
    if wanted is None:
        return None
    if "{" in wanted:
        try:
            check_template(wanted)
        except TemplateError as error:
            raise InputError(recipe.where, f"chat_template: not a Jinja template ({error})") from None
        return wanted
    if wanted in CHAT_TEMPLATES:
        return CHAT_TEMPLATES[wanted]
    if wanted != "auto":
        names = ", ".join(CHAT_TEMPLATES)
        raise InputError(recipe.where, f"chat_template: {wanted!r}; expected auto, {names} or a Jinja template")
    templates = [getattr(load_tokenizer(path), "chat_template", None) for path in paths]
    texts = [template.strip() for template in templates if isinstance(template, str)]
    return max(texts, key=texts.count) if texts else None


def merge_tensor(merge_plan: MergePlan, row: TensorPlan) -> np.ndarray:
    """One output tensor, measured, merged in float32 and cast to its output dtype. Raises InputError for values that
    are not finite."""
    method, sources = merge_plan.recipe.method, merge_plan.sources
    tensors = [sources.read(s, name) for s, name in row.inputs]
    dtype = merge_plan.specs[row.name].dtype
    # JAX has float64 only where it is enabled for the whole process; float64 holds a result in float32 exactly.
    computed = np.dtype(np.float32) if dtype == np.float64 else dtype
    try:
        if not is_float(tensors[0].dtype):
            return np.array(tensors[0])
        if not merge_plan.allow_nonfinite:
            for (s, name), values in zip(row.inputs, tensors, strict=True):
                if not is_finite(values):
                    where = sources.entry(s, name).file
                    raise InputError(where, f"{name} holds NaN or Inf; pass --allow-nonfinite to go on")
        scale = None if row.copied or method.copies is None else row.parameters[method.copies][0]
        if row.copied or scale == 1:
            return np.array(tensors[0], dtype)
        if row.gain_offset:
            gain = scale_gain(jnp.asarray(tensors[0]), jnp.float32(scale), row.gain_offset)
            merged = np.asarray(gain.astype(computed))
        else:
            seed = merge_plan.recipe.seed
            prepared = prepare_or_read(
                merge_kernels.prepare, method, row.options, sources, row.inputs, tensors, row.parameters, seed
            )
            merged = merge_kernels.combine_tensor(method, row.options, tensors, row.parameters, computed, prepared)
        merged = merged.astype(dtype, copy=False)
        if not merge_plan.allow_nonfinite and not is_finite(merged):
            raise InputError(
                merge_plan.recipe.where,
                f"{row.name}: the merge by {method.name} is not finite in {dtype} (weights that cancel, or values "
                "beyond its range?); "
                "pass --allow-nonfinite to go on",
            )
        return merged
    finally:
        for s, name in row.inputs:
            if not sources.has_rows(name):
                sources.release(s, name)


def merged_tensors(
    merge_plan: MergePlan, names: list[str], then: Callable[[str, np.ndarray], Any] = lambda name, merged: merged
) -> Iterator[Any]:
    """The merged tensors of these names, in their order, computed ahead of time by a few threads. then: (name, merged
    tensor) -> what is wanted of it, computed there as well."""
    by_name = {tensor_plan.name: tensor_plan for tensor_plan in merge_plan.rows}

    def make(name: str) -> Any:
        merged = merge_tensor(merge_plan, by_name[name]) if name in by_name else merge_plan.copied[name].load()
        return then(name, merged)

    waiting = deque(names)
    running: deque[Future[Any]] = deque()
    with ThreadPoolExecutor(WORKERS) as pool:
        try:
            while waiting or running:
                while waiting and len(running) < WORKERS + 2:
                    running.append(pool.submit(make, waiting.popleft()))
                yield running.popleft().result()
        finally:
            for future in running:
                future.cancel()


def merge_to(
    plan: WritableMerge,
    target: Path,
    *,
    card: str | None,
    recipe: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    overwrite: bool = False,
    check: Callable[[], None] = lambda: None,
    progress: Progress = lambda done: None,
) -> None:
    """Write the merged model as a folder that appears complete or not at all; see `atomic_folder`. `card` and `recipe`
    are the texts of the model's card and of its recipe, None: no such file."""
    with atomic_folder(target, overwrite=overwrite, check=check) as folder:
        plan.write(folder, progress, max_shard_bytes)
        for name, text in ((CARD, None if card is None else escaped_lines(card)), (RECIPE, recipe)):
            if text is not None:
                (folder / name).write_text(text, encoding="utf-8")
        write_marker(folder)


def write_weights(
    merge_plan: MergePlan, folder: Path, progress: Progress, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Merge all tensors, and write them as the safetensors files of a model folder. The merge of a single file is a
    single file as well, with the texts that stand beside its tensors; its hashes are left out, which are those of other
    tensors."""
    file, metadata = merge_plan.leader.path, PYTORCH
    if file.is_file():
        metadata = {key: text for key, text in read_metadata(file).items() if "hash" not in key}
        max_shard_bytes = sys.maxsize
    stem = next((stem for stem in STEMS if merge_plan.leader.files[0].name.startswith(stem)), STEMS[0])
    with ShardWriter(folder, merge_plan.specs, max_shard_bytes, stem, metadata) as writer:
        for name, tensor in zip(writer.order, merged_tensors(merge_plan, writer.order), strict=True):
            writer.write(name, tensor)
            progress(merge_plan.specs[name].nbytes)


def write_small_files(merge_plan: MergePlan, folder: Path) -> None:
    """Config, tokenizer and the settings of generation."""
    merged = [merge_plan.specs[tensor_plan.name].dtype for tensor_plan in merge_plan.rows]
    dtypes = {str(dtype) for dtype in merged if is_float(dtype)}
    dtype = {"dtype": dtypes.pop()} if len(dtypes) == 1 else {}

    def with_dtype(config: Mapping[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in config.items() if key != "torch_dtype" or not dtype} | dtype

    if merge_plan.config:
        # A larger model's config and its decoder's settings both name the dtype.
        config = with_dtype(merge_plan.leader.whole_config(with_dtype(merge_plan.config)))
        (folder / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    vocabulary = merge_plan.sources.vocabulary
    copied = [(merge_plan.generation_config, "a JSON file")]
    copied += [(merge_plan.leader.path / name, "a processor's settings") for name in PROCESSOR_FILES]
    source, template = merge_plan.tokenizer, merge_plan.chat_template
    united = None if vocabulary is None or vocabulary.copied is not None else vocabulary.tokenizer
    if source is not None and (united is not None or template is not None):
        tokenizer = load_tokenizer(source) if united is None else united
        if template is not None:
            tokenizer.chat_template = template
        tokenizer.save_pretrained(folder)
    elif source is not None:
        copied = [*((source / name, "a tokenizer's") for name in TOKENIZER_FILES), *copied]
    for file, what in copied:
        if file.exists():
            copy_regular(file, folder / file.name, what)
