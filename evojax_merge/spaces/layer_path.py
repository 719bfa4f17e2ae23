"""The data-flow spaces: one genome is a path through the layers of all parents.

Two forms, both starting from the first parent as it is:

- *indicator* (Evolutionary Optimization of Model Merging Recipes, arXiv 2403.13187): all M layers in series, the
  series repeated r times, a gene for each of the M r places that says whether the layer is on, and scales for going
  from layer i to layer j, as an M x M matrix or as a small network of (i, j, place);
- *moves*: a few edits of the first parent: a block of its layers adds more or less, is repeated, skipped, or replaced
  by the same block of another parent. A scale only matters where its move is on, and there are few numbers to find.
  Scaled moves start as blocks of the first parent that add what they always added: from there a search can go by
  small steps, where every other edit of a trained model is a leap.

Genomes are decoded on the host: a path is plain data. Everything is in units of the bounds, as in spaces.parameter.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import jax
import jax.numpy as jnp
import numpy as np

from evojax_merge.errors import InputError
from evojax_merge.models.paths import LayerPath
from evojax_merge.spaces.bounds import from_unit, to_unit

# Hidden units of the scale network.
NETWORK_WIDTH = 8
_to_unit = jax.jit(to_unit)


def _inside(genomes: np.ndarray) -> np.ndarray:
    """[0, 1] values of free genomes `[P, D]`."""
    return np.asarray(_to_unit(jnp.asarray(genomes, jnp.float32)), np.float64)


def _parents_alone(where: str, name: str, genomes: Sequence[np.ndarray]) -> np.ndarray:
    """float32[S, D]: the seeds of a path space. Raises InputError for all but `parents`."""
    if name != "parents":
        raise InputError(where, f"{name}: a path has no weights; expected parents")
    return np.stack(genomes)


@dataclass(frozen=True)
class ScaleBounds:
    """Scales lie in [low, high], searched as logarithms. Both positive."""

    low: float
    high: float

    def scale(self, unit: np.ndarray) -> np.ndarray:
        return np.exp(np.log(self.low) + (np.log(self.high) - np.log(self.low)) * unit)

    def unit(self, scale: np.ndarray) -> np.ndarray:
        return (np.log(scale) - np.log(self.low)) / (np.log(self.high) - np.log(self.low))


@dataclass(frozen=True)
class IndicatorSpace:
    """`depths`: layers of each parent. `scales`: matrix, network, or none (all scales are 1)."""

    depths: tuple[int, ...]
    repetitions: int
    scales: str
    bounds: ScaleBounds
    max_steps: int
    embedding_parent: int

    @property
    def layers(self) -> int:
        """M."""
        return sum(self.depths)

    @property
    def num_indicators(self) -> int:
        """M r."""
        return self.layers * self.repetitions

    @property
    def scale_dims(self) -> int:
        return {"matrix": self.layers**2, "network": 5 * NETWORK_WIDTH + 1, "none": 0}[self.scales]

    @property
    def dims(self) -> int:
        return self.num_indicators + self.scale_dims

    @property
    def max_length(self) -> int:
        return min(self.num_indicators, self.max_steps)

    def genome(self, on: np.ndarray, scales: np.ndarray | None = None) -> np.ndarray:
        """The genome whose layers are on where `on: bool[M r]`, with `scales: float[M, M]` (1 where None)."""
        indicators = np.where(on, 0.75, 0.25)
        if self.scales == "matrix":
            matrix = np.ones((self.layers, self.layers)) if scales is None else scales
            rest = from_unit(self.bounds.unit(np.asarray(matrix, np.float64))).ravel()
        else:
            rest = np.full(self.scale_dims, 0.5)
        return np.concatenate([from_unit(indicators), rest]).astype(np.float32)

    @property
    def start(self) -> np.ndarray:
        """The first parent: its layers once, scales 1."""
        return self.genome(np.arange(self.num_indicators) < self.depths[0])

    def baseline(self) -> tuple[str, np.ndarray]:
        """The first parent as it is."""
        return "first parent", self.start

    def seed_genomes(self, where: str, name: str) -> np.ndarray:
        """float32[S, D]: each parent's layers once, scales 1, between the first and last leaves of the parent that all
        paths have these of; the first parent, and those whose layers are not too many."""
        places = np.arange(self.num_indicators)
        ends = np.cumsum(self.depths)
        fits = [(end - depth, end) for depth, end in zip(self.depths, ends, strict=True) if depth <= self.max_steps]
        return _parents_alone(where, name, [self.genome((places >= first) & (places < end)) for first, end in fits])

    def decode(self, genomes: np.ndarray) -> list[LayerPath | None]:
        """A path per genome; None where no layer is on, or more than `max_steps` are."""
        units = _inside(genomes)
        return [self._path(unit) for unit in units]

    def _path(self, unit: np.ndarray) -> LayerPath | None:
        num_indicators = np.flatnonzero(unit[: self.num_indicators] > 0.5)
        if not 0 < len(num_indicators) <= self.max_steps:
            return None
        layers = num_indicators % self.layers
        return LayerPath(
            tuple(map(int, layers)),
            tuple(map(float, self._scales(unit[self.num_indicators :], num_indicators))),
            self.embedding_parent,
        )

    def _scales(self, unit: np.ndarray, num_indicators: np.ndarray) -> np.ndarray:
        """float[T]: that of going from each step's layer to the next; the first layer is entered with 1."""
        layers = num_indicators % self.layers
        if self.scales == "none" or len(num_indicators) == 1:
            return np.ones(len(num_indicators))
        if self.scales == "matrix":
            matrix = self.bounds.scale(unit.reshape(self.layers, self.layers))
            return np.concatenate([[1.0], matrix[layers[:-1], layers[1:]]])
        # A network of one hidden layer over (from, to, place), each in [-1, 1]; weights are 2 * unit - 1, times 4.
        weights = 4 * (2 * unit - 1)
        into, out = weights[: 4 * NETWORK_WIDTH].reshape(NETWORK_WIDTH, 4), weights[4 * NETWORK_WIDTH :]
        last = max(self.layers - 1, 1)
        inputs = np.stack(
            [
                layers[:-1] / last,
                layers[1:] / last,
                num_indicators[1:] / max(self.num_indicators - 1, 1),
                np.ones(len(num_indicators) - 1),
            ],
            axis=1,
        )
        inputs[:, :3] = 2 * inputs[:, :3] - 1
        value = np.tanh(np.tanh(inputs @ into.T) @ out[:-1] + out[-1])
        # Within the bounds, and 1 where the network says 0.
        return np.concatenate([[1.0], np.where(value >= 0, self.bounds.high**value, self.bounds.low ** (-value))])


# What a move can do; splices follow, one per other parent.
MOVES = ("scale", "repeat", "skip")
# Genes of one move: whether it is on, what it does, where it begins, how many layers, how it scales.
GENES = ("on", "what", "where", "length", "scale")


@dataclass(frozen=True)
class LayerEdit:
    """One edit of the first parent: `layers` of its layers from `first` on are scaled, repeated, skipped, or replaced
    by those of parent `donor` at the same relative depth. The state is multiplied by `scale` before the block that
    this is about (what is put there; the block itself where it is scaled) and divided by it behind, so that the block
    adds 1/scale as much and what follows is as it was."""

    what: str
    first: int
    layers: int
    scale: float = 1.0
    donor: int = 0


@dataclass(frozen=True)
class MoveSpace:
    """`count` moves of at most `window` layers each. `depths`: layers of each parent."""

    depths: tuple[int, ...]
    count: int
    window: int
    bounds: ScaleBounds
    scaled: bool
    max_steps: int
    embedding_parent: int

    @cached_property
    def kinds(self) -> list[tuple[str, int]]:
        """What a move can do, and from which parent."""
        return [(name, 0) for name in MOVES] + [("splice", parent) for parent in range(1, len(self.depths))]

    @property
    def genes(self) -> tuple[str, ...]:
        return GENES if self.scaled else GENES[:-1]

    @property
    def move_genes(self) -> tuple[int, ...]:
        """How many values each gene has, in the order of `genes`; the scale is continuous."""
        return (2, len(self.kinds), self.depths[0], self.window, 0)[: len(self.genes)]

    @property
    def dims(self) -> int:
        return self.count * len(self.genes)

    @property
    def max_length(self) -> int:
        return min(self.max_steps, self.depths[0] + self.count * max(self.window, max(self.depths)))

    def genome(self, moves: Sequence[LayerEdit]) -> np.ndarray:
        """A genome that means these moves (at most `count`), the rest off."""
        rows = np.full((self.count, len(self.genes)), 0.5)
        rows[:, 0] = 0.25
        for row, move in zip(rows, moves, strict=False):
            kind = self.kinds.index((move.what, move.donor))
            row[:4] = (
                0.75,
                (kind + 0.5) / len(self.kinds),
                (move.first + 0.5) / self.depths[0],
                (move.layers - 0.5) / self.window,
            )
            if self.scaled:
                row[4] = self.bounds.unit(np.asarray(move.scale))
        if self.scaled:
            rows[len(moves) :, 4] = self.bounds.unit(np.asarray(1.0))
        return from_unit(rows).ravel().astype(np.float32)

    @property
    def start(self) -> np.ndarray:
        """The first parent, its moves spread over its depth: scales of 1, or, without scales, one of each kind, off."""
        depth, window = self.depths[0], self.window
        kinds = [("scale", 0)] if self.scaled else self.kinds
        spread = [
            LayerEdit(what, int((i + 0.5) * depth / self.count), max(1, window // 2), 1.0, donor)
            for i, (what, donor) in zip(range(self.count), kinds * self.count, strict=False)
        ]
        rows = self.genome(spread).reshape(self.count, -1)
        if not self.scaled:
            # Just off, so that a step of the search tries them.
            rows[:, 0] = 0.4
        return rows.ravel()

    def moves(self, genome: np.ndarray) -> list[LayerEdit]:
        """The moves that are on, in their order."""
        found = []
        for row in _inside(genome[None])[0].reshape(self.count, -1):
            if row[0] <= 0.5:
                continue
            what, donor = self.kinds[min(int(row[1] * len(self.kinds)), len(self.kinds) - 1)]
            first = min(int(row[2] * self.depths[0]), self.depths[0] - 1)
            layers = min(int(row[3] * self.window) + 1, self.window, self.depths[0] - first)
            scale = float(self.bounds.scale(row[4])) if self.scaled else 1.0
            found.append(LayerEdit(what, first, layers, scale, donor))
        return found

    def baseline(self) -> tuple[str, np.ndarray]:
        """The first parent as it is."""
        return "first parent", self.start

    def seed_genomes(self, where: str, name: str) -> np.ndarray:
        """float32[S, D]: the first parent, and each one as deep whose layers the moves can put in the place of its."""
        depth = self.depths[0]
        firsts = range(0, depth, self.window)
        donors = [k for k, own in enumerate(self.depths) if k and own == depth and len(firsts) <= self.count]
        moves = [
            [LayerEdit("splice", first, min(self.window, depth - first), 1.0, donor) for first in firsts]
            for donor in donors
        ]
        return _parents_alone(where, name, [self.start, *map(self.genome, moves)])

    def decode(self, genomes: np.ndarray) -> list[LayerPath | None]:
        """A path per genome; None where nothing is left, or more than `max_steps` layers are."""
        return [self.path(self.moves(genome)) for genome in genomes]

    def path(self, moves: Sequence[LayerEdit]) -> LayerPath | None:
        """Apply moves one after the other to the first parent's layers."""
        offsets = np.concatenate([[0], np.cumsum(self.depths)])
        # Steps as (layer of the first parent that the step stands for, layer of the series, product of scales).
        steps = [(i, i, 1.0) for i in range(self.depths[0])]
        for move in moves:
            block = range(move.first, move.first + move.layers)
            inside = [number for number, (place, _, _) in enumerate(steps) if place in block]
            if not inside:
                continue
            begin, end = inside[0], inside[-1] + 1
            if move.what == "scale":
                steps = [_scaled([step], move.scale)[0] if step[0] in block else step for step in steps]
                continue
            if move.what == "skip":
                steps = [step for step in steps if step[0] not in block]
                continue
            if move.what == "repeat":
                again = steps[begin:end]
                steps[end:end] = _scaled(again, move.scale)
                continue
            depth = self.depths[move.donor]
            first = round(move.first * depth / self.depths[0])
            last = max(first + 1, round((move.first + move.layers) * depth / self.depths[0]))
            donated = [
                (min(move.first + i, block[-1]), int(offsets[move.donor]) + layer, 1.0)
                for i, layer in enumerate(range(first, min(last, depth)))
            ]
            steps = (
                [step for step in steps[:begin] if step[0] not in block]
                + _scaled(donated, move.scale)
                + [step for step in steps[end:] if step[0] not in block]
            )
        if not 0 < len(steps) <= self.max_steps:
            return None
        products = [product for *_, product in steps]
        scales = [product / before for product, before in zip(products, [1.0, *products], strict=False)]
        return LayerPath(tuple(layer for _, layer, _ in steps), tuple(scales), self.embedding_parent)


def _scaled(steps: list[tuple[int, int, float]], scale: float) -> list[tuple[int, int, float]]:
    return [(place, layer, product * scale) for place, layer, product in steps]


PathSpace = IndicatorSpace | MoveSpace


def describe_path(path: LayerPath, origins: Sequence[tuple[int, int]], names: Mapping[int, str]) -> list[str]:
    """A path in words: runs of consecutive layers of one parent, with the scale that each is entered with."""
    lines: list[str] = []
    run: list[int] = []

    def close(scale: float) -> None:
        parent, first = origins[run[0]]
        _, last = origins[run[-1]]
        span = f"layer {first}" if first == last else f"layers {first}-{last}"
        lines.append(f"{names[parent]} {span}" + ("" if scale == 1 else f", entered with {scale:.4g}"))

    entered = 1.0
    for layer, scale in zip(path.layers, path.scales, strict=True):
        follows = bool(run) and layer == run[-1] + 1 and origins[layer][0] == origins[run[-1]][0] and scale == 1
        if run and not follows:
            close(entered)
            run = []
        if not run:
            entered = scale
        run.append(layer)
    close(entered)
    return lines
