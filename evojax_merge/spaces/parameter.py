"""The parameter space: one genome is the parameters of a merge, per group of tensors and per parent.

May import merge_kernels, models.bank and spaces.bounds. Groups are runs of `layers_per_group` layers times the
component groups (attention, mlp, norm, or several together), then the embedding and, where it is untied, the head;
the final norm goes with the norms of the last layers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import jax
import jax.numpy as jnp
import numpy as np
from merge_kernels import DENSITY_STEPS, Method, grid_index

from evojax_merge.models.bank import Recipe
from evojax_merge.spaces.bounds import from_unit, to_unit


@dataclass(frozen=True)
class Axis:
    """A searched parameter: its bounds and where the search starts (a value per parent, or one in a tuple)."""

    name: str
    low: float
    high: float
    start: tuple[float, ...]


@dataclass(frozen=True)
class ParameterSpace:
    """Static description of the space. `components` partitions `names` (the components of a layer)."""

    method: Method
    parents: int
    layers: int
    layers_per_group: int
    names: tuple[str, ...]
    components: tuple[tuple[str, ...], ...]
    shared: tuple[str, ...]
    axes: tuple[Axis, ...]
    fixed: tuple[tuple[str, tuple[float, ...]], ...]

    @cached_property
    def groups(self) -> list[str]:
        """A label per group, in the order of the genome."""
        names = []
        for first in range(0, self.layers, self.layers_per_group):
            last = min(first + self.layers_per_group, self.layers) - 1
            span = f"layer {first}" if first == last else f"layers {first}-{last}"
            names += [f"{span} {'+'.join(part)}" for part in self.components]
        return names + [leaf for leaf in self.shared if leaf != "final_norm"]

    @cached_property
    def layer_groups(self) -> np.ndarray:
        """int[L, C]: the group of each layer and component."""
        part = [next(i for i, names in enumerate(self.components) if name in names) for name in self.names]
        blocks = np.arange(self.layers) // self.layers_per_group
        return blocks[:, None] * len(self.components) + np.array(part)[None, :]

    @cached_property
    def shared_groups(self) -> dict[str, int]:
        """The group of each shared leaf."""
        own = [leaf for leaf in self.shared if leaf != "final_norm"]
        first = len(self.groups) - len(own)
        groups = {leaf: first + i for i, leaf in enumerate(own)}
        groups["final_norm"] = int(self.layer_groups[-1, self.names.index("norm")])
        return groups

    def columns(self, name: str) -> int:
        return self.parents if self.method.parameter(name).per_parent else 1

    @property
    def dims(self) -> int:
        """D, the length of a genome."""
        return sum(len(self.groups) * self.columns(axis.name) for axis in self.axes)

    def values(self, genome: jax.Array) -> dict[str, jax.Array]:
        """The searched parameters in their units: name -> float32[groups, columns]. Densities are on the grid."""
        result, start = {}, 0
        for axis in self.axes:
            shape = (len(self.groups), self.columns(axis.name))
            block = genome[start : start + shape[0] * shape[1]].reshape(shape)
            start += shape[0] * shape[1]
            values = axis.low + (axis.high - axis.low) * to_unit(block)
            if self.method.parameter(axis.name).on_grid:
                values = grid_index(values).astype(jnp.float32) / DENSITY_STEPS
            result[axis.name] = values
        return result

    def recipe(self, genome: jax.Array) -> Recipe:
        """genome float32[D] -> Recipe. Traceable; vmap it for a population."""
        values = self.values(genome)
        for name, constants in self.fixed:
            rows = jnp.asarray(constants, jnp.float32)
            values[name] = jnp.broadcast_to(rows, (len(self.groups), self.columns(name)))
        per_group = {
            name: block if self.method.parameter(name).per_parent else block[:, 0] for name, block in values.items()
        }
        groups = self.shared_groups
        return Recipe(
            layers={name: block[self.layer_groups] for name, block in per_group.items()},
            shared={leaf: {name: block[groups[leaf]] for name, block in per_group.items()} for leaf in self.shared},
        )

    def genome(self, values: Mapping[str, np.ndarray]) -> np.ndarray:
        """The genome of given parameter values, name -> `[groups, columns]` (or what broadcasts to it)."""
        blocks = []
        for axis in self.axes:
            shape = (len(self.groups), self.columns(axis.name))
            unit = (np.broadcast_to(np.asarray(values[axis.name], np.float64), shape) - axis.low) / (
                axis.high - axis.low
            )
            blocks.append(from_unit(unit).ravel())
        return np.concatenate(blocks).astype(np.float32) if blocks else np.zeros(0, np.float32)

    @property
    def start(self) -> np.ndarray:
        """The genome that the search starts from."""
        return self.genome({axis.name: np.asarray(axis.start) for axis in self.axes})


def uniform_start(method: Method, name: str, parents: int) -> tuple[float, ...]:
    """A parameter's value in the uniform merge: weight 1/K, everything else at the method's default."""
    parameter = method.parameter(name)
    default = 1.0 / parents if parameter.default is None else parameter.default
    return (default,) * (parents if parameter.per_parent else 1)


def component_groups(text: Sequence[str], names: Sequence[str]) -> tuple[tuple[str, ...], ...] | None:
    """`["attention", "mlp+norm"]` -> groups, or None where they do not partition `names`."""
    groups = tuple(tuple(part.strip() for part in entry.split("+")) for entry in text)
    return groups if sorted(name for group in groups for name in group) == sorted(names) else None
