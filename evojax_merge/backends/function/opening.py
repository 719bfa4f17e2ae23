"""Opening a search's pytrees: their files, and the space of their merges."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from evojax_merge.backends.backend import Resolve
from evojax_merge.backends.function.backend import FunctionBackend, tree_facts
from evojax_merge.backends.function.trees import Tree, TreeMerge, group_labels, open_trees
from evojax_merge.config.search_config import Config, SpaceConfig
from evojax_merge.errors import InputError
from evojax_merge.evaluation.targets import Target
from evojax_merge.models.bank import MergeSpec
from evojax_merge.spaces.parameter import GroupSpace
from evojax_merge.spaces.search_parameters import method_with_base, options_of, search_parameters_of
from evojax_merge.system.user_modules import reference_from_anywhere
from evojax_merge.tasks.arrays import read_npz
from evojax_merge.tasks.python_functions import is_reference
from evojax_merge.tasks.python_trees import find_tree, is_key, shown_path

# The winner's file in its folder.
PARAMS = "params.safetensors"
# The keys of a config, and of its space, that only language models have.
FOREIGN = ("tokenizer_source", "other_modules", "calibration", *list(Config.kinds)[1:], "stages", "export_dtype")
FOREIGN_IN_SPACE = ("layers_per_group", "components", "smooth", "parent_groups", "active")


def load_tree(path: Path) -> Any:
    """The pytree of a safetensors or .npz file, or of a folder with `params.safetensors`: nested dicts, divided at / or
    else . in the names. Raises InputError for any other file."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    file = path / PARAMS if path.is_dir() else path
    if file.suffix == ".npz":
        arrays = read_npz(file)
    elif file.suffix == ".safetensors":
        try:
            arrays = load_file(file)
        except (OSError, SafetensorError, json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
            raise InputError(file, f"is no safetensors file ({error})") from None
    else:
        raise InputError(path, f"expected a .safetensors or .npz file, or a folder with {PARAMS}")
    tree: dict[str, Any] = {}
    for name, array in arrays.items():
        *above, last = name.split("/" if "/" in name else ".")
        place = tree
        for key in above:
            place = place.setdefault(key, {})
            if not isinstance(place, dict):
                raise InputError(file, f"{name}: {key} is an array and a group of arrays; rename one of them")
        if last in place:
            raise InputError(file, f"{name}: stands twice; rename one of them")
        place[last] = array
    return tree


def save_tree(tree: Any, folder: Path) -> None:
    """Write a pytree into a folder as `params.safetensors`, its leaves by their paths, without keys of random
    numbers."""
    from safetensors.numpy import save_file

    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    arrays = {
        shown_path(path) or "params": np.ascontiguousarray(np.asarray(leaf))
        for path, leaf in leaves
        if not is_key(leaf)
    }
    save_file(arrays, folder / PARAMS)


def tree_merge(
    where: str, tree: Tree, config: SpaceConfig, has_base: bool, groups: Callable[[str], str] | None, seed: int
) -> TreeMerge:
    """The merges of a tree's sources by a config's method. Raises InputError for a method, parameters or groups that
    cannot be."""
    parents = len(tree.columns) - has_base
    method, _ = method_with_base(where, config.method, has_base, parents)
    labels = group_labels(where, tree.paths, groups)
    search_parameters, constants = search_parameters_of(where, method, parents, config.parameters, config.fixed)
    kinds = tuple(dict.fromkeys(label for label, leaf in zip(labels, tree.leaves, strict=True) if leaf.merged))
    if not kinds:
        raise InputError(where, "parents: hold no floating-point array to merge")
    fixed = tuple((name, values) for name, values in constants if not method.parameter(name).searched)
    options = options_of(where, method, has_base, config.normalize, config.rescale)
    space = GroupSpace(method, parents, kinds, search_parameters, constants)
    return TreeMerge(tree, tuple(labels), space, MergeSpec(config.method, options, seed, "float32", fixed))


@dataclass(frozen=True)
class FunctionFactory:
    """Models that are pytrees of arrays, for `register_backend`. load: a model's file or folder -> its pytree; save:
    (pytree, folder) -> None, writes the winner; groups: a leaf's path ("encoder/0/kernel") -> the name of the group
    whose parameters it shares (None: a group for each module of the top level)."""

    load: Callable[[Path], Any] = load_tree
    save: Callable[[Any, Path], None] = save_tree
    groups: Callable[[str], str] | None = None

    def merges_recipes(self, config: Mapping[str, Any]) -> bool:
        return False

    def check(self, where: str, config: Config) -> None:
        if config.evaluation.recalibrate:
            raise InputError(where, "evaluation.recalibrate: is for backend: torch; leave it out")
        check_config(where, config, "pytrees are", FOREIGN_IN_SPACE)

    def open(
        self, where: str, config: Config, folder: Path, target: Target, resolve: Resolve, chained: bool
    ) -> FunctionBackend:
        assert config.space is not None
        _, has_base = method_with_base(
            f"{where}: space.method", config.space.method, config.base is not None, len(config.parents)
        )
        named = [("base", config.base)] if config.base is not None else []
        named += [(f"parents[{k}]", parent) for k, parent in enumerate(config.parents)]
        paths = {key: model_path(f"{where}: {key}", reference, folder) for key, reference in named if reference}
        keys = [key for key in paths if has_base or key != "base"]
        tree = open_trees(where, keys, [self._load(f"{where}: {key}", paths[key]) for key in keys])
        merge = tree_merge(f"{where}: space", tree, config.space, has_base, self.groups, config.seed)
        document = {
            "base": None if config.base is None else str(paths["base"]),
            "parents": [str(paths[f"parents[{k}]"]) for k in range(len(config.parents))],
            "space": {
                key: value for key, value in config.space.model_dump(mode="json").items() if key not in FOREIGN_IN_SPACE
            },
            "backend": reference_from_anywhere(config.backend, folder),
        }
        models = [paths[key] for key in keys]
        facts = tree_facts(merge, models, list(map(str, models)), config.evaluation, target, self, resolved=document)
        return FunctionBackend(facts, merge, self.save)

    def _load(self, where: str, path: Path) -> Any:
        return find_tree(where, str(path)) if is_reference(str(path)) else self.load(path)


def check_config(where: str, config: Config, what: str, foreign_in_space: Sequence[str]) -> None:
    """Raises InputError for keys of language models, and for a method that the models do not fit. what: the models, as
    in "pytrees are"; foreign_in_space: the keys of `space` that only language models have."""
    for name in FOREIGN:
        if getattr(config, name) is not None:
            raise InputError(where, f"{name}: is for language models; backend: {config.backend} searches a space")
    assert config.space is not None
    for name in foreign_in_space:
        if getattr(config.space, name) != SpaceConfig.model_fields[name].default:
            raise InputError(f"{where}: space", f"{name}: is for language models; leave it out")
    if config.evaluation.model != 1:
        raise InputError(where, f"evaluation.model: {config.evaluation.model}; {what} whole on each device")
    method_with_base(f"{where}: space.method", config.space.method, config.base is not None, len(config.parents))


def model_path(where: str, reference: str, folder: Path) -> Path:
    """The file or folder of a model, where a relative path starts in `folder`; the reference itself for a pytree that a
    Python program has given. Raises InputError where there is none."""
    if is_reference(reference):
        return Path(reference)
    path = folder / os.path.expanduser(reference)
    if not os.path.exists(path):
        raise InputError(where, f"{reference}: no such file or folder")
    return path.resolve()


FACTORY = FunctionFactory()
