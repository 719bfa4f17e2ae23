"""Pytrees with a low-rank change, scored by the programs that score merges."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from evojax_merge.backends.backend import Adaptable
from evojax_merge.backends.function.programs import Programs, TreeEvaluator
from evojax_merge.backends.function.trees import Tree
from evojax_merge.models.adapted import LowRankLayout, layout_of
from evojax_merge.search.protocols import Progress
from evojax_merge.tasks.arrays import ArrayTask
from evojax_merge.tasks.python_trees import shown_path


@dataclass(frozen=True, eq=False)
class AdaptedTree:
    """Changes of one tree, in the form of a merge: (its leaves, float32[D]) -> the changed tree. names: of the leaves;
    layout: of changes of the same rank or another."""

    tree: Tree
    names: tuple[str, ...]
    layout: LowRankLayout

    def __call__(self, leaves: Sequence[Any], vector: jax.Array) -> Any:
        layout = self.layout.of_dims(len(vector))
        pairs, shapes = layout.split(vector), dict(layout.matrices)

        def changed(name: str, leaf: Any) -> Any:
            if name not in pairs:
                return leaf
            matrix = jnp.asarray(leaf).reshape(shapes[name])
            return layout.changed(name, matrix, pairs[name]).reshape(leaf.shape).astype(leaf.dtype)

        return self.tree.structure.unflatten(map(changed, self.names, leaves))


@dataclass(frozen=True)
class ChangeEvaluator(TreeEvaluator):
    """Scores changes of one tree."""

    def evaluate(self, genomes: np.ndarray, progress: Progress = lambda done: None) -> Any:
        # Programs are compiled for the numbers of candidates of a search.
        programs = replace(self.programs, population=len(genomes))
        return TreeEvaluator(self.tasks, self.bank, programs).evaluate(genomes, progress)


def adaptable_tree(
    tree: Tree, number: int, splits: Sequence[list[ArrayTask]], programs: Programs, rank: int, scale: float,
    as_matrix: Callable[[tuple[int, ...]], tuple[int, ...]],
) -> Adaptable:  # fmt: skip
    """A source of a tree, to be changed by low rank. as_matrix: (a leaf's shape) -> its shape as matrices `(…, out,
    in)`."""
    names, leaves = tuple(map(shown_path, tree.paths)), list(tree.columns[number])
    shapes = {
        name: as_matrix(np.shape(leaf))
        for name, leaf, of_all in zip(names, leaves, tree.leaves, strict=True)
        if of_all.merged and np.ndim(leaf) > 1
    }
    layout = layout_of(shapes.items(), rank, scale)
    spread = {
        name: float(np.sqrt(np.mean(np.square(np.asarray(leaf, np.float32)))))
        for name, leaf in zip(names, leaves, strict=True)
        if name in layout.shapes
    }
    programs = replace(programs, merge=AdaptedTree(tree, names, layout), _compiled={}, _apart={}, _warm=set())
    return Adaptable(layout, spread, [ChangeEvaluator(tasks, leaves, programs) for tasks in splits])
