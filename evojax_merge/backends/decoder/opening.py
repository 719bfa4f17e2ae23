"""Opening a search's language models by their headers: its mistakes are found here, cheapest first."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from merge_kernels import Method

from evojax_merge.backends.backend import Resolve
from evojax_merge.backends.decoder.backend import DecoderBackend, DecoderModels, stored_dtype
from evojax_merge.backends.decoder.kinds.kind import Candidates
from evojax_merge.backends.decoder.kinds.layer_path import PathCandidates
from evojax_merge.backends.decoder.kinds.member import PoolCandidates
from evojax_merge.backends.decoder.kinds.merge import MergeCandidates
from evojax_merge.backends.decoder.placements import BankPlace, Room, bank_place
from evojax_merge.backends.decoder.vision import seeing_tokenizer, vision_of
from evojax_merge.checkpoints.bank import bank_bytes
from evojax_merge.checkpoints.config_file import decoder_settings
from evojax_merge.checkpoints.decoder_folder import PROJECTOR, DecoderFolder, decoder_of, decoder_with_projector
from evojax_merge.checkpoints.folder import Folder
from evojax_merge.checkpoints.json_files import read_json_object
from evojax_merge.checkpoints.parents import OpenDecoder, Sources, open_decoders, open_sources
from evojax_merge.checkpoints.pipelines import MERGE
from evojax_merge.checkpoints.tokens import TokenizerChoice, load_tokenizer
from evojax_merge.config.search_config import MAX_PATH_LAYERS, Config, DataFlowConfig, PoolConfig, SpaceConfig
from evojax_merge.errors import InputError, did_you_mean, shown
from evojax_merge.evaluation.targets import Target
from evojax_merge.mergekit.schema import check_parent_count
from evojax_merge.models.architecture import ROUTER, architecture_of, shared_leaves
from evojax_merge.models.bank import MergeSpec
from evojax_merge.models.config import DecoderConfig
from evojax_merge.models.paths import PathSpec
from evojax_merge.report.comparison import model_names
from evojax_merge.schema.genealogy import founding_genealogy
from evojax_merge.search.kept_scores import TEXT_KINDS
from evojax_merge.spaces.breeding import PARENTS, BreedingSpace, genome_genes
from evojax_merge.spaces.layer_path import IndicatorSpace, MoveSpace, PathSpace, ScaleBounds
from evojax_merge.spaces.parameter import ParameterSpace, component_groups
from evojax_merge.spaces.search_parameters import (
    check_active,
    find_method,
    options_of,
    parent_groups_of,
    search_parameters_of,
)
from evojax_merge.system.torch_note import leave_torch_out
from evojax_merge.tasks.task import TaskConfig
from evojax_merge.zoo.references import recipe_reference, resolve_reference

# Keys of the configs of models that take more of transformers than text models do.
SENSES = frozenset({"vision_config", "audio_config"})


def _is_text_task(section: TaskConfig) -> bool:
    return getattr(section, "kind", None) in TEXT_KINDS and getattr(section, "images", None) is None


def _is_text_model(path: Path) -> bool:
    return SENSES.isdisjoint(read_json_object(path / "config.json", missing={}))


class DecoderFactory:
    """Language models: Hugging Face folders, GGUF files, adapters."""

    merges_recipes = True

    def check(self, where: str, config: Config) -> None:
        if config.evaluation.recalibrate:
            raise InputError(where, "evaluation.recalibrate: language models have no batch norms; leave it out")
        if config.space is not None:
            method = find_method(f"{where}: space.method", config.space.method)
            check_models(where, method, config.base is not None, len(config.parents))
        if config.pool is not None:
            breeding_methods(where, config, config.pool)

    def open(
        self, where: str, config: Config, folder: Path, target: Target, resolve: Resolve, chained: bool
    ) -> DecoderBackend:
        method = None if config.space is None else find_method(f"{where}: space.method", config.space.method)
        bred_by = () if config.pool is None else breeding_methods(where, config, config.pool)
        base = None if config.base is None else resolve(f"{where}: base", config.base, folder)
        parents = tuple(resolve(f"{where}: parents[{i}]", parent, folder) for i, parent in enumerate(config.parents))
        check_distinct(where, base, parents, config.parents, first=1 if chained else 0)
        references = {
            path: recipe_reference(reference, path)
            for reference, path in zip([config.base, *config.parents], [base, *parents], strict=True)
            if reference is not None and path is not None
        }
        merges_by = bred_by if method is None else (method,)
        has_base = any(merge_method.uses_base(base is not None) for merge_method in merges_by)
        paths = [base, *parents] if base is not None and has_base else list(parents)
        tokenizer_dir = None
        if config.tokenizer_source is not None:
            tokenizer_dir = (
                base
                if config.tokenizer_source == "base"
                else resolve(f"{where}: tokenizer_source", config.tokenizer_source, folder)
            )
            if tokenizer_dir is None or tokenizer_dir not in [base, *parents]:
                raise InputError(where, "tokenizer_source: expected base or one of the parents")
            if tokenizer_dir not in paths and (method is None or method.base_is_first_parent):
                # The base_model of its recipe is one of the parents.
                what = "a layer path" if method is None else method.name
                raise InputError(where, f"tokenizer_source: the base takes no part in {what}; take one of the parents")
        # A base that takes no part in the merge is opened all the same, to be checked against the parents.
        unmerged_base = [base] if base is not None and base not in paths else []
        opened = [*paths, *unmerged_base]
        if not config.plugins and all(map(_is_text_task, config.tasks)) and all(map(_is_text_model, opened)):
            leave_torch_out()
        tokenizer_choice = None if tokenizer_dir is None else TokenizerChoice(opened.index(tokenizer_dir))
        # Layers of a path may come from models of any depth.
        open_all = open_decoders if config.data_flow else _of_one_depth
        open_decoder = merged_parts(where, config)
        sources, configs = open_all(opened, tokenizer_choice, open_decoder)
        all_folders = sources.folders
        other_modules = _other_modules(where, config, folder, all_folders, base, parents)
        _check_tokens(opened, sources, other_modules)
        if None not in (other_modules, tokenizer_dir) and tokenizer_dir != other_modules:
            raise InputError(
                where, f"tokenizer_source: expected {other_modules}, whose other modules the winner has: its images "
                "have tokens of its own",
            )  # fmt: skip
        sources = replace(sources, folders=sources.folders[: len(paths)])
        candidates = _candidates(
            where, config, method, bred_by, has_base, sources, tuple(configs[: len(paths)]),
            None if base is None else references[base], tuple(references[parent] for parent in parents), target,
        )  # fmt: skip
        # The winner's generation_config.json is the first model's, or that of the model whose ends a path keeps; a
        # pool's member may have that of any.
        leaders = {0, 0 if config.data_flow is None else config.data_flow.embedding_parent}
        for number in leaders if config.pool is None else range(len(sources.folders)):
            read_json_object(sources.folders[number].path / "generation_config.json", missing={})
        tokenizer_folder = tokenizer_dir or (base if base is not None else parents[0])
        kept = next((opened_folder for opened_folder in all_folders if opened_folder.path == other_modules), None)
        tokenizer = seeing_tokenizer(load_tokenizer(tokenizer_folder), kept)
        models = DecoderModels(
            base=base,
            parents=parents,
            references=references,
            sources=sources,
            decoder=configs[0],
            tokenizer=tokenizer,
            tokenizer_folder=tokenizer_folder,
            other_modules=other_modules,
            context=context_length(sources.folders, configs[0].positions),
            stop=stop_tokens(tokenizer_folder, tokenizer),
            vision=vision_of(tokenizer, all_folders),
            open_decoder=open_decoder,
        )
        return DecoderBackend(config, models, candidates, target)


def _candidates(
    where: str, config: Config, method: Method | None, bred_by: tuple[Method, ...], has_base: bool, sources: Sources,
    configs: tuple[DecoderConfig, ...], base: str | None, names: tuple[str, ...], target: Target,
) -> Candidates:  # fmt: skip
    """The kind of candidates that a config asks for. base, names: the references of the base and the parents."""
    decoder, export_dtype = configs[0], config.export_dtype or stored_dtype(sources, 0)
    if method is not None and config.space is not None:
        space = build_space(f"{where}: space", config.space, method, config.parents, decoder)
        spec = MergeSpec(
            method.name,
            options_of(f"{where}: space", method, has_base, config.space.normalize, config.space.rescale),
            config.seed,
            export_dtype,
            tuple((name, values) for name, values in space.constants if not method.parameter(name).searched),
        )
        merges = MergeCandidates(space=space, spec=spec, sources=sources, decoder=decoder, base=base, parents=names)
        return merges.placed_at(_place(where, config, merges, decoder, target))
    if config.pool is not None:
        _check_heads(where, sources)
        genes = genome_genes(bred_by, config.pool.split)
        breeding = BreedingSpace(bred_by, decoder.layers, config.pool.split, founding_genealogy(len(names), genes))
        size = config.pool.members(len(names))
        pooled = PoolCandidates(
            space=breeding, sources=sources, decoder=decoder, has_base=has_base, base=base if has_base else None,
            founders=names, member_dtype=export_dtype, seed=config.seed, slots=config.pool.slots or size, size=size,
        )  # fmt: skip
        room = Room(_model_bytes(sources, decoder), pooled.host_bytes(), pooled.host_bytes())
        return pooled.placed_at(bank_place(where, config.evaluation.bank, target, room, config.evaluation.model))
    assert config.data_flow is not None
    path_spec = PathSpec(configs, export_dtype)
    path_space = build_path_space(f"{where}: data_flow", config.data_flow, path_spec)
    paths = PathCandidates(space=path_space, spec=path_spec, sources=sources, parents=names)
    return paths.placed_at(_place(where, config, paths, decoder, target))


def _place(where: str, config: Config, candidates: Candidates, decoder: DecoderConfig, target: Target) -> BankPlace:
    """The place of the models of a config, which candidates hold all of."""
    models = candidates.loaded_bytes()
    room = Room(models + _model_bytes(candidates.sources, decoder), 0, models)
    return bank_place(where, config.evaluation.bank, target, room, config.evaluation.model)


def _model_bytes(sources: Sources, decoder: DecoderConfig) -> int:
    return bank_bytes(sources, decoder) // len(sources.folders)


def check_distinct(where: str, base: Path | None, parents: Sequence[Path], names: Sequence[str], first: int) -> None:
    """Raises InputError where a model is named twice, by whatever path: it would have two weights, or none. Checks the
    parents from the number `first` on."""
    named = {} if base is None else {base: "base"}
    for i, parent in enumerate(parents[first:], first):
        if parent in named:
            raise InputError(where, f"parents[{i}]: {names[i]} is {named[parent]} already; expected models that differ")
        named[parent] = f"parents[{i}]"


def _other_modules(
    where: str,
    config: Config,
    folder: Path,
    opened: Sequence[DecoderFolder],
    base: Path | None,
    parents: Sequence[Path],
) -> Path | None:
    """The model whose other modules the winner has: the one that the config names, else the base or the first parent
    that has any. None where all are decoders alone. Raises InputError for a model that is not in the search, or that
    has no other modules."""
    models = [*parents] if base is None else [base, *parents]
    larger = [opened_folder.path for opened_folder in opened if opened_folder.other_modules]
    if config.other_modules is None:
        return next((model for model in models if model in larger), None)
    named = base if config.other_modules == "base" else None
    if config.other_modules != "base":
        named = resolve_reference(f"{where}: other_modules", config.other_modules, folder)
    if named is None or named not in models:
        raise InputError(where, "other_modules: expected base or one of the parents")
    if named not in larger:
        raise InputError(where, f"other_modules: {named} is a text decoder alone; expected a larger model")
    return named


def merged_parts(where: str, config: Config) -> OpenDecoder:
    """Takes the merged parts out of a folder: its text decoder, with the projector where the config merges it. Raises
    InputError for other components."""
    for name, source in (config.components or {}).items():
        if (name, source) != (PROJECTOR, MERGE):
            raise InputError(
                where, f"components: {name}: {source}; expected {PROJECTOR}: {MERGE} beside the text decoder; "
                "other_modules names the model that all else is from",
            )  # fmt: skip
    if config.components and config.space is None:
        raise InputError(where, f"components: {PROJECTOR} is merged by a space alone; leave it out")
    return decoder_with_projector if config.components else decoder_of


def _of_one_depth(
    paths: Sequence[Path], tokenizer: TokenizerChoice | None, open_decoder: OpenDecoder
) -> tuple[Sources, list[DecoderConfig]]:
    sources, config = open_sources(paths, tokenizer, open_decoder)
    return sources, [config] * len(paths)


def build_path_space(where: str, config: DataFlowConfig, spec: PathSpec) -> PathSpace:
    """The data-flow space of a config. Raises InputError for an end that no parent has, or an impossible path."""
    depths = tuple(decoder.layers for decoder in spec.configs)
    if config.embedding_parent >= len(depths):
        raise InputError(
            where,
            f"embedding_parent: there is no parent {config.embedding_parent} "
            f"(they are numbered from 0 to {len(depths) - 1})",
        )
    bounds = ScaleBounds(config.scale_low, config.scale_high)
    if config.max_layers is not None and config.max_layers < depths[0]:
        raise InputError(where, f"max_layers: {config.max_layers}; the first parent has {depths[0]} layers already")
    if config.form == "moves":
        max_length = config.max_layers or 2 * depths[0]
        return MoveSpace(
            depths,
            config.moves,
            min(config.window, depths[0]),
            bounds,
            config.scales != "none",
            max_length,
            config.embedding_parent,
        )
    places = sum(depths) * config.repetitions
    if places > MAX_PATH_LAYERS:
        raise InputError(
            where,
            f"repetitions: {config.repetitions} times {sum(depths)} layers are paths of up to {places:,}; expected "
            f"{MAX_PATH_LAYERS // sum(depths)} repetitions at most, for paths of {MAX_PATH_LAYERS:,}",
        )
    max_length = config.max_layers or places
    return IndicatorSpace(
        depths, config.repetitions, config.scales or "matrix", bounds, max_length, config.embedding_parent
    )


def _check_tokens(folders: Sequence[Path], sources: Sources, other_modules: Path | None) -> None:
    """Raises InputError where a model of a search lacks a token: a made-up row would be searched like a trained one. A
    text model beside a larger one may lack the tokens that were added to the larger one's, such as that of images."""
    vocabulary = sources.vocabulary
    if vocabulary is None or not vocabulary.fills:
        return
    for folder, rows in zip(folders, vocabulary.rows, strict=True):
        added = () if other_modules is None else vocabulary.tokenizer.added_tokens_decoder
        missing = np.array([token for token in np.flatnonzero(rows < 0) if token not in added])
        if missing.size:
            token = vocabulary.tokenizer.convert_ids_to_tokens(int(missing[0]))
            raise InputError(
                folder, f"lacks {missing.size} of the tokens (such as {shown(token)}); cannot align its rows"
            )


def check_models(where: str, method: Method, has_base: bool, parents: int) -> None:
    """Raises InputError for a base that is missing, and for a number of parents that the method cannot merge."""
    if method.base == "required" and not has_base:
        raise InputError(where, f"base: missing; {method.name} takes task vectors from a base model")
    check_parent_count(f"{where}: parents", method, parents)


def parameter_space(path: Path, config: Config) -> tuple[ParameterSpace, list[str]] | None:
    """The parameter space of a config, and what its parents are called in tables; None where it searches something
    else. Opens the first parent's headers alone."""
    if config.space is None:
        return None
    names = [f"{path}: parents[{k}]" for k in range(len(config.parents))]
    parents = [resolve_reference(name, one, path.parent) for name, one in zip(names, config.parents, strict=True)]
    _, decoder = open_sources(parents[:1], open_decoder=merged_parts(str(path), config))
    method = find_method(f"{path}: space.method", config.space.method)
    return build_space(f"{path}: space", config.space, method, config.parents, decoder), model_names(parents)


def breeding_methods(where: str, config: Config, pool: PoolConfig) -> tuple[Method, ...]:
    """The methods that breed a pool's children. Raises InputError for methods that cannot, and for a pool of one
    model."""
    if len(config.parents) < PARENTS:
        raise InputError(where, f"parents: 1 model; a pool breeds from {PARENTS} or more")
    if config.tokenizer_source is not None:
        raise InputError(
            where, "tokenizer_source: a pool's models share their tokens; merge each with the tokenizer first, or "
            "leave it out",
        )  # fmt: skip
    methods = []
    for i, name in enumerate(pool.methods):
        key = f"{where}: pool.methods[{i}]"
        method = find_method(key, name)
        check_parent_count(key, method, PARENTS)
        if method.base == "required" and config.base is None:
            raise InputError(where, f"base: missing; {name} (pool.methods[{i}]) takes task vectors from a base model")
        if method in methods:
            raise InputError(key, f"{name} stands there already; expected methods that differ")
        methods.append(method)
    return tuple(methods)


def _check_heads(where: str, sources: Sources) -> None:
    """Raises InputError where some of a pool's models share their head with the embedding and others do not."""
    tied = [bool(folder.config.get("tie_word_embeddings", False)) for folder in sources.folders]
    if any(tied) and not all(tied):
        paths = [sources.folders[tied.index(is_tied)].path for is_tied in (True, False)]
        raise InputError(
            where, f"parents: the head of {paths[0]} is its embedding (tie_word_embeddings), that of {paths[1]} is "
            "not; a pool breeds models that are alike in this",
        )  # fmt: skip


def build_space(
    where: str, config: SpaceConfig, method: Method, parents: Sequence[str], decoder: DecoderConfig
) -> ParameterSpace:
    """The parameter space of a config. parents: their names in the config. Raises InputError for unknown parameters and
    parents, and for meaningless bounds."""
    shared = [leaf.name for leaf in architecture_of(decoder).shared if leaf.component != PROJECTOR]
    components = architecture_of(decoder).components
    named = [name.strip() for part in config.components for name in part.split("+")]
    # A router that is not named has parameters of its own, like shared leaves.
    alone = [ROUTER] if ROUTER in components and ROUTER not in named else []
    groups = component_groups([*config.components, *alone], components, shared)
    if groups is None:
        unknown = [
            f"{name!r}{did_you_mean(name, [*components, *shared])}"
            for name in named
            if name not in {*components, *shared}
        ]
        wrong = unknown[0] if unknown else str(config.components)
        raise InputError(where, f"components: {wrong}; expected each of {', '.join(components)} once (join with +)")
    parent_groups = parent_groups_of(where, config.parent_groups, parents)
    search_parameters, constants = search_parameters_of(
        where, method, len(parents), config.parameters, config.fixed, parent_groups
    )
    projector = tuple(leaf.name for leaf in shared_leaves(decoder) if leaf.component == PROJECTOR)
    groups = (*groups, projector) if projector else groups
    together = config.layers_per_group
    space = ParameterSpace(
        method=method,
        parents=len(parents),
        layers=decoder.layers,
        layers_per_group=decoder.layers if together == "all" else min(together, decoder.layers),
        names=components,
        components=groups,
        shared=tuple(leaf.name for leaf in shared_leaves(decoder)),
        search_parameters=search_parameters,
        constants=constants,
        smooth=config.smooth,
        parent_groups=parent_groups,
        active=config.active,
    )
    check_active(where, config.active, space)
    return space


def context_length(folders: Sequence[Folder], positions: int | None = None) -> int:
    """The most tokens that all of these models take: no model is asked for positions that it was not trained on.
    positions: the number of embedded positions; None: positions are not embedded."""
    trained = min(int(folder.config.get("max_position_embeddings") or 2**30) for folder in folders)
    return trained if positions is None else min(trained, positions)


def stop_tokens(folder: Path, tokenizer: Any) -> tuple[int, ...]:
    """The token ids that end a generation: of generation_config.json, else of config.json, and the tokenizer's own.

    Raises InputError where a file gives anything but ids of the model's vocabulary; other keys of the files are not
    read.
    """
    eos_ids: set[int] = set() if tokenizer.eos_token_id is None else {int(tokenizer.eos_token_id)}
    for name in ("generation_config.json", "config.json"):
        document = read_json_object(folder / name, missing={})
        ids = document.get("eos_token_id", decoder_settings(document).get("eos_token_id"))
        if ids is None:
            continue
        ids = ids if isinstance(ids, list) else [ids]
        settings = decoder_settings(read_json_object(folder / "config.json", missing={}))
        rows = settings.get("vocab_size", len(tokenizer))
        for token_id in ids:
            if not isinstance(token_id, int) or isinstance(token_id, bool) or not 0 <= token_id < rows:
                raise InputError(
                    folder / name,
                    f"eos_token_id: {shown(token_id)}; expected a token id from 0 to {rows - 1}, or a list of them",
                )
        return tuple(sorted(eos_ids | set(ids)))
    return tuple(sorted(eos_ids))


FACTORY = DecoderFactory()
