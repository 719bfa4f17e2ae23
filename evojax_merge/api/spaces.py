"""Models of one kind, and the spaces of their merges. A space and its models are checked where the space is made."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from evojax_merge import plugins
from evojax_merge.api.python_calls import Location, PythonCall, genome_array, plain_data
from evojax_merge.api.trials import named_values_of
from evojax_merge.backends.decoder.kinds.merge import build_space, check_models
from evojax_merge.backends.registry import find_backend
from evojax_merge.checkpoints.parents import open_decoders
from evojax_merge.checkpoints.tokens import TokenizerChoice
from evojax_merge.config.documents import parse
from evojax_merge.config.search_config import SpaceConfig
from evojax_merge.errors import InputError, shown
from evojax_merge.models.config import DecoderConfig
from evojax_merge.problem import config_from, open_backend
from evojax_merge.report.comparison import model_names
from evojax_merge.report.described import Described, Table, parameter_table
from evojax_merge.schema.approximation import Approximation
from evojax_merge.schema.arguments import check_arguments
from evojax_merge.spaces.search_parameters import find_method, options_of
from evojax_merge.tasks.python_trees import PythonTree, hold_tree
from evojax_merge.zoo.references import resolve_reference

# Stands for the tasks where a space is opened without any.
_NO_TASKS = [{"name": "task", "kind": "likelihood", "file": "tasks.jsonl"}]


@dataclass(frozen=True, repr=False)
class Models(Described):
    """Models of one kind for a search to merge, which `load_models` opens. base, parents: their names in a config;
    folders: the parents' files or folders; base_folder: the base's; decoder: the architecture's config, of language
    models, depths: the number of layers of each, the base's first; backend: what the models are, by its name; held: the
    pytrees in memory that names stand for."""

    base: str | None
    parents: tuple[str, ...]
    base_folder: Path | None
    folders: tuple[Path, ...]
    decoder: DecoderConfig | None = None
    depths: tuple[int, ...] = ()
    tokenizer_source: str | dict[str, Any] | None = None
    other_modules: str | None = None
    backend: str = "decoder"
    held: tuple[PythonTree, ...] = field(default=(), compare=False)

    @property
    def names(self) -> list[str]:
        """The parents' names in tables."""
        return model_names(self.folders)

    def document(self) -> dict[str, Any]:
        """The models' keys of a config."""
        keys = {
            "base": self.base, "parents": list(self.parents), "tokenizer_source": self.tokenizer_source,
            "other_modules": self.other_modules, "backend": None if self.backend == "decoder" else self.backend,
        }  # fmt: skip
        return {key: value for key, value in keys.items() if value is not None}

    def facts(self) -> dict[str, Any]:
        base = None if self.base_folder is None else model_names([self.base_folder])[0]
        if self.decoder is None:
            return {"base": base, "parents": self.names, "backend": self.backend}
        return {"base": base, "parents": self.names, "layers": self.decoder.layers}


def load_models(
    base: Any,
    parents: Sequence[Any] | Mapping[str, Any],
    *,
    tokenizer_source: Location | Mapping[str, Any] | None = None,
    other_modules: Location | None = None,
    backend: str | None = None,
) -> Models:
    """Open models for a search: language models by their headers alone, or pytrees.

    base: the model that task vectors are taken from, or None. base, parents: folders, GGUF files, hub ids, adapters
    (`base+adapter`) or `zoo:` names, where relative paths start in the working directory; or pytrees of arrays of one
    structure, the parents also by their names: `{"maths": pytree, …}`. tokenizer_source, other_modules: as in a config.
    backend: what the models are, as in a config; None: language models, or pytrees where these are given.
    """
    check_arguments(load_models, locals())
    plugins.load()
    if backend is not None:
        find_backend("load_models: backend", backend, Path.cwd())
    if isinstance(parents, str):
        raise InputError("load_models: parents", f"{shown(parents)}; expected a list or a tuple")
    if not parents:
        raise InputError("load_models: parents", "is empty; expected models to merge")
    named = [("base", base)] * (base is not None)
    if isinstance(parents, Mapping) and isinstance(base, Mapping) and parents.keys() == base.keys():
        raise InputError(
            "load_models: parents", "has the keys of the base; a mapping gives parents names, {name: pytree, …}; "
            "expected a list of pytrees",
        )  # fmt: skip
    if isinstance(parents, Mapping):
        of_parents = list(parents.items())
        for name, parent in of_parents:
            if isinstance(parent, str | PathLike):
                raise InputError("load_models: parents", f"name {shown(parent)}; expected a list of paths or names")
            if not name.isidentifier() or name == "base":
                raise InputError("load_models: parents", f"{shown(name)}; expected names of letters, digits and _")
    else:
        of_parents = [(f"parents[{k}]", parent) for k, parent in enumerate(parents)]
    named += of_parents
    pytrees = [(key, model) for key, model in named if not isinstance(model, str | PathLike)]
    for key, model in pytrees:
        if hasattr(model, "state_dict"):
            raise InputError(
                f"load_models: {key}", f"is a {type(model).__name__}, a module of torch; expected its folder or file, "
                'with backend="torch" or backend="FILE.py:NAME", a function that makes the module',
            )  # fmt: skip
    if backend is None and pytrees and len(pytrees) < len(named):
        key, model = pytrees[0]
        raise InputError(f"load_models: {key}", f"{shown(model)}; expected a path or a name, as other models have")
    if backend is None and not pytrees:
        return _language_models(base, [parent for _, parent in of_parents], tokenizer_source, other_modules)
    held = {key: hold_tree(f"load_models: {key}", key, model) for key, model in pytrees}
    names = {key: held[key].reference if key in held else str(model) for key, model in named}
    paths = {key: _file(name) for key, name in names.items()}
    parent_names = tuple(names[key] for key, _ in of_parents)
    parent_paths = tuple(paths[key] for key, _ in of_parents)
    return Models(
        names.get("base"), parent_names, paths.get("base"), parent_paths, backend=backend or "function",
        held=tuple(held.values()),
    )  # fmt: skip


def _file(reference: str) -> Path:
    """The file or folder of a reference, or the reference itself where it names none."""
    path = Path.cwd() / os.path.expanduser(reference)
    return path.resolve() if os.path.exists(path) else Path(reference)


def _language_models(
    base: Location | None, parents: Sequence[Location], tokenizer_source: Location | Mapping[str, Any] | None,
    other_modules: Location | None,
) -> Models:  # fmt: skip
    where, root = "load_models", Path.cwd()
    base_name = None if base is None else str(base)
    names = tuple(map(str, parents))
    base_folder = None if base_name is None else resolve_reference(f"{where}: base", base_name, root)
    folders = tuple(resolve_reference(f"{where}: parents[{k}]", name, root) for k, name in enumerate(names))
    opened, choice = [*([] if base_folder is None else [base_folder]), *folders], None
    how: Approximation | None = None
    if isinstance(tokenizer_source, Mapping):
        how = parse(f"{where}: tokenizer_source", dict(tokenizer_source), Approximation)
    tokenizer = None if tokenizer_source is None else str(tokenizer_source) if how is None else how.of
    if tokenizer is not None:
        folder = (
            base_folder if tokenizer == "base" else resolve_reference(f"{where}: tokenizer_source", tokenizer, root)
        )
        if folder not in opened:
            raise InputError(f"{where}: tokenizer_source", f"{tokenizer}; expected base or one of the parents")
        choice = TokenizerChoice(opened.index(folder), approximation=how)
    _, decoders = open_decoders(opened, choice)
    other = None if other_modules is None else str(other_modules)
    depths = tuple(decoder.layers for decoder in decoders)
    return Models(
        base_name,
        names,
        base_folder,
        folders,
        decoders[0],
        depths,
        tokenizer if how is None else how.model_dump(),
        other,
    )


class Space(Described):
    """The candidates that a search chooses from. models: whose merges they are; method: the name of their merge method,
    or of the kind of the space."""

    models: Models
    method: str
    _space: Any
    _document: dict[str, Any]

    @property
    def dims(self) -> int:
        """D, the number of genes of a genome."""
        return int(self._space.dims)

    @property
    def start(self) -> np.ndarray:
        """float32[D]: the genome with which a search begins."""
        return np.asarray(self._space.start)

    def parameters(self, genome: Any) -> dict[str, float]:
        """The searched parameters that a genome float32[D] stands for: `weight[layers 0-3 attention][maths]` -> value,
        and so forth; `gene[0]` and so forth where the space has no named parameters."""
        values = self.named_values(genome_array("genome", genome, (self.dims,))[None])
        return {name: float(column[0]) for name, column in values.items()}

    def named_values(self, genomes: np.ndarray) -> Mapping[str, np.ndarray]:
        """The searched parameters of genomes float32[P, D] by their names, float[P] each."""
        return named_values_of(self._space, genomes, self.models.names)

    def document(self) -> dict[str, Any]:
        """The space's key of a config."""
        return self._document

    def facts(self) -> dict[str, Any]:
        return {"method": self.method, "parents": self.models.names, "dimensions": self.dims}

    def tables(self) -> dict[str, Table]:
        named = hasattr(self._space, "named_values")
        return {"start": parameter_table(self.parameters(self.start))} if named else {}

    def _open(self, section: Mapping[str, Any]) -> None:
        """Open the space of the models' backend by the key of a config that says which space it is."""
        where = type(self).__name__
        self._document = plain_data(where, section)
        document = self.models.document() | self._document | {"tasks": _NO_TASKS}
        with PythonCall():
            self._space = open_backend(Path(where), config_from(Path(where), document, [], None)).facts.space


class MergeSpace(Space):
    """The parameters of a merge that a search optimises. keys: the keys of a config's `space`, such as
    `layers_per_group`, `components`, `parameters` and `fixed`."""

    def __init__(self, models: Models, method: str, **keys: Any) -> None:
        check_arguments(MergeSpace.__init__, locals())
        plugins.load()
        self.models, self.method = models, method
        if models.decoder is None:
            self._open({"space": {"method": method, **keys}})
            return
        # Without the models' tokenizers.
        where = "MergeSpace"
        section: dict[str, Any] = plain_data(where, {"method": method, **keys})
        self._document = {"space": section}
        config: SpaceConfig = parse(Path(where), section, SpaceConfig)
        chosen, has_base = find_method(f"{where}: method", method), models.base is not None
        if chosen.looks_at:
            raise InputError(f"{where}: method", f"{method} looks at prompts, which a config's calibration names")
        check_models(where, chosen, has_base, len(models.parents))
        if len(set(models.depths)) > 1:
            what = f"have {', '.join(map(str, models.depths))} layers; a merge expects one depth, a LayerPathSpace any"
            raise InputError(f"{where}: models", what)
        options_of(where, chosen, chosen.uses_base(has_base), config.normalize, config.rescale)
        self._space = build_space(where, config, chosen, models.parents, models.decoder)

    @property
    def groups(self) -> list[str]:
        """The groups of tensors that share their parameters."""
        return list(self._space.groups)

    def facts(self) -> dict[str, Any]:
        searched = [parameter.name for parameter in self._space.search_parameters]
        return {
            "method": self.method, "parents": self.models.names, "parameters": searched, "groups": len(self.groups),
            "dimensions": self.dims,
        }  # fmt: skip


class _SectionSpace(Space):
    """A space that the section `method` of a config describes, by its keys."""

    def __init__(self, models: Models, **keys: Any) -> None:
        check_arguments(_SectionSpace.__init__, locals(), type(self).__name__)
        plugins.load()
        self.models = models
        self._open({self.method: keys})


class LayerPathSpace(_SectionSpace):
    """Paths through the layers of all parents. keys: the keys of a config's `data_flow`, such as `form` and `moves`."""

    method = "data_flow"


class MixtureSpace(_SectionSpace):
    """Mixtures of experts out of the parents' MLPs. keys: the keys of a config's `mixture`, such as
    `positive_prompts`."""

    method = "mixture"


class PoolSpace(_SectionSpace):
    """Members of a pool of models that breed, the parents and merges of two members each. keys: the keys of a config's
    `pool`, such as `methods` and `size`."""

    method = "pool"
