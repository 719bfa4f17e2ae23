"""A merged model as a LoRA adapter of its base: the difference of each matrix, cut to a rank.

The best approximation of a difference `D [out, in]` by a matrix of rank r is its singular value decomposition with all
but the r largest singular values left out (Eckart & Young 1936): `D ≈ B A` with `A [r, in]`, `B [out, r]`. Norms and
biases, which are no matrices, go into the adapter as they are.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from evojax_merge.checkpoints.adapters import write_adapter
from evojax_merge.checkpoints.derived import reference_to
from evojax_merge.checkpoints.folder import is_float
from evojax_merge.checkpoints.writer import CARD, write_marker
from evojax_merge.errors import InputError, escaped_lines, shown
from evojax_merge.mergekit.execute import MergePlan, Progress, merged_tensors
from evojax_merge.mergekit.stages import StreamPlan
from evojax_merge.models.architecture import ROUTER, find_architecture, model_types
from evojax_merge.system.file_system import atomic_folder


@dataclass(frozen=True)
class RankError:
    """The error of leaving out singular values: the Frobenius norm of the omitted part, relative to the norm of the
    difference. total: over all matrices; worst: for the matrix `tensor`, which loses the largest share of its
    difference. changes_tied_head: whether the adapter changes an embedding that is the head as well."""

    total: float
    worst: float
    tensor: str
    changes_tied_head: bool

    def __str__(self) -> str:
        advice = (
            "; the embedding is the head as well, which peft changes only when the adapter is merged in "
            "(merge_and_unload)"
        )
        return (
            f"relative error of the difference to the base (Frobenius norm): {self.total:.2%}; "
            f"worst {self.worst:.2%}, {self.tensor}{advice if self.changes_tied_head else ''}"
        )


def low_rank_factors(difference: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """The factors `A float32[rank, in]` and `B float32[out, rank]` of the nearest matrix of that rank.

    difference: float `[out, in]`; a rank above its smaller side fills the factors up with zeros. The singular vectors
    are those of the smaller Gram matrix, in float64.
    """
    wide = difference.astype(np.float64)
    tall = wide.shape[0] >= wide.shape[1]
    # Eigenvalues come in ascending order.
    vectors = np.linalg.eigh(wide.T @ wide if tall else wide @ wide.T)[1][:, : -rank - 1 : -1]
    a, b = (vectors.T, wide @ vectors) if tall else (vectors.T @ wide, vectors)
    # The factors get equal norms, so that neither is lost in a narrow dtype.
    sizes = np.linalg.norm(b if tall else a, axis=0 if tall else 1)
    root = np.sqrt(np.where(sizes > 0, sizes, 1))
    a, b = (a * root[:, None], b / root) if tall else (a / root[:, None], b * root)
    more = rank - len(a)
    return np.pad(a, ((0, more), (0, 0))).astype(np.float32), np.pad(b, ((0, 0), (0, more))).astype(np.float32)


def prepare_adapter(stream_plan: StreamPlan, rank: int) -> Path:
    """The folder of a planned merge's base, for which the result will be an adapter. Raises InputError where the result
    cannot be one: the merge has no base that stays, or other tensors than the base; and for a rank that a matrix cannot
    have."""
    merge_plan = stream_plan.result
    recipe = merge_plan.recipe
    if recipe.base not in stream_plan.models:
        raise InputError(
            recipe.where, f"base_model: {shown(recipe.base)}; expected a model, of which the adapter will be, or "
            "--as model",
        )  # fmt: skip
    base = merge_plan.base
    architecture = base.architecture
    if architecture is None:
        kind = shown(base.config.get("model_type"))
        raise InputError(
            base.path,
            f"model_type is {kind}, of which no adapter can be written; expected one of {', '.join(model_types())}",
        )
    if architecture.no_adapter:
        raise InputError("--as adapter", f"{architecture.model_type}: {architecture.no_adapter}; expected --as model")
    leader = merge_plan.leader
    if recipe.components:
        raise InputError(recipe.where, "components: an adapter of a text decoder has no projector; expected --as model")
    if leader.other_modules and leader.path != base.path:
        raise InputError(
            recipe.where, f"other_modules: those of {leader.path}, and the base is {base.path}; an adapter changes no "
            "modules but the base's: expected other_modules: base",
        )  # fmt: skip
    for name, tensor in _decoder_tensors(merge_plan).items():
        spec, entry = merge_plan.specs[name], base.entries.get(tensor)
        if entry is None or entry.shape != spec.shape:
            actual = "no such tensor" if entry is None else f"{list(entry.shape)}"
            raise InputError(
                recipe.where, f"the merge has {name} {list(spec.shape)}, and the base {base.path} {actual}; an adapter "
                "changes neither tokens nor layers",
            )  # fmt: skip
        if len(spec.shape) > 2:
            raise InputError("--as adapter", f"{name} has shape {list(spec.shape)}; expected matrices and vectors")
        leaf = architecture.leaf_of(tensor)
        routes = leaf is not None and leaf.component == ROUTER
        if len(spec.shape) == 2 and min(spec.shape) < rank and not routes:
            raise InputError(
                "--rank", f"{rank}; expected at most {min(spec.shape)}, the smaller side of {name} {list(spec.shape)}"
            )
    return base.path


def _decoder_tensors(merge_plan: MergePlan) -> dict[str, str]:
    """The tensors that are merged: their names in the merged model's files -> those of the architecture."""
    leader = merge_plan.leader
    return {name: leader.names.of_architecture(name) for name in merge_plan.specs if name not in leader.other_modules}


def write_as_adapter(
    merge_plan: MergePlan,
    target: Path,
    *,
    rank: int,
    card: str,
    describe: Callable[[str, RankError], str],
    overwrite: bool = False,
    check: Callable[[], None] = lambda: None,
    progress: Progress = lambda done: None,
) -> RankError:
    """Merge, and write the difference to the base as an adapter folder that appears complete or not at all.
    `prepare_adapter` has to accept the merge first. describe: makes the adapter's card from the merge's card and the
    error."""
    base, tensors = merge_plan.base, _decoder_tensors(merge_plan)
    architecture = find_architecture(base.config["model_type"])
    leaves = {tensor: architecture.leaf_of(tensor) for tensor in tensors.values()}
    factors: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    replaced: dict[str, np.ndarray] = {}
    # For each matrix that differs, the norms of what a low rank leaves out, and of the difference.
    errors: dict[str, tuple[float, float]] = {}
    of_mixtures: set[str] = set()
    names = list(tensors)
    with atomic_folder(target, overwrite=overwrite, check=check) as folder:
        # Other modules are the base's.
        progress(merge_plan.nbytes - sum(merge_plan.specs[name].nbytes for name in names))
        for name, merged in zip(names, merged_tensors(merge_plan, names), strict=True):
            leaf, base_values = leaves[tensors[name]], base.read(tensors[name])
            key = base.in_memory(tensors[name])
            differs = is_float(base_values.dtype) and not np.array_equal(
                merged.astype(np.float32), base_values.astype(np.float32)
            )
            # In memory the experts of a layer are one parameter, for which PEFT wants all factors, or none.
            if leaf is not None and (leaf.has_experts or leaf.component == ROUTER):
                of_mixtures.add(key)
            if base_values.ndim == 2 and (differs or key in of_mixtures):
                difference = merged.astype(np.float32) - base_values.astype(np.float32)
                difference = difference.T if leaf is not None and leaf.transposed else difference
                a, b = factors[key] = low_rank_factors(difference, rank)
                if differs:
                    errors[key] = float(np.linalg.norm(difference - b @ a)), float(np.linalg.norm(difference))
            elif differs:
                replaced[key] = merged
            base.entries[tensors[name]].release()
            progress(merge_plan.specs[name].nbytes)
        if errors.keys().isdisjoint(of_mixtures):
            factors = {key: pair for key, pair in factors.items() if key not in of_mixtures}
        if not errors:
            raise InputError(target, f"no matrix of the merge differs from {base.path}; an adapter would be empty")
        embeddings = {base.in_memory(leaf.tensor) for leaf in architecture.leaves if leaf.component == "embedding"}
        transposed = any(leaf.transposed for leaf in architecture.leaves)
        write_adapter(folder, reference_to(base.path), rank, factors, replaced, embeddings, transposed)
        embedding = base.in_memory(merge_plan.sources.token_tensors.embedding)
        tied = bool(base.config.get("tie_word_embeddings", False))
        shares = {name: left_out / whole for name, (left_out, whole) in errors.items()}
        worst = max(shares, key=shares.__getitem__)
        left_out, whole = (math.hypot(*values) for values in zip(*errors.values(), strict=True))
        error = RankError(left_out / whole, shares[worst], worst, embedding in errors and tied)
        (folder / CARD).write_text(escaped_lines(describe(card, error)), encoding="utf-8")
        write_marker(folder)
    return error
