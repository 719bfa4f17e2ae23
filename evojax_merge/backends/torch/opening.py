"""Opening a search's networks: their folders, and the groups of tensors that share parameters."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evojax_merge.backends.backend import Resolve
from evojax_merge.backends.function.backend import tree_facts
from evojax_merge.backends.function.opening import (
    FOREIGN_IN_SPACE,
    check_config,
    model_path,
    tree_merge,
)
from evojax_merge.backends.function.trees import open_trees
from evojax_merge.checkpoints.network_checks import check_labels
from evojax_merge.checkpoints.pipelines import Pipeline, choose_components, is_pipeline, open_component
from evojax_merge.config.search_config import Config, EvaluationConfig, SpaceConfig
from evojax_merge.errors import InputError
from evojax_merge.evaluation.targets import Target
from evojax_merge.spaces.parameter import component_groups
from evojax_merge.spaces.search_parameters import method_with_base
from evojax_merge.system.console import say_once
from evojax_merge.system.user_modules import reference_from_anywhere
from evojax_merge.zoo.references import recipe_reference

if TYPE_CHECKING:
    from evojax_merge.backends.torch.backend import TorchBackend
    from evojax_merge.backends.torch.pipelines import PipelineBackend

# The keys of a space that only language models have; diffusers folders have components.
FOREIGN_KEYS = tuple(name for name in FOREIGN_IN_SPACE if name not in ("layers_per_group", "components"))
COMPONENTS = SpaceConfig.model_fields["components"].default
# The group of a whole Sequential.
TOP = "top level"
# The sentences on candidates that are more than a merge of their recipes.
MEASURED = (
    "Batch norms were measured anew on the search's examples. A merge of this recipe has those of its models, merged, "
    "and other scores; `evojax-merge export` writes the run's model."
)
SENTENCES = (
    "A recipe merges no modules of sentence transformers, such as dense ones; `evojax-merge export` writes the run's "
    "model."
)


@dataclass(frozen=True)
class TorchFactory:
    """Opens networks in folders that transformers opens (`backend: torch`), or state dicts of a module that `make`
    makes (`backend: FILE.py:make`)."""

    make: Callable[[], Any] | None = None

    def merges_recipes(self, config: Mapping[str, Any]) -> bool:
        return False

    def check(self, where: str, config: Config) -> None:
        check_config(where, config, "networks are", FOREIGN_KEYS)
        self._check_torch(f"{where}: backend")

    def _check_torch(self, where: str) -> None:
        if find_spec("torch") is None:
            raise InputError(where, "torch: needs PyTorch; pip install 'evojax-merge[torch]'")

    def open(
        self, where: str, config: Config, folder: Path, target: Target, resolve: Resolve, chained: bool
    ) -> "TorchBackend | PipelineBackend":
        # The first import of torch takes seconds: a search over other models goes without.
        from evojax_merge.backends.torch.backend import SENTENCE_TRANSFORMERS, TorchBackend
        from evojax_merge.backends.torch.folders import (
            OwnModules,
            architecture,
            differences,
            merged_tensors,
            open_module,
            open_network,
            save_merge,
            to_arrays,
        )
        from evojax_merge.backends.torch.network import measures, torchax_environment

        assert config.space is not None
        _, has_base = method_with_base(
            f"{where}: space.method", config.space.method, config.base is not None, len(config.parents)
        )
        named = [("base", config.base)] if config.base is not None else []
        named += [(f"parents[{k}]", parent) for k, parent in enumerate(config.parents)]
        own_modules = None if self.make is None else OwnModules(f"{where}: backend", config.backend, self.make)
        find = resolve if own_modules is None else model_path
        paths = {key: find(f"{where}: {key}", one, folder) for key, one in named if one is not None}
        keys = [key for key in paths if has_base or key != "base"]
        pipelines = [key for key in keys if own_modules is None and is_pipeline(paths[key])]
        if pipelines:
            if len(pipelines) < len(keys):
                other = next(key for key in keys if key not in pipelines)
                raise InputError(
                    f"{where}: {other}", f"is no diffusers folder, as {pipelines[0]} is; expected one kind"
                )
            return _open_pipelines(self, where, config, target, has_base, named, paths)
        in_space = "components" in config.space.model_fields_set
        for key, is_given in (("components", config.components is not None), ("space.components", in_space)):
            if is_given:
                raise InputError(where, f"{key}: is for diffusers folders, and {keys[0]} is none")
        if own_modules is None:
            classes = {key: architecture(paths[key]) for key in keys}
            for key, name in classes.items():
                if name != classes[keys[0]]:
                    raise InputError(f"{where}: {key}", f"is a {name}, but {keys[0]} is a {classes[keys[0]]}")
        open_one, write = (open_module, save_merge) if own_modules is None else (own_modules.open, own_modules.save)
        say_once("opening the models by PyTorch")
        modules = [open_one(paths[key]) for key in keys]
        if own_modules is None:
            _check_labels(where, dict(zip(keys, modules, strict=True)))
        if config.evaluation.recalibrate and not any(map(measures, modules[0].modules())):
            raise InputError(
                where, f"evaluation.recalibrate: {type(modules[0]).__name__} has no batch norm; leave it out"
            )
        tree = open_trees(where, keys, [to_arrays(merged_tensors(module)) for module in modules])
        groups = layer_groups(config.space.layers_per_group)
        merge = tree_merge(f"{where}: space", tree, config.space, has_base, groups, config.seed)
        references = {key: recipe_reference(str(one), paths[key]) for key, one in named}
        document = {
            "base": references.get("base"),
            "parents": [references[f"parents[{k}]"] for k in range(len(config.parents))],
            "space": {
                key: value for key, value in config.space.model_dump(mode="json").items()
                if key not in (*FOREIGN_KEYS, "components")
            },
        } | ({} if own_modules is None else {"backend": reference_from_anywhere(config.backend, folder)})  # fmt: skip
        models = [paths[key] for key in keys]

        def save(weights: Any, out: Path) -> None:
            write(weights, models[0], out)

        environment, _ = torchax_environment()
        has_sentences = hasattr(modules[0], "encode")
        is_traceable = environment is not None and not config.evaluation.recalibrate
        facts = tree_facts(
            merge, models, [references[key] for key in keys], config.evaluation, target, self, resolved=document,
            warnings=differences(models), has_derivatives=is_traceable,
            beyond_recipe=MEASURED if config.evaluation.recalibrate else SENTENCES if has_sentences else "",
        )  # fmt: skip
        library = "transformers" if hasattr(modules[0], "save_pretrained") else "pytorch"
        library = SENTENCE_TRANSFORMERS if has_sentences else library
        return TorchBackend(facts, merge, save, library, network=open_network(modules[0]))

    def open_stored(
        self, where: str, name: str, path: Path, settings: EvaluationConfig, target: Target
    ) -> "TorchBackend | PipelineBackend":
        """A backend over one model alone, for its scores. name: the backend's, in the file `where`."""
        self._check_torch(where)
        space = SpaceConfig(method="linear", layers_per_group="all")
        # A stored model's batch norms are measured already.
        settings = settings.model_copy(update={"recalibrate": False})
        config = Config.model_construct(
            backend=name, parents=[str(path)], space=space, evaluation=settings, tasks=[]
        )  # fmt: skip
        return self.open(where, config, path.parent, target, lambda *_: path, False)


def _check_labels(where: str, modules: Mapping[str, Any]) -> None:
    """Raises InputError where two classifiers have other labels: a merge has one head."""
    (first, expected), *others = ((key, module.config.id2label) for key, module in modules.items())
    for key, labels in others:
        if len(labels) != len(expected):
            raise InputError(
                f"{where}: {key}", f"has {len(labels)} labels, but {first} has {len(expected)}; expected the labels of "
                f"{first}, in the same order",
            )  # fmt: skip
        check_labels(f"{where}: {key}", labels, first, expected)


def _open_pipelines(
    factory: TorchFactory, where: str, config: Config, target: Target, has_base: bool,
    named: Sequence[tuple[str, str | None]], paths: Mapping[str, Path],
) -> "PipelineBackend":  # fmt: skip
    """The backend of diffusers folders. named, paths: the references and the folders of the base and the parents, by
    their keys in the config."""
    if find_spec("diffusers") is None:
        raise InputError(f"{where}: backend", "torch: needs diffusers; pip install 'evojax-merge[diffusion]'")
    from evojax_merge.backends.torch.folders import to_arrays
    from evojax_merge.backends.torch.generator import (
        KINDS,
        block_groups,
        open_generator,
        save_generator,
        tensors_of,
    )
    from evojax_merge.backends.torch.pipelines import PipelineBackend

    assert config.space is not None
    parts = config.space.components
    kinds = component_groups(["+".join(KINDS)] if parts == COMPONENTS else parts, KINDS)
    if kinds is None:
        raise InputError(
            where, f"space.components: {', '.join(parts)}; expected {' and '.join(KINDS)}, apart or joined with +"
        )
    keys = [key for key in paths if has_base or key != "base"]
    references = [str(reference) for key, reference in named if key in keys]
    folders = [Pipeline(paths[key]) for key in keys]
    components = choose_components(f"{where}: components", folders, references, config.components or {})
    modules = [{name: open_component(folder, name) for name in components.merged} for folder in folders]
    tree = open_trees(where, keys, [to_arrays(tensors_of(one)) for one in modules])
    groups = block_groups(list(tensors_of(modules[0])), config.space.layers_per_group, kinds)
    merge = tree_merge(f"{where}: space", tree, config.space, has_base, groups.__getitem__, config.seed)
    absolute = {key: recipe_reference(str(reference), paths[key]) for key, reference in named if key in paths}
    by_reference = {str(reference): absolute[key] for key, reference in named if key in paths}
    document = {
        "base": absolute.get("base"),
        "parents": [absolute[f"parents[{k}]"] for k in range(len(config.parents))],
        "components": {name: by_reference.get(one, one) for name, one in (config.components or {}).items()},
        "space": {
            key: value for key, value in config.space.model_dump(mode="json").items()
            if key not in (*FOREIGN_KEYS, *(["components"] if parts == COMPONENTS else []))
        },
    }  # fmt: skip

    def save(weights: Any, out: Path) -> None:
        save_generator(components, weights, out)

    facts = tree_facts(
        merge, [paths[key] for key in keys], [absolute[key] for key in keys], config.evaluation, target, factory,
        resolved=document, warnings=components.notes, has_derivatives=False,
    )  # fmt: skip
    generator = open_generator(components, modules[0])
    return PipelineBackend(facts, merge, save, "diffusers", generator=generator, components=components)


def layer_groups(together: int | str) -> Callable[[str], str]:
    """A tensor's name -> the name of its group: `together` neighbouring modules of the first numbered list on the way
    to it (all: the whole list), or else the first two modules on the way. The list of the top level, which a network
    that is a Sequential has, counts where there is no other on the way."""

    def group_of(name: str) -> str:
        modules = name.split(".")[:-1]
        numbers = [i for i, part in enumerate(modules) if re.fullmatch("[0-9]{1,9}", part)]
        if not numbers:
            return ".".join(modules[:2]) or name
        number = next(filter(None, numbers), 0)
        above = modules[:number]
        if together == "all":
            return ".".join(above) or TOP
        first = int(modules[number]) // int(together) * int(together)
        return ".".join([*above, str(first) if together == 1 else f"{first}-{first + int(together) - 1}"])

    return group_of


FACTORY = TorchFactory()
