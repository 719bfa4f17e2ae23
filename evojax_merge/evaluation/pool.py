"""Scoring members of a pool: founders, and children that are bred when they are asked for.

A member is its tensors, in host memory, made as `evojax-merge merge` makes them of its recipe: each measured exactly,
merged in float32 and cast to the export dtype, with random masks drawn by the parents' content. The scored weights are
therefore, to the bit, the result of the member's lineage of recipes. Founders are read from their files whenever they
are needed. Some bred members are kept; any other is bred again from its ancestors.
"""

from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import islice

import numpy as np
from merge_kernels import METHODS, draw_row_keys, merge_tensor

from evojax_merge.checkpoints.bank import aligned_empty
from evojax_merge.checkpoints.folder import FLOAT_DTYPES, is_finite, tensor_digest
from evojax_merge.checkpoints.parents import Sources, tensor_shapes
from evojax_merge.evaluation.evaluator import MATERIALISE_FRACTION, DecoderEvaluator, Progress
from evojax_merge.evaluation.memory import available_memory
from evojax_merge.evaluation.scores import TaskScores
from evojax_merge.genealogy import Member
from evojax_merge.models.architecture import depths, leaves_of, tensor_grid, tensor_shape, tensors_of
from evojax_merge.models.config import DecoderConfig
from evojax_merge.models.sources import StackedWeights
from evojax_merge.tasks.task import Task

# A bred member: its tensors by their names in a file, in the export dtype.
Weights = dict[str, np.ndarray]
# Tensors that are merged at a time.
WORKERS = 4


@dataclass
class PoolBank:
    """The founders' files and the weights of bred members.

    sources: the base first where `has_base`, then the founders by number; seed: of random methods; export_dtype: the
    dtype that members are rounded to; slots: the number of bred members that are kept, the most recent parents.
    """

    sources: Sources
    config: DecoderConfig
    has_base: bool
    seed: int
    export_dtype: str
    slots: int
    _kept: OrderedDict[Member, Weights] = field(default_factory=OrderedDict)
    # The number of children that were bred, repetitions included.
    bred: int = 0

    @property
    def dtype(self) -> np.dtype:
        return FLOAT_DTYPES[self.export_dtype]

    def member_bytes(self) -> int:
        """Bytes of a bred member."""
        shapes = tensor_shapes(self.config).values()
        return sum(int(np.prod(shape, dtype=np.int64)) for shape in shapes) * self.dtype.itemsize

    def check_founders(self, progress: Progress) -> None:
        """Raises InputError where a founder or the base holds NaN or infinity. `progress` receives the bytes that were
        read."""
        for s in range(len(self.sources.folders)):
            for name, _, _ in tensors_of(self.config):
                progress(self.sources.read_finite(s, name).nbytes)
                if not self.sources.has_rows(name):
                    self.sources.release(s, name)

    def weights(self, members: Sequence[Member]) -> Iterator[Weights]:
        """The tensors of each of the members, in their order, one after the other.

        Ancestors that are not in memory are bred first, in order of birth, and freed after their last child: besides
        the members asked for, no more are held at any time than the pool had members.
        """
        missing: set[Member] = set()
        waiting = [*members]
        while waiting:
            member = waiting.pop()
            if not (member.is_founder or member in self._kept or member in missing):
                missing.add(member)
                waiting += member.parents
        wanted = Counter(parent for member in missing for parent in member.parents) + Counter(members)
        held = {member: self._kept[member] for member in wanted if member in self._kept}
        # A child is bred when its turn comes, its ancestors before.
        order = iter(sorted(missing, key=lambda member: member.number))
        with ThreadPoolExecutor(WORKERS) as pool:
            for member in members:
                while not member.is_founder and member not in held:
                    self._breed_next(next(order), held, wanted, pool)
                yield self._founder(member) if member.is_founder else held[member]
                self._let_go(member, held, wanted)

    def _breed_next(
        self, child: Member, held: dict[Member, Weights], wanted: Counter[Member], pool: ThreadPoolExecutor
    ) -> None:
        held[child] = self._bred(child, held, pool)
        self.bred += 1
        for parent in child.parents:
            if not parent.is_founder:
                self._keep(parent, held[parent])
            self._let_go(parent, held, wanted)

    @staticmethod
    def _let_go(member: Member, held: dict[Member, Weights], wanted: Counter[Member]) -> None:
        wanted[member] -= 1
        if wanted[member] <= 0:
            held.pop(member, None)

    def _keep(self, member: Member, weights: Weights) -> None:
        self._kept[member] = weights
        self._kept.move_to_end(member)
        while len(self._kept) > self.slots:
            self._kept.popitem(last=False)

    def _founder(self, member: Member) -> Weights:
        source = member.number + int(self.has_base)
        return {name: self.sources.read(source, name).astype(self.dtype) for name, _, _ in tensors_of(self.config)}

    def _bred(self, child: Member, held: dict[Member, Weights], pool: ThreadPoolExecutor) -> Weights:
        """The child's tensors; its parents are held, or founders."""
        method = METHODS[child.method]
        has_base = method.uses_base(self.has_base)
        options = replace(method.options, has_base=has_base)
        # Export would refuse a recipe with such numbers.
        is_meaningless = method.validate(options, child.parameters) is not None

        def merged(name: str, layer: int) -> np.ndarray:
            parents = child.ordered(layer)
            tensors = [self._read(parent, name, held) for parent in parents]
            if is_meaningless:
                return np.full(tensors[0].shape, np.nan, self.dtype)
            sources = [self.sources.read(0, name), *tensors] if has_base else tensors

            def row_keys(k: int) -> np.ndarray:
                return draw_row_keys(self.seed, self._digest(parents[k], name, held), tensors[k].shape)

            return merge_tensor(method, options, sources, child.parameters, row_keys, self.dtype)

        # Tensors outside of the layers: the embedding goes with the first layer, all else with the last.
        placed = {
            name: place[0] if place else 0 if leaf.component == "embedding" else self.config.layers - 1
            for name, leaf, place in tensors_of(self.config)
        }
        return dict(zip(placed, pool.map(merged, placed, placed.values()), strict=True))

    def _read(self, member: Member, name: str, held: dict[Member, Weights]) -> np.ndarray:
        if member.is_founder:
            return self.sources.read(member.number + int(self.has_base), name)
        return held[member][name]

    def _digest(self, member: Member, name: str, held: dict[Member, Weights]) -> bytes:
        if member.is_founder:
            return self.sources.digest(member.number + int(self.has_base), name)
        return tensor_digest(name, held[member][name])


@dataclass(frozen=True)
class PoolEvaluator:
    """Scores members of a pool, on the requests of an evaluator."""

    evaluator: DecoderEvaluator
    bank: PoolBank

    @property
    def tasks(self) -> list[Task]:
        return self.evaluator.tasks

    def passes(self, population: int) -> int:
        return self.evaluator.passes(population)

    def evaluate(self, members: Sequence[Member], progress: Progress = lambda done: None) -> TaskScores:
        """Score the members, as many bred and scored together as fit into memory. A member with a weight that is not
        finite has failed, whether or not the examples meet it: export would refuse its recipe."""
        size = max(1, int(MATERIALISE_FRACTION * available_memory()) // self.bank.member_bytes())
        weights, parts = self.bank.weights(members), []
        for begin in range(0, len(members), size):
            models, finite = self._stacked(len(members[begin : begin + size]), weights)
            parts.append(_where(finite, self.evaluator.models(models, progress)))
        return _joined(parts)

    def _stacked(self, count: int, weights: Iterator[Weights]) -> tuple[StackedWeights, np.ndarray]:
        """The next `count` of the weights as one population, a leading axis P on every leaf; and which are finite,
        bool[P]."""
        config, bank = self.evaluator.config, self.bank
        stacks: dict[str, Weights] = {stack: {} for stack in depths(config)}
        shared: Weights = {}
        for leaf in leaves_of(config):
            shape = (count, *tensor_grid(config, leaf), *tensor_shape(config, leaf))
            (shared if leaf.stack is None else stacks[leaf.stack])[leaf.name] = aligned_empty(shape, bank.dtype)
        finite = np.zeros(count, bool)
        for p, member in enumerate(islice(weights, count)):
            finite[p] = all(map(is_finite, member.values()))
            for name, leaf, place in tensors_of(config):
                (shared if leaf.stack is None else stacks[leaf.stack])[leaf.name][(p, *place)] = member[name]
        return StackedWeights(stacks, shared, self.evaluator.compute_dtype), finite  # type: ignore[arg-type]


def _where(finite: np.ndarray, scores: TaskScores) -> TaskScores:
    """The scores, NaN for members that are not in `finite: bool[P]`."""
    return replace(
        scores,
        matrices={
            task: {metric: np.where(finite[:, None], values, np.nan) for metric, values in metrics.items()}
            for task, metrics in scores.matrices.items()
        },
    )


def _joined(parts: Sequence[TaskScores]) -> TaskScores:
    """The scores of consecutive populations as those of one."""
    first = parts[0]
    return TaskScores(
        {
            task: {metric: np.concatenate([part.matrices[task][metric] for part in parts]) for metric in metrics}
            for task, metrics in first.matrices.items()
        },
        {task: [texts for part in parts for texts in part.outputs[task]] for task in first.outputs},
        {task: np.concatenate([part.log_probabilities[task] for part in parts]) for task in first.log_probabilities},
    )
