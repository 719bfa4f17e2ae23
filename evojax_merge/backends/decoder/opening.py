"""Opening a search's language models by their headers: its mistakes are found here, cheapest first."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from merge_kernels import Method

from evojax_merge.backends.backend import Resolve
from evojax_merge.backends.decoder.backend import DecoderBackend, DecoderModels, stored_dtype
from evojax_merge.backends.decoder.kinds import kind_module, kind_of
from evojax_merge.backends.decoder.kinds.kind import Candidates, OpenedParents
from evojax_merge.backends.decoder.placements import bank_place
from evojax_merge.backends.decoder.vision import seeing_tokenizer, vision_of
from evojax_merge.checkpoints.bank import bank_bytes
from evojax_merge.checkpoints.config_file import decoder_settings, trained_positions
from evojax_merge.checkpoints.decoder_folder import PROJECTOR, DecoderFolder, decoder_of, decoder_with_projector
from evojax_merge.checkpoints.folder import Folder
from evojax_merge.checkpoints.json_files import read_json_object
from evojax_merge.checkpoints.parents import OpenDecoder, Sources, open_decoders, open_sources
from evojax_merge.checkpoints.pipelines import MERGE
from evojax_merge.checkpoints.tokens import TokenizerChoice, chat_template, load_tokenizer
from evojax_merge.config.search_config import Config
from evojax_merge.errors import InputError, shown
from evojax_merge.evaluation.targets import Target
from evojax_merge.mergekit.calibration import with_moments
from evojax_merge.report.comparison import model_names
from evojax_merge.schema.approximation import Approximation
from evojax_merge.search.kept_scores import TEXT_KINDS
from evojax_merge.system.without_torch import leave_torch_out
from evojax_merge.zoo.references import recipe_reference, resolve_file, resolve_reference

# The share of its tokens whose rows a merged model may take from the others.
MOST_FILLED = 0.1
# Keys of the configs of models that take more of transformers than text models do.
SENSES = frozenset({"vision_config", "audio_config"})


class DecoderFactory:
    """Language models: Hugging Face folders, GGUF files, adapters."""

    def merges_recipes(self, config: Mapping[str, Any]) -> bool:
        kinds = (kind for key, kind in Config.kinds.items() if config.get(key) is not None)
        # All stages of a chain are merges or layer paths.
        return kind_module(next(kinds, "merge")).MERGES_RECIPES

    def check(self, where: str, config: Config) -> None:
        if config.evaluation.recalibrate:
            raise InputError(where, "evaluation.recalibrate: language models have no batch norms; leave it out")
        kind_of(config).methods_of(where, config)

    def open(
        self, where: str, config: Config, folder: Path, target: Target, resolve: Resolve, chained: bool
    ) -> DecoderBackend:
        kind = kind_of(config)
        methods: tuple[Method, ...] = kind.methods_of(where, config)
        base = None if config.base is None else resolve(f"{where}: base", config.base, folder)
        parents = tuple(resolve(f"{where}: parents[{i}]", parent, folder) for i, parent in enumerate(config.parents))
        check_distinct(where, base, parents, config.parents, first=1 if chained else 0)
        references = {
            path: recipe_reference(reference, path)
            for reference, path in zip([config.base, *config.parents], [base, *parents], strict=True)
            if reference is not None and path is not None
        }
        takes_base = kind.TAKES_BASE and base is not None
        has_base = takes_base or any(method.uses_base(base is not None) for method in methods)
        paths = [base, *parents] if base is not None and has_base else list(parents)
        tokenizer_dir, approximation = _tokenizer_source(where, config, folder, resolve, base, parents)
        if tokenizer_dir not in [None, *paths] and all(method.base_is_first_parent for method in methods):
            # The base_model of its recipe is one of the parents.
            what = methods[0].name if methods else "a layer path"
            raise InputError(where, f"tokenizer_source: the base takes no part in {what}; take one of the parents")
        # A base that takes no part in the merge is opened all the same, to be checked against the parents.
        unmerged_base = [base] if base is not None and base not in paths else []
        opened = [*paths, *unmerged_base]
        if _takes_texts_alone(config, opened):
            leave_torch_out()
        tokenizer_choice = None
        if tokenizer_dir is not None:
            # A row that a model lacks is filled as `merge` fills it by the recipe, whose base_model comes first here.
            first = 0 if has_base or any(method.base_is_first_parent for method in methods) else None
            tokenizer_choice = TokenizerChoice(opened.index(tokenizer_dir), first, approximation=approximation)
        open_decoder = merged_parts(where, config)
        if methods or kind.TAKES_BASE:
            sources, decoder = open_sources(opened, tokenizer_choice, open_decoder)
            configs = [decoder] * len(opened)
        else:
            # The parents of layer paths may differ in their depth.
            sources, configs = open_decoders(opened, tokenizer_choice, open_decoder)
        all_folders = sources.folders
        other_modules = _other_modules(where, config, folder, all_folders, base, parents, resolve)
        # The recipe of a layer path need not have all models, nor that of a merge the base.
        fills = config.space is not None and not unmerged_base
        filled = _check_tokens(opened, sources, other_modules, MOST_FILLED if fills else 0.0)
        tokenizer_folder = tokenizer_dir or (base if base is not None else parents[0])
        templates = _other_templates(tokenizer_folder, parents, config)
        if None not in (other_modules, tokenizer_dir) and tokenizer_dir != other_modules:
            raise InputError(
                where, f"tokenizer_source: expected {other_modules}, whose other modules the winner has: its images "
                "have tokens of its own",
            )  # fmt: skip
        warnings = (*sources.warnings, *filled, *templates)
        sources = replace(sources, folders=sources.folders[: len(paths)], warnings=warnings)
        if config.space is not None:
            notes: list[str] = []
            merged = range(int(has_base), len(paths))
            sources = with_moments(
                where, config.calibration, methods[0], sources, merged, folder, resolve_file, notes.append
            )
            sources = replace(sources, warnings=(*sources.warnings, *notes))
        elif config.calibration is not None:
            raise InputError(where, "calibration: is for a space whose method looks at prompts; leave it out")
        opened_parents = OpenedParents(
            where, config, sources, tuple(configs[: len(paths)]), config.export_dtype or stored_dtype(sources, 0),
            has_base, None if base is None else references[base], tuple(references[parent] for parent in parents),
        )  # fmt: skip
        candidates: Candidates = kind.open_candidates(opened_parents)
        model_bytes = bank_bytes(sources, configs[0]) // len(sources.folders)
        place = bank_place(where, config.evaluation.bank, target, candidates.room(model_bytes), config.evaluation.model)
        # Models that may be on the devices alone are there, and the plan says whether they fit.
        place = place if place in candidates.places else candidates.places[0]
        for number in candidates.config_sources():
            read_json_object(sources.folders[number].path / "generation_config.json", missing={})
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
        return DecoderBackend(config, models, candidates.placed_at(place), target)


def _tokenizer_source(
    where: str, config: Config, folder: Path, resolve: Resolve, base: Path | None, parents: Sequence[Path]
) -> tuple[Path | None, Approximation | None]:
    """The model whose tokenizer the config names, None where it names none, and how the rows of tokens that a model
    lacks are made. Raises InputError for a model that is not in the search."""
    source = config.tokenizer_source
    approximation, wanted = (source, source.of) if isinstance(source, Approximation) else (None, source)
    if wanted is None:
        return None, None
    named = base if wanted == "base" else resolve(f"{where}: tokenizer_source", wanted, folder)
    if named is None or named not in [base, *parents]:
        raise InputError(where, "tokenizer_source: expected base or one of the parents")
    return named, approximation


def _takes_texts_alone(config: Config, models: Sequence[Path]) -> bool:
    """Return whether neither the tasks of a config nor its models have pictures or sounds, so that nothing needs
    torch."""
    only_texts = all(
        getattr(section, "kind", None) in TEXT_KINDS and getattr(section, "images", None) is None
        for section in config.tasks
    )
    configs = (read_json_object(path / "config.json", missing={}) for path in models)
    return not config.plugins and only_texts and all(map(SENSES.isdisjoint, configs))


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
    resolve: Resolve,
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
        named = resolve(f"{where}: other_modules", config.other_modules, folder)
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


def _check_tokens(
    folders: Sequence[Path], sources: Sources, other_modules: Path | None, most_filled: float
) -> list[str]:
    """A warning for each model of a search that lacks tokens, as a base lacks those that its fine-tunes have added.
    Raises InputError where it lacks more than a share `most_filled` of them: rows of other models would be searched
    like trained ones. A text model beside a larger one may lack the tokens that were added to the larger one's, such as
    that of images."""
    vocabulary, warnings = sources.vocabulary, list[str]()
    if vocabulary is None or not vocabulary.fills:
        return warnings
    for folder, rows in zip(folders, vocabulary.rows, strict=True):
        added = () if other_modules is None else vocabulary.tokenizer.added_tokens_decoder
        missing = np.array([token for token in np.flatnonzero(rows < 0) if token not in added])
        if not missing.size:
            continue
        token = vocabulary.tokenizer.convert_ids_to_tokens(int(missing[0]))
        lacks = f"lacks {missing.size:,} of the {len(rows):,} tokens (such as {shown(token)})"
        if missing.size > most_filled * len(rows):
            raise InputError(
                folder, f"{lacks}; expected tokenizer_source: {{of: MODEL, approximate: omp}}, which makes rows of "
                "tokens that a model lacks, or the tokens of another model",
            )  # fmt: skip
        warnings.append(f"{folder}: {lacks}; it takes their rows from the models that have them")
    return warnings


def _other_templates(folder: Path, parents: Sequence[Path], config: Config) -> list[str]:
    """A warning where tasks are chats, nobody chose a tokenizer, and parents have another chat template than the folder
    whose tokenizer a search takes."""
    are_chats = any(getattr(task, "apply_chat_template", False) for task in config.tasks)
    if not are_chats or config.tokenizer_source is not None:
        return []
    pairs = zip(config.parents, parents, strict=True)
    others = [name for name, path in pairs if chat_template(path) not in (None, chat_template(folder))]
    if not others:
        return []
    return [
        f"{folder}: chats are written in its template, and answers end at its tokens; {', '.join(others)}: another "
        f"template{'' if config.pool else f', which tokenizer_source: {others[0]} takes'}"
    ]


def parameter_space(path: Path, config: Config) -> tuple[Any, list[str]] | None:
    """The space of a config whose genes have names, and what its parents are called in tables; None where genes have
    none. Opens the first parent's headers alone."""
    named_space = kind_of(config).named_space
    if named_space is None:
        return None
    names = [f"{path}: parents[{k}]" for k in range(len(config.parents))]
    parents = [resolve_reference(name, one, path.parent) for name, one in zip(names, config.parents, strict=True)]
    _, decoder = open_sources(parents[:1], open_decoder=merged_parts(str(path), config))
    return named_space(str(path), config, decoder), model_names(parents)


def context_length(folders: Sequence[Folder], positions: int | None = None) -> int:
    """The most tokens that all of these models take: no model is asked for positions that it was not trained on.
    positions: the number of embedded positions; None: positions are not embedded."""
    trained = min(trained_positions(folder.config) for folder in folders)
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
