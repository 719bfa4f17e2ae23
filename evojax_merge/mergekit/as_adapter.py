"""A merged model as a LoRA adapter of its base: the difference of each matrix, cut to a rank.

The best approximation of a difference `D [out, in]` by a matrix of rank r is its singular value decomposition with all
but the r largest singular values left out (Eckart & Young 1936): `D ≈ B A` with `A [r, in]`, `B [out, r]`. What is no
matrix (norms, biases) goes into the adapter as it is.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from evojax_merge.checkpoints.adapters import write_adapter
from evojax_merge.checkpoints.decoder_folder import DecoderFolder
from evojax_merge.checkpoints.derived import reference_to
from evojax_merge.checkpoints.folder import is_float
from evojax_merge.checkpoints.writer import CARD, atomic_folder, write_marker
from evojax_merge.errors import InputError, shown
from evojax_merge.mergekit.execute import MergePlan, Progress, merged_tensors
from evojax_merge.mergekit.stages import StreamPlan
from evojax_merge.models.architecture import known_architecture, model_types

# Architectures with other modules than linear ones and one embedding: GPT-2 has weights `[in, out]`, and an embedding
# for each position.
OTHER_MODULES = ("gpt2",)


@dataclass(frozen=True)
class RankError:
    """What leaving out singular values costs: the Frobenius norm of what is left out, relative to that of the
    difference. total: over all matrices; worst: of the matrix `tensor`, which loses most of its own difference.
    changes_tied_head: whether the adapter changes an embedding that is the head as well."""

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

    difference: float `[out, in]`, with rank at most its smaller side. The singular vectors are those of the smaller
    Gram matrix, in float64.
    """
    wide = difference.astype(np.float64)
    tall = wide.shape[0] >= wide.shape[1]
    # Eigenvalues come in ascending order.
    vectors = np.linalg.eigh(wide.T @ wide if tall else wide @ wide.T)[1][:, : -rank - 1 : -1]
    a, b = (vectors.T, wide @ vectors) if tall else (vectors.T @ wide, vectors)
    # Both of a size, so that neither is lost in a narrow dtype.
    sizes = np.linalg.norm(b if tall else a, axis=0 if tall else 1)
    root = np.sqrt(np.where(sizes > 0, sizes, 1))
    a, b = (a * root[:, None], b / root) if tall else (a / root[:, None], b * root)
    return a.astype(np.float32), b.astype(np.float32)


def prepare_adapter(stream_plan: StreamPlan, rank: int) -> None:
    """Raises InputError where the result of a planned merge cannot be an adapter of its base: it has none that stays,
    or other tensors than it; and for a rank that a matrix cannot have."""
    merge_plan = stream_plan.result
    recipe = merge_plan.recipe
    if recipe.base not in stream_plan.models:
        raise InputError(
            recipe.where, f"base_model: {shown(recipe.base)}; expected a model, of which the adapter will be, or "
            "--as model",
        )  # fmt: skip
    base = _base(merge_plan)
    architecture = known_architecture(base.config.get("model_type"))
    if architecture is None:
        kind = shown(base.config.get("model_type"))
        raise InputError(
            base.path,
            f"model_type is {kind}, of which no adapter can be written; expected one of {', '.join(model_types())}",
        )
    # In memory a layer's experts are one module, whatever the files hold.
    experts = any(leaf.has_experts for leaf in architecture.leaves)
    if base.is_part or experts or architecture.model_type in OTHER_MODULES:
        raise InputError(
            "--as adapter", f"PEFT has other names or shapes for the weights of {base.path} "
            f"({shown(base.whole.config.get('model_type'))}) than its files; expected a plain decoder, or --as model",
        )  # fmt: skip
    named = merge_plan.leader.names
    for name, spec in merge_plan.specs.items():
        entry = base.whole.entries.get(base.names.in_file(named.of_architecture(name)))
        if entry is None or entry.shape != spec.shape:
            found = "no such tensor" if entry is None else f"{list(entry.shape)}"
            raise InputError(
                recipe.where, f"the merge has {name} {list(spec.shape)}, and the base {base.path} {found}; an adapter "
                "changes neither tokens nor layers",
            )  # fmt: skip
        if len(spec.shape) > 2:
            raise InputError("--as adapter", f"{name} has shape {list(spec.shape)}; expected matrices and vectors")
        if len(spec.shape) == 2 and min(spec.shape) < rank:
            raise InputError(
                "--rank", f"{rank}; expected at most {min(spec.shape)}, the smaller side of {name} {list(spec.shape)}"
            )


def _base(merge_plan: MergePlan) -> DecoderFolder:
    """The base of a merge that has one."""
    recipe = merge_plan.recipe
    assert recipe.base is not None
    return merge_plan.sources.folders[recipe.models.index(recipe.base)]


def write_as_adapter(
    merge_plan: MergePlan,
    target: Path,
    *,
    rank: int,
    card: str,
    overwrite: bool = False,
    check: Callable[[], None] = lambda: None,
    progress: Progress = lambda done: None,
) -> RankError:
    """Merge, and write the difference to the base as an adapter folder that appears complete or not at all. The merge
    is one of `prepare_adapter`."""
    base, named = _base(merge_plan), merge_plan.leader.names
    embedding = named.in_file(merge_plan.sources.token_tensors.embedding)
    factors: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    replaced: dict[str, np.ndarray] = {}
    errors: dict[str, tuple[float, float]] = {}
    names = list(merge_plan.specs)
    with atomic_folder(target, overwrite=overwrite, check=check) as folder:
        for name, merged in zip(names, merged_tensors(merge_plan, names), strict=True):
            own = base.whole.read(base.names.in_file(named.of_architecture(name)))
            if is_float(own.dtype) and not np.array_equal(merged.astype(np.float32), own.astype(np.float32)):
                if own.ndim == 2:
                    difference = merged.astype(np.float32) - own.astype(np.float32)
                    a, b = factors[name] = low_rank_factors(difference, rank)
                    errors[name] = float(np.linalg.norm(difference - b @ a)), float(np.linalg.norm(difference))
                else:
                    replaced[name] = merged
            base.whole.release(base.names.in_file(named.of_architecture(name)))
            progress(merge_plan.specs[name].nbytes)
        if not factors:
            raise InputError(target, f"no matrix of the merge differs from {base.path}; an adapter would be empty")
        write_adapter(folder, reference_to(base.path), rank, factors, replaced, embedding)
        (folder / CARD).write_text(card, encoding="utf-8")
        write_marker(folder)
    return _rank_error(errors, embedding in factors and bool(base.config.get("tie_word_embeddings", False)))


def _rank_error(errors: dict[str, tuple[float, float]], changes_tied_head: bool) -> RankError:
    """errors: of each matrix that differs the norms of what is left out, and of the difference."""
    shares = {name: left_out / whole for name, (left_out, whole) in errors.items()}
    worst = max(shares, key=shares.__getitem__)
    left_out, whole = (math.hypot(*values) for values in zip(*errors.values(), strict=True))
    return RankError(left_out / whole, shares[worst], worst, changes_tied_head)
