"""The space of mixtures of experts: a genome says, for each group of layers, which model's MLP stands at each of the
router's numbers, and the scale and the bias of each gate; or that the layers have one model's MLP alone.

Genomes are decoded on the host, in units of the bounds, as in `spaces.parameter`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from evojax_merge.errors import InputError
from evojax_merge.spaces.bounds import from_unit, inside
from evojax_merge.spaces.parameter import layer_spans

# The names of what may be searched, in a genome's order.
SEARCHED = ("scale", "bias", "experts", "dense")
# The genes in [0, 1] above which a group of layers is dense, and with which a search begins.
DENSE, MIXED = 0.5, 0.25


@dataclass(frozen=True)
class Mixtures:
    """P mixtures of K models, of L layers with E experts each. experts: int64[P, L, E], the model of each expert;
    scale, bias: float64[P, L, E], of its gate."""

    experts: np.ndarray
    scale: np.ndarray
    bias: np.ndarray


@dataclass(frozen=True)
class MixtureSpace:
    """layers: L; layers_per_group: the number of neighbouring layers that share their genes; models: K; slots: E;
    searched: some of `SEARCHED`; scale: the bounds, searched as logarithms; bias: the upper bound, and minus the lower
    one. What is not searched is as in the start."""

    layers: int
    layers_per_group: int
    models: int
    slots: int
    searched: tuple[str, ...]
    scale: tuple[float, float]
    bias: float

    @property
    def groups(self) -> list[str]:
        return layer_spans(self.layers, self.layers_per_group)

    @cached_property
    def _widths(self) -> dict[str, int]:
        return {name: 1 if name == "dense" else self.slots for name in SEARCHED if name in self.searched}

    @property
    def dims(self) -> int:
        return len(self.groups) * sum(self._widths.values())

    def _genome(self, dense: int | None = None) -> np.ndarray:
        """The genome of plain gates, and of layers that all have one model's MLP (None: they are mixtures)."""
        low, high = np.log(self.scale)
        numbers = np.arange(self.slots) % self.models if dense is None else np.full(self.slots, dense)
        units = {
            "scale": np.full(self.slots, -low / (high - low)), "bias": np.full(self.slots, 0.5),
            "experts": (numbers + 0.5) / self.models, "dense": np.full(1, MIXED if dense is None else 1 - MIXED),
        }  # fmt: skip
        group = np.concatenate([units[name] for name in self._widths])
        return np.tile(from_unit(group), len(self.groups)).astype(np.float32)

    @property
    def start(self) -> np.ndarray:
        """The plain gates."""
        return self._genome()

    def baselines(self) -> tuple[str, np.ndarray]:
        """The plain gates: every scale is 1, every bias 0."""
        return "plain gates", self.start[None]

    def seed_genomes(self, where: str, name: str) -> np.ndarray:
        """float32[K, D]: the MLPs of one model in all layers. Raises InputError for all seeds but `parents`, and where
        the models of experts are not searched."""
        if name != "parents" or "experts" not in self.searched:
            raise InputError(
                where,
                f"{name}: a mixture is no merge of weights; leave seeds out (parents: where experts are searched)",
            )
        return np.stack([self._genome(dense=model) for model in range(self.models)])

    def values(self, genomes: np.ndarray) -> dict[str, np.ndarray]:
        """The searched values of genomes float32[P, D]: name -> float64[P, groups, E], of `dense` [P, groups, 1]. They
        have so few digits that a recipe holds them exactly."""
        unit = inside(genomes)
        splits = np.cumsum(list(self._widths.values()))[:-1]
        units = dict(
            zip(self._widths, np.split(unit.reshape(len(unit), len(self.groups), -1), splits, -1), strict=True)
        )
        low, high = np.log(self.scale)
        decode = {
            "scale": lambda x: np.float64(np.round(np.exp(low + (high - low) * x), 6)),
            "bias": lambda x: np.float64(np.round(self.bias * (2 * x - 1), 6)),
            "experts": lambda x: np.minimum(np.floor(x * self.models), self.models - 1),
            "dense": lambda x: np.float64(x > DENSE),
        }
        return {name: decode[name](x) for name, x in units.items()}

    def named_values(self, genomes: np.ndarray, parents: Sequence[str]) -> dict[str, np.ndarray]:
        """The searched values of genomes float32[P, D] by their names: `scale[layers 0-3][expert 0]` -> float64[P]."""
        return {
            f"{name}[{group}]" + ("" if name == "dense" else f"[expert {number}]"): values[:, row, number]
            for name, values in self.values(genomes).items()
            for row, group in enumerate(self.groups)
            for number in range(values.shape[-1])
        }

    def decode(self, genomes: np.ndarray) -> Mixtures:
        """The mixtures of genomes float32[P, D]. A dense layer has its first expert at every number, with equal gates,
        so that the experts' shares of a token are equal and the layer is that MLP."""
        shape = (len(genomes), len(self.groups), self.slots)
        values = self.values(genomes)
        dense = values.get("dense", np.zeros(())) > 0
        experts = values.get("experts", np.arange(self.slots) % self.models)
        experts = np.where(dense, np.broadcast_to(experts, shape)[..., :1], experts).astype(np.int64)
        # All experts of a layer may be one model without its gene for that.
        is_one = dense | (experts == experts[..., :1]).all(axis=-1, keepdims=True)
        fields = (
            experts,
            *(np.where(is_one, 0.0, values.get(name, plain)) for name, plain in (("scale", 1.0), ("bias", 0.0))),
        )
        rows = np.arange(self.layers) // self.layers_per_group
        return Mixtures(*(np.broadcast_to(field, shape)[:, rows] for field in fields))
