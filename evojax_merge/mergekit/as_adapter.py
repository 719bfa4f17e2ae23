"""A model as a LoRA adapter of its base: the difference of each matrix, cut to a rank.

The best approximation of a difference `D [out, in]` by a matrix of rank r is its singular value decomposition with all
but the r largest singular values left out (Eckart & Young 1936): `D ≈ B A` with `A [r, in]`, `B [out, r]`. Norms and
biases, which are no matrices, go into the adapter as they are. Of a matrix much larger than the rank, the singular
vectors come from a block Krylov space (Musco & Musco 2015, arXiv:1504.05477).
"""

import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from evojax_merge.checkpoints.adapter_writer import AdapterWriter
from evojax_merge.checkpoints.decoder_folder import LM_HEAD
from evojax_merge.checkpoints.derived import reference_to, sources_of
from evojax_merge.checkpoints.folder import is_float
from evojax_merge.checkpoints.writer import CARD, write_marker
from evojax_merge.errors import InputError, did_you_mean, escaped_lines, shown
from evojax_merge.mergekit.execute import MergePlan, Progress, merged_tensors
from evojax_merge.mergekit.stages import StreamPlan
from evojax_merge.models.architecture import EMBEDDING, ROUTER, Leaf, find_architecture, model_types
from evojax_merge.schema.patterns import pattern_matches
from evojax_merge.system.blas import one_blas_thread
from evojax_merge.system.file_system import atomic_folder

# Of larger matrices, in ranks, the singular vectors are approximated: the error is within 0.2% of the least.
EXACT_UP_TO = 6
KRYLOV_DEPTH, OVERSAMPLING = 4, 8


@dataclass(frozen=True)
class AdapterOptions:
    """The options of mergekit-extract-lora, and `energy`.

    max_rank: the most singular values that stay of a matrix. energy: no more stay than give this share of the squared
    Frobenius norm of the difference; sv_epsilon: none of at most this size stays. distribute_scale: both factors get
    the roots of the singular values; otherwise A gets all of them. embed_lora: embeddings and the head are cut to the
    rank as well; otherwise they are saved whole. save_module: modules that are saved whole, by their names or the last
    parts. exclude_regex, include_regex: the modules that the adapter leaves as they are, and the only ones that it
    changes; skip_undecomposable: norms stay as they are.
    """

    max_rank: int
    energy: float | None = None
    distribute_scale: bool = True
    embed_lora: bool = True
    save_module: tuple[str, ...] = ()
    exclude_regex: tuple[str, ...] = ()
    include_regex: tuple[str, ...] = ()
    sv_epsilon: float = 0.0
    skip_undecomposable: bool = False

    def is_whole(self, module: str, leaf: Leaf | None) -> bool:
        """Return whether a module is saved whole."""
        if not {module, module.rpartition(".")[2]}.isdisjoint(self.save_module):
            return True
        of_tokens = leaf is not None and leaf.component in ("embedding", "head")
        return of_tokens and not self.embed_lora and not self._any("--exclude-regex", self.exclude_regex, module)

    def is_changed(self, module: str) -> bool:
        """Return whether the regular expressions select a module."""
        included = not self.include_regex or self._any("--include-regex", self.include_regex, module)
        return included and not self._any("--exclude-regex", self.exclude_regex, module)

    def unmatched(self, modules: Collection[str]) -> list[str]:
        """A line about each name and expression that means none of the modules."""
        ends = {module.rpartition(".")[2] for module in modules}
        lines = [
            f"--save-module {name}: there is no such module{did_you_mean(name, ends)}"
            for name in self.save_module if name not in ends and name not in modules
        ]  # fmt: skip
        for option, patterns in (("--exclude-regex", self.exclude_regex), ("--include-regex", self.include_regex)):
            none = [text for text in patterns if not any(self._any(option, (text,), module) for module in modules)]
            lines += [f"{option} {shown(text)}: matches no module, such as {min(modules)}" for text in none]
        return lines

    def _any(self, option: str, patterns: tuple[str, ...], module: str) -> bool:
        return any(pattern_matches(option, pattern, module, "search") for pattern in patterns)

    def factors(self, difference: np.ndarray, fixed: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """The factors `A float32[rank, in]` and `B float32[out, rank]` of a difference float32 `[out, in]`; fixed: of
        rank `max_rank`, filled up with zeros."""
        # Matrices are taken apart side by side, each by one thread.
        with one_blas_thread():
            u, sizes, v = singular_values(difference, min(self.max_rank, *difference.shape))
        rank = len(sizes)
        if not fixed:
            rank = int((sizes > self.sv_epsilon).sum())
            if self.energy is not None:
                norm = np.linalg.norm(difference.astype(np.float64))
                rank = min(rank, int(np.searchsorted(np.cumsum(sizes**2), self.energy * norm**2 * (1 - 1e-12))) + 1)
        of_a = (np.sqrt(sizes) if self.distribute_scale else sizes)[:rank]
        of_b = np.sqrt(sizes)[:rank] if self.distribute_scale else np.ones(rank)
        more = self.max_rank - rank if fixed else 0
        a, b = of_a[:, None] * v[:rank], u[:, :rank] * of_b
        return np.pad(a, ((0, more), (0, 0))).astype(np.float32), np.pad(b, ((0, 0), (0, more))).astype(np.float32)


def singular_values(difference: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The largest singular values and their vectors: `u [out, rank]`, `sizes float64[rank]`, in descending order, and
    `v [rank, in]`. Exact, from the smaller Gram matrix in float64, unless a side has more than `EXACT_UP_TO` ranks."""
    if min(difference.shape) > EXACT_UP_TO * (rank + OVERSAMPLING):
        start = np.random.default_rng(0).standard_normal((difference.shape[1], rank + OVERSAMPLING), np.float32)
        blocks = [np.linalg.qr(difference @ start)[0]]
        for _ in range(KRYLOV_DEPTH):
            blocks.append(np.linalg.qr(difference @ (difference.T @ blocks[-1]))[0])
        basis = np.linalg.qr(np.concatenate(blocks, axis=1))[0]
        u, sizes, v = singular_values(basis.T @ difference, rank)
        return basis @ u, sizes, v
    wide = difference.astype(np.float64)
    tall = wide.shape[0] >= wide.shape[1]
    # Eigenvalues come in ascending order.
    vectors = np.linalg.eigh(wide.T @ wide if tall else wide @ wide.T)[1][:, : -rank - 1 : -1]
    others = wide @ vectors if tall else wide.T @ vectors
    sizes = np.linalg.norm(others, axis=0)
    others = others / np.where(sizes > 0, sizes, 1)
    return (others, sizes, vectors.T) if tall else (vectors, sizes, others.T)


@dataclass(frozen=True)
class RankError:
    """The error of an adapter: the Frobenius norm of the part that it leaves out, relative to the norm of the
    difference. total: over all matrices and all tensors that are left out; worst: for the tensor `tensor`, which loses
    the largest share; layers: for each layer, and for each component outside of the layers. changes_tied_head: whether
    the adapter changes an embedding that is the head as well, by factors. ranks: those of the factors, in ascending
    order. distance: the norm of the whole difference relative to the norm of the base's matrices."""

    total: float
    worst: float
    tensor: str
    changes_tied_head: bool
    layers: Mapping[str, float]
    ranks: tuple[int, ...]
    distance: float

    def __str__(self) -> str:
        advice = (
            "; the embedding is the head as well, which peft changes only when the adapter is merged in "
            "(merge_and_unload)"
        )
        return (
            f"relative error of the difference to the base (Frobenius norm): {self.total:.2%}; "
            f"worst {self.worst:.2%}, {self.tensor}{advice if self.changes_tied_head else ''}"
        )

    @property
    def rank_words(self) -> str:
        return f"rank {self.ranks[0]}" if len(self.ranks) == 1 else f"ranks {self.ranks[0]} to {self.ranks[-1]}"


def _rank_error(
    errors: Mapping[str, tuple[str, float, float]], tied_head: bool, ranks: list[int], distance: float
) -> RankError:
    """The error of an adapter, from each tensor's layer and the norms of what is left out and of the difference."""
    squares: dict[str, np.ndarray] = {}
    for layer, left_out, whole in errors.values():
        squares[layer] = squares.get(layer, np.zeros(2)) + np.square([left_out, whole])
    layers = {layer: float(np.sqrt(left_out / whole)) for layer, (left_out, whole) in squares.items()}
    shares = {name: left_out / whole for name, (_, left_out, whole) in errors.items()} or {"": 0.0}
    worst = max(shares, key=shares.__getitem__)
    left_out, whole = sum(squares.values(), np.zeros(2))
    total = float(np.sqrt(left_out / whole)) if whole else 0.0
    return RankError(total, shares[worst], worst, tied_head, layers, tuple(ranks), distance)


def prepare_adapter(stream_plan: StreamPlan, rank: int | None = None, option: str = "--as adapter") -> Path:
    """The folder of a planned merge's base, for which the result will be an adapter. rank: the rank of every matrix.
    Raises InputError where the result cannot be one: the merge has no base that stays, or other tensors than the base;
    and for a rank that a matrix cannot have."""
    merge_plan = stream_plan.result
    recipe = merge_plan.recipe
    if recipe.base not in stream_plan.models:
        raise InputError(
            recipe.where, f"base_model: {shown(recipe.base)}; expected a model, of which the adapter will be, or "
            "--as model",
        )  # fmt: skip
    base = merge_plan.base
    if sources_of(base.path).adapted is not None:
        raise InputError(
            recipe.where, f"the base is {reference_to(base.path)}, and an adapter's base has to be a model that PEFT "
            "loads by its name; expected the plain model as the base, or --as model",
        )  # fmt: skip
    architecture = base.architecture
    if architecture is None:
        kind = shown(base.config.get("model_type"))
        raise InputError(
            base.path,
            f"model_type is {kind}, of which no adapter can be written; expected one of {', '.join(model_types())}",
        )
    if architecture.no_adapter:
        raise InputError(option, f"{architecture.model_type}: {architecture.no_adapter}; expected --as model")
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
            advice = "an adapter changes neither tokens nor layers"
            if entry is None and tensor == base.names.own_head:
                advice = "save a copy of the base with a head of its own (equal to its embedding, and no longer tied)"
            raise InputError(
                recipe.where, f"the merge has {name} {list(spec.shape)}, and the base {base.path} {actual}; {advice}"
            )
        if len(spec.shape) > 2:
            raise InputError(option, f"{name} has shape {list(spec.shape)}; expected matrices and vectors")
        leaf = architecture.leaf_of(tensor)
        routes = leaf is not None and leaf.component == ROUTER
        if rank is not None and len(spec.shape) == 2 and min(spec.shape) < rank and not routes:
            raise InputError(
                "--rank", f"{rank}; expected at most {min(spec.shape)}, the smaller side of {name} {list(spec.shape)}"
            )
    return base.path


def _decoder_tensors(merge_plan: MergePlan) -> dict[str, str]:
    """The tensors that are merged: their names in the merged model's files -> those of the architecture."""
    leader = merge_plan.leader
    return {name: leader.names.of_architecture(name) for name in merge_plan.specs if name not in merge_plan.copied}


def modules_of(merge_plan: MergePlan) -> set[str]:
    """The modules, by their names in memory, of which tensors are merged."""
    return {merge_plan.base.in_memory(tensor).rpartition(".")[0] for tensor in _decoder_tensors(merge_plan).values()}


def write_as_adapter(
    merge_plan: MergePlan,
    target: Path,
    *,
    options: AdapterOptions,
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
    names = [base.in_memory(tensor) for tensor in tensors.values()]
    embeddings = {base.in_memory(leaf.tensor) for leaf in architecture.leaves if leaf.component == "embedding"}
    transposed = any(leaf.transposed for leaf in architecture.leaves)
    embedding = architecture.leaf(EMBEDDING)
    assert embedding is not None
    tied = base.in_memory(embedding.tensor), base.in_memory(base.names.own_head or LM_HEAD)
    is_whole = options.is_whole(tied[0].removesuffix(".weight"), embedding)
    stays_tied = tied if is_whole and base.config.get("tie_word_embeddings", False) else None
    most = len(names), max(map(len, names))
    with atomic_folder(target, overwrite=overwrite, check=check) as folder:
        with AdapterWriter(folder, reference_to(base.path), embeddings, transposed, stays_tied, most) as writer:
            # Other modules are the base's.
            progress(merge_plan.nbytes - sum(merge_plan.specs[name].nbytes for name in tensors))
            error = _write_differences(merge_plan, tensors, writer, options, progress)
        if not error.ranks:
            what = f"no matrix differs from {base.path}, but for those that options leave out"
            raise InputError(target, f"{what}; an adapter would be empty")
        (folder / CARD).write_text(escaped_lines(describe(card, error)), encoding="utf-8")
        write_marker(folder)
    return error


@dataclass(frozen=True)
class Change:
    """The change of a tensor of the base, and the part of it that an adapter has.

    key: the tensor's name in memory; layer: see `_layer_of`; shape: its shape; of_experts: whether experts or their
    router have it. size, before: the Frobenius norms of the change and of the base's tensor. factors: those of a matrix
    that is cut to a rank; whole: a tensor that replaces the base's; None: not written so. left_out: the norm of the
    part that the factors leave out, or all of the change for a tensor that stays as it is; None: no part of a sum.
    """

    key: str
    layer: str
    shape: tuple[int, ...]
    of_experts: bool
    size: float
    before: float
    factors: tuple[np.ndarray, np.ndarray] | None = None
    whole: np.ndarray | None = None
    left_out: float | None = None


def _change(merge_plan: MergePlan, architecture_name: str, options: AdapterOptions, merged: np.ndarray) -> Change:
    """The change of the base's tensor of this architecture's name to `merged`."""
    base, leaf = merge_plan.base, find_architecture(merge_plan.base.config["model_type"]).leaf_of(architecture_name)
    values, key = base.read(architecture_name), base.in_memory(architecture_name)
    module, of_experts = key.rpartition(".")[0], leaf is not None and (leaf.has_experts or leaf.component == ROUTER)
    after, before = (each.astype(np.float32, copy=False) for each in (merged, values))
    differs = is_float(values.dtype) and not np.array_equal(after, before)
    is_norm = values.ndim == 1 and not key.endswith(".bias")
    difference = after - before if differs else np.zeros(0, np.float32)
    difference = difference.T if leaf is not None and leaf.transposed else difference
    size = float(np.linalg.norm(difference))
    if not math.isfinite(size):
        what = f"{architecture_name} differs from the base's by more than float32 holds; expected a fine-tune of it"
        raise InputError(merge_plan.leader.path, what)
    change = Change(key, _layer_of(key, leaf), values.shape, of_experts, size, float(np.linalg.norm(before)))
    base.entries[architecture_name].release()
    if not differs:
        return change
    is_whole = not of_experts and options.is_whole(module, leaf)
    if not is_whole and (not options.is_changed(module) or (is_norm and options.skip_undecomposable)):
        return replace(change, left_out=size)
    if is_whole or merged.ndim != 2:
        return replace(change, whole=merged)
    a, b = options.factors(difference, fixed=of_experts)
    return replace(change, factors=(a, b), left_out=float(np.linalg.norm(difference - b @ a)))


def _write_differences(
    merge_plan: MergePlan, tensors: Mapping[str, str], writer: AdapterWriter, options: AdapterOptions,
    progress: Progress,
) -> RankError:  # fmt: skip
    """Write the factors of each matrix that differs from the base, and other tensors as they are. tensors: their names
    in the merged model's files -> those of the architecture."""
    base, errors = merge_plan.base, dict[str, tuple[str, float, float]]()
    ranks, vectors, norms = dict[str, int](), dict[str, np.ndarray](), np.zeros(2)
    # In memory the experts of a layer are one parameter, for which PEFT wants all factors, of one rank, or none.
    unchanged_experts: dict[str, tuple[int, ...]] = {}
    experts_change = False

    changes = merged_tensors(
        merge_plan, list(tensors), lambda name, merged: _change(merge_plan, tensors[name], options, merged)
    )
    for name, change in zip(tensors, changes, strict=True):
        key, matrix = change.key, len(change.shape) > 1
        norms += np.square([change.size, change.before]) if matrix else 0
        if change.left_out is not None:
            errors[key] = change.layer, change.left_out, change.size
        if change.factors is not None and len(change.factors[0]):
            writer.add_factors(key, *change.factors)
            ranks[key] = len(change.factors[0])
        experts_change = experts_change or (change.of_experts and change.factors is not None)
        if change.of_experts and matrix and change.factors is None:
            unchanged_experts[key] = change.shape
        if change.whole is not None and matrix:
            writer.add_whole(key, change.whole)
        elif change.whole is not None:
            # Biases come after the factors of their modules.
            vectors[key] = change.whole
        progress(merge_plan.specs[name].nbytes)
    for key, (outputs, inputs) in unchanged_experts.items() if experts_change else ():
        zeros = np.zeros((options.max_rank, inputs + outputs), np.float32)
        writer.add_factors(key, zeros[:, :inputs], zeros[:, inputs:].T)
    for key, vector in vectors.items():
        writer.add_whole(key, vector)
    embedding = base.in_memory(merge_plan.sources.token_tensors.embedding)
    tied = bool(base.config.get("tie_word_embeddings", False))
    distance = float(np.sqrt(norms[0] / max(norms[1], 1e-30)))
    return _rank_error(errors, tied and embedding in ranks, sorted(set(ranks.values())), distance)


def _layer_of(key: str, leaf: Leaf | None) -> str:
    """The layer of a tensor, in words, or its component outside of the layers."""
    number = re.search(r"\.(\d+)\.", key)
    return "other" if leaf is None else f"layer {number[1]}" if leaf.stack and number else leaf.component
