"""The data-flow spaces: one genome is a path through the layers of all parents.

Two forms, both starting from the unchanged first parent:

- *indicator* (Evolutionary Optimization of Model Merging Recipes, arXiv 2403.13187): all M layers in series, the
  series repeated r times, a gene for each of the M r places that says whether the layer is on, and scales for going
  from layer i to layer j, as an M x M matrix or as a small network of (i, j, place);
- *moves*: a few edits of the first parent: a block of its layers adds more or less, is repeated, skipped, or replaced
  by the same block of another parent. A scale only matters where its move is on, and there are few numbers to find.
  Scaled moves start as blocks of the first parent with unchanged scales: from there a search can go by small steps,
  where every other edit of a trained model is a leap.

Genomes are decoded on the host: a path is plain data. Everything is in units of the bounds, as in spaces.parameter.

Scales are differentiable, and a derivative with respect to a path's scales is pulled back to the genes that they come
from. The layers of a path are a step function of the other genes: their derivative is 0.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import jax
import jax.numpy as jnp
import numpy as np

from evojax_merge.errors import InputError
from evojax_merge.models.paths import LayerPath
from evojax_merge.spaces.bounds import from_unit, inside, rows_among, to_unit_with_slope

# Hidden units of the scale network, of one hidden layer; and the width of the range, around 0, of its weights.
NETWORK_WIDTH, NETWORK_SLOPE = 8, 8
_slope = jax.jit(jax.vmap(jax.grad(to_unit_with_slope)))


def _slopes(genes: np.ndarray) -> np.ndarray:
    """The derivative of `inside`, which leads away from the bounds (see `to_unit_with_slope`)."""
    flat = jnp.asarray(genes, jnp.float32).ravel()
    return np.asarray(_slope(flat), np.float64).reshape(np.shape(genes))


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
        return (np.log(scale) - np.log(self.low)) / self.log_range

    @property
    def log_range(self) -> float:
        """The derivative of a scale's logarithm with respect to its place in [0, 1]."""
        return float(np.log(self.high) - np.log(self.low))


@dataclass(frozen=True)
class IndicatorSpace:
    """`depths`: layers of each parent. `scales`: matrix, network, or none (all scales are 1). `is_model`: whether some
    layers of the series, in an order, are a model."""

    depths: tuple[int, ...]
    repetitions: int
    scales: str
    bounds: ScaleBounds
    max_steps: int
    embedding_parent: int
    is_model: Callable[[Sequence[int]], bool] = lambda layers: True

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
            scale_genes = from_unit(self.bounds.unit(np.asarray(matrix, np.float64))).ravel()
        else:
            scale_genes = np.full(self.scale_dims, 0.5)
        return np.concatenate([from_unit(indicators), scale_genes]).astype(np.float32)

    def _genome_of(self, parent: int) -> np.ndarray:
        """The genome of a parent's layers once, with scales of 1."""
        end, places = sum(self.depths[: parent + 1]), np.arange(self.num_indicators)
        return self.genome((places >= end - self.depths[parent]) & (places < end))

    @property
    def start(self) -> np.ndarray:
        """The first parent."""
        return self._genome_of(0)

    def baselines(self) -> tuple[str, np.ndarray]:
        """The unchanged first parent."""
        return "first parent", self.start[None]

    def seed_genomes(self, where: str, name: str) -> np.ndarray:
        """float32[S, D]: the layers of each parent that has not too many, between the leaves that all paths have at
        their ends."""
        fits = [parent for parent, depth in enumerate(self.depths) if depth <= self.max_steps]
        return _parents_alone(where, name, list(map(self._genome_of, fits)))

    def parents_among(self, genomes: np.ndarray) -> np.ndarray:
        """bool[P]: true for the genomes, float32[P, D], of the parent whose embedding and head all paths have."""
        return rows_among(genomes, self._genome_of(self.embedding_parent)[None])

    def decode(self, genomes: np.ndarray) -> list[LayerPath | None]:
        """A path per genome; None where no layer is on, more than `max_steps` are, or they are no model."""
        paths: list[LayerPath | None] = []
        for unit in inside(genomes):
            on = np.flatnonzero(unit[: self.num_indicators] > 0.5)
            if not 0 < len(on) <= self.max_steps or not self.is_model((on % self.layers).tolist()):
                paths.append(None)
                continue
            layers, scales = on % self.layers, self._scales(unit[self.num_indicators :], on)
            paths.append(LayerPath(tuple(map(int, layers)), tuple(map(float, scales)), self.embedding_parent))
        return paths

    def pull_back(self, genomes: np.ndarray, cotangents: Sequence[np.ndarray | None]) -> np.ndarray:
        """float32[P, D]: the derivatives with respect to genomes float32[P, D]: with respect to the scales' genes, and
        0 elsewhere. cotangents: with respect to each path's scales, float[T]."""
        derivatives = np.zeros(np.shape(genomes))
        for row, genome, unit, path, cotangent in zip(
            derivatives, genomes, inside(genomes), self.decode(genomes), cotangents, strict=True
        ):
            if path is not None and cotangent is not None and len(path.layers) > 1 and self.scale_dims:
                in_logs = (np.asarray(cotangent) * path.scales)[1:]
                on = np.flatnonzero(unit[: self.num_indicators] > 0.5)
                row[self.num_indicators :] = self._pull_back(unit[self.num_indicators :], on, in_logs)
                row[self.num_indicators :] *= _slopes(genome[self.num_indicators :])
        return derivatives.astype(np.float32)

    def _pull_back(self, unit: np.ndarray, on: np.ndarray, cotangents: np.ndarray) -> np.ndarray:
        """float64[S]: the derivative with respect to the scales' genes `unit`, in [0, 1], of a function whose
        derivatives by the logarithms of the scales between the T places `on` are `cotangents`, float64[T - 1]."""
        if self.scales == "matrix":
            layers, matrix = on % self.layers, np.zeros((self.layers, self.layers))
            np.add.at(matrix, (layers[:-1], layers[1:]), self.bounds.log_range * cotangents)
            return matrix.ravel()
        into, out = self._network(unit)
        inputs = self._network_inputs(on)
        hidden = np.tanh(inputs @ into.T)
        value = np.tanh(hidden @ out[:-1] + out[-1])
        back = np.where(value >= 0, np.log(self.bounds.high), -np.log(self.bounds.low)) * cotangents * (1 - value**2)
        through = back[:, None] * out[:-1] * (1 - hidden**2)
        return NETWORK_SLOPE * np.concatenate([(through.T @ inputs).ravel(), back @ hidden, [back.sum()]])

    def _scales(self, unit: np.ndarray, on: np.ndarray) -> np.ndarray:
        """float64[T]: the scale of going from each step's layer to the next; the first layer is entered with 1. on:
        int[T], the places of the series that are on."""
        layers = on % self.layers
        if self.scales == "none" or len(on) == 1:
            return np.ones(len(on))
        if self.scales == "matrix":
            matrix = self.bounds.scale(unit.reshape(self.layers, self.layers))
            return np.concatenate([[1.0], matrix[layers[:-1], layers[1:]]])
        into, out = self._network(unit)
        value = np.tanh(np.tanh(self._network_inputs(on) @ into.T) @ out[:-1] + out[-1])
        # Within the bounds, and 1 where the network gives 0.
        return np.concatenate([[1.0], np.where(value >= 0, self.bounds.high**value, self.bounds.low ** (-value))])

    def _network(self, unit: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The weights into the hidden layer, float64[NETWORK_WIDTH, 4], and out of it, then the bias, one more."""
        weights = NETWORK_SLOPE / 2 * (2 * unit - 1)
        return weights[: 4 * NETWORK_WIDTH].reshape(NETWORK_WIDTH, 4), weights[4 * NETWORK_WIDTH :]

    def _network_inputs(self, on: np.ndarray) -> np.ndarray:
        """float64[T - 1, 4]: (from, to, place) of each step but the first, each in [-1, 1], and 1."""
        layers, last = on % self.layers, max(self.layers - 1, 1)
        inputs = np.stack(
            [layers[:-1] / last, layers[1:] / last, on[1:] / max(self.num_indicators - 1, 1), np.ones(len(on) - 1)],
            axis=1,
        )
        inputs[:, :3] = 2 * inputs[:, :3] - 1
        return inputs


# The kinds of moves; splices follow, one per other parent. Without scales there is no `scale`.
MOVES = ("scale", "repeat", "skip")
# Genes of one move: whether it is on, its kind, its first layer, its number of layers, its scale.
GENES = ("on", "what", "where", "length", "scale")


@dataclass(frozen=True)
class LayerEdit:
    """One edit of the first parent: `layers` of its layers from `first` on are scaled, repeated, skipped, or replaced
    by those of parent `donor` at the same relative depth. The state is multiplied by `scale` before the block of the
    edit (the inserted one; the block itself where it is scaled) and divided by it behind, so that the block adds
    1/scale as much and later layers see the state unchanged."""

    what: str
    first: int
    layers: int
    scale: float = 1.0
    donor: int = 0


# A repeat of repeats doubles a path: past so many steps no further move is applied, and the path counts as too long.
MOST_STEPS = 100_000

# A step of an edited path: the layer of the first parent that it stands for, the layer of the series, and the numbers
# of the moves that have scaled it.
Step = tuple[int, int, tuple[int, ...]]


@dataclass(frozen=True)
class MoveSpace:
    """`count` moves of at most `window` layers each. `depths`: layers of each parent; `is_model`: see
    `IndicatorSpace`."""

    depths: tuple[int, ...]
    count: int
    window: int
    bounds: ScaleBounds
    scaled: bool
    max_steps: int
    embedding_parent: int
    is_model: Callable[[Sequence[int]], bool] = lambda layers: True

    @cached_property
    def kinds(self) -> list[tuple[str, int]]:
        """The kinds of moves, each with the parent that it takes layers from."""
        names = MOVES if self.scaled else [name for name in MOVES if name != "scale"]
        return [(name, 0) for name in names] + [("splice", parent) for parent in range(1, len(self.depths))]

    @property
    def genes(self) -> tuple[str, ...]:
        return GENES if self.scaled else GENES[:-1]

    @property
    def move_genes(self) -> tuple[int, ...]:
        """The number of values of each gene, in the order of `genes`; the scale is continuous."""
        return (2, len(self.kinds), self.depths[0], self.window, 0)[: len(self.genes)]

    @property
    def dims(self) -> int:
        return self.count * len(self.genes)

    @property
    def max_length(self) -> int:
        return min(self.max_steps, self.depths[0] + self.count * max(self.window, max(self.depths)))

    def genome(self, moves: Sequence[LayerEdit]) -> np.ndarray:
        """A genome that means these moves (at most `count`), the others off."""
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
        edits = []
        for row in self._on(genome)[1]:
            what, donor = self.kinds[min(int(row[1] * len(self.kinds)), len(self.kinds) - 1)]
            first = min(int(row[2] * self.depths[0]), self.depths[0] - 1)
            layers = min(int(row[3] * self.window) + 1, self.window, self.depths[0] - first)
            scale = float(self.bounds.scale(row[4])) if self.scaled else 1.0
            edits.append(LayerEdit(what, first, layers, scale, donor))
        return edits

    def _on(self, genome: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The numbers of the moves that are on, int[N], and their genes in [0, 1], float64[N, G]."""
        rows = inside(genome[None])[0].reshape(self.count, -1)
        on = np.flatnonzero(rows[:, 0] > 0.5)
        return on, rows[on]

    def pull_back(self, genomes: np.ndarray, cotangents: Sequence[np.ndarray | None]) -> np.ndarray:
        """float32[P, D]: the derivatives with respect to genomes float32[P, D]: with respect to the moves' scales, and
        0 elsewhere. cotangents: with respect to each path's scales, float[T]."""
        derivatives = np.zeros(np.shape(genomes))
        for row, genome, cotangent in zip(derivatives, genomes, cotangents, strict=True):
            path = self.path(moves := self.moves(genome))
            if path is None or cotangent is None or not self.scaled:
                continue
            # How often each move has scaled each step, int[T + 1, N]: no move has scaled the state before the first
            # step.
            counts = np.zeros((len(path.layers) + 1, len(moves)))
            for t, (_, _, scaled_by) in enumerate(self._steps(moves), 1):
                np.add.at(counts[t], list(scaled_by), 1)
            in_logs = np.asarray(cotangent) * path.scales @ np.diff(counts, axis=0)
            scales = row.reshape(self.count, -1)[:, GENES.index("scale")]
            on, _ = self._on(genome)
            slopes = _slopes(genome.reshape(self.count, -1)[on, GENES.index("scale")])
            scales[on] = self.bounds.log_range * in_logs * slopes
        return derivatives.astype(np.float32)

    def baselines(self) -> tuple[str, np.ndarray]:
        """The unchanged first parent."""
        return "first parent", self.start[None]

    def seed_genomes(self, where: str, name: str) -> np.ndarray:
        """float32[S, D]: the first parent, and each of its depth whose layers the moves can put in place of all."""
        depth = self.depths[0]
        firsts = range(0, depth, self.window)
        donors = [k for k, layers in enumerate(self.depths) if k and layers == depth and len(firsts) <= self.count]
        moves = [
            [LayerEdit("splice", first, min(self.window, depth - first), 1.0, donor) for first in firsts]
            for donor in donors
        ]
        return _parents_alone(where, name, [self.start, *map(self.genome, moves)])

    def parents_among(self, genomes: np.ndarray) -> np.ndarray:
        """bool[P]: true for the first parent's genomes; none where paths have another parent's embedding and head."""
        return rows_among(genomes, self.start[None] if self.embedding_parent == 0 else np.zeros((0, self.dims)))

    def decode(self, genomes: np.ndarray) -> list[LayerPath | None]:
        """A path per genome; None where nothing is left, more than `max_steps` layers are, or they are no model."""
        return [self.path(self.moves(genome)) for genome in genomes]

    def path(self, moves: Sequence[LayerEdit]) -> LayerPath | None:
        """Apply moves one after the other to the first parent's layers."""
        steps = self._steps(moves)
        if not 0 < len(steps) <= self.max_steps or not self.is_model([layer for _, layer, _ in steps]):
            return None
        products = [math.prod((moves[number].scale for number in scaled_by), start=1.0) for _, _, scaled_by in steps]
        scales = [product / before for product, before in zip(products, [1.0, *products], strict=False)]
        return LayerPath(tuple(layer for _, layer, _ in steps), tuple(scales), self.embedding_parent)

    def _steps(self, moves: Sequence[LayerEdit]) -> list[Step]:
        """Apply the moves to the first parent's layers. Stops once there are more than MOST_STEPS steps."""
        offsets = np.concatenate([[0], np.cumsum(self.depths)])
        steps: list[Step] = [(i, i, ()) for i in range(self.depths[0])]
        for number, move in enumerate(moves):
            if len(steps) > MOST_STEPS:
                break
            block = range(move.first, move.first + move.layers)
            within = [t for t, (place, _, _) in enumerate(steps) if place in block]
            if not within:
                continue
            begin, end = within[0], within[-1] + 1
            if move.what == "scale":
                steps = [_scaled([step], number)[0] if step[0] in block else step for step in steps]
            elif move.what == "skip":
                steps = [step for step in steps if step[0] not in block]
            elif move.what == "repeat":
                steps[end:end] = _scaled(steps[begin:end], number)
            else:
                depth = self.depths[move.donor]
                first = round(move.first * depth / self.depths[0])
                last = max(first + 1, round((move.first + move.layers) * depth / self.depths[0]))
                donated: list[Step] = [
                    (min(move.first + i, block[-1]), int(offsets[move.donor]) + layer, ())
                    for i, layer in enumerate(range(first, min(last, depth)))
                ]
                steps[begin:end] = _scaled(donated, number)
        return steps


def _scaled(steps: list[Step], number: int) -> list[Step]:
    """The same steps, scaled by one more move."""
    return [(place, layer, (*scaled_by, number)) for place, layer, scaled_by in steps]


PathSpace = IndicatorSpace | MoveSpace


def describe_path(path: LayerPath, origins: Sequence[tuple[int, int]], names: Mapping[int, str]) -> list[str]:
    """A path in words: runs of consecutive layers of one parent, with the scale that each is entered with."""
    runs: list[tuple[float, list[int]]] = []
    for layer, scale in zip(path.layers, path.scales, strict=True):
        before = runs[-1][1][-1] if runs else None
        if before is not None and layer == before + 1 and origins[layer][0] == origins[before][0] and scale == 1:
            runs[-1][1].append(layer)
        else:
            runs.append((scale, [layer]))
    lines = []
    for scale, run in runs:
        (parent, first), (_, last) = origins[run[0]], origins[run[-1]]
        span = f"layer {first}" if first == last else f"layers {first}-{last}"
        lines.append(f"{names[parent]} {span}" + ("" if scale == 1 else f", entered with {scale:.4g}"))
    return lines
