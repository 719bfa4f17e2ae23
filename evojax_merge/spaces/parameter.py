"""The parameter space: one genome is the parameters of a merge, per group of tensors and per parent.

Groups are runs of `layers_per_group` layers times the component groups (attention, mlp, norm, or several together),
then the embedding and, where it is untied, the head; the final norm goes with the norms of the last layers. A component
group may name these too: they then go with it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from merge_kernels import METHODS, Method, on_grid

from evojax_merge.errors import InputError
from evojax_merge.models.architecture import LAYERS
from evojax_merge.models.bank import Recipe
from evojax_merge.spaces.bounds import from_unit, rows_among, to_unit_with_slope

# The density of trimmed task vectors (TIES-Merging, arXiv 2306.01708).
TRIMMED_DENSITY = 0.2
UNIFORM = "the uniform merge"
# The values of other parameters with which a parent of weight 1, and no other beside it, is merged to itself.
UNCHANGED = {"density": 1.0, "lambda": 1.0, "gamma": 0.0, "epsilon": 0.0}


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def keep_largest(weights: jax.Array, count: int) -> jax.Array:
    """The `count` weights of each row that are furthest from 0, float32[rows, columns], and 0 in place of the others.
    Weights that tie with the least of them are kept as well. The derivative is that of the weights themselves (a
    straight-through estimator)."""
    size = jnp.abs(weights)
    return jnp.where(size >= jax.lax.top_k(size, count)[0][:, -1:], weights, 0.0)


@keep_largest.defjvp
def _keep_largest_jvp(count: int, primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    return keep_largest(*primals, count), tangents[0]


@dataclass(frozen=True)
class SearchParameter:
    """A searched parameter: its bounds and the start of the search (a value per gene of a group, or one in a tuple)."""

    name: str
    low: float
    high: float
    start: tuple[float, ...]

    def outside(self, value: float) -> str | None:
        """The bound that keeps a value out, in words; None: the value is within the bounds."""
        if value < self.low:
            return f"{self.name}: low {self.low:g} is above {value:g}"
        return f"{self.name}: high {self.high:g} is below {value:g}" if value > self.high else None


@dataclass(frozen=True)
class GroupSpace:
    """The parameters of a merge for groups of tensors; a genome holds them in their order.

    `groups`: a label per group; `parent_groups`: the number of each parent's group, of parents that share their
    searched parameters; (): each parent has its own. `active`: the number of a group's weights that count, the largest;
    None: all.
    """

    method: Method
    parents: int
    groups: tuple[str, ...]
    search_parameters: tuple[SearchParameter, ...]
    constants: tuple[tuple[str, tuple[float, ...]], ...]
    parent_groups: tuple[int, ...] = ()
    active: int | None = None

    @cached_property
    def _searched(self) -> dict[str, SearchParameter]:
        return {searched.name: searched for searched in self.search_parameters}

    @cached_property
    def _starts(self) -> dict[str, Any]:
        """The searched parameters where the search starts, as `genome` takes them."""
        return {searched.name: np.asarray(searched.start, np.float64) for searched in self.search_parameters}

    def columns(self, name: str) -> int:
        """The number of genes that a group of tensors has for a searched parameter."""
        if not self.method.parameter(name).per_parent:
            return 1
        return max(self.parent_groups) + 1 if self.parent_groups else self.parents

    @property
    def dims(self) -> int:
        """D, the length of a genome."""
        return sum(len(self.groups) * self.columns(searched.name) for searched in self.search_parameters)

    def values(self, genome: jax.Array) -> dict[str, jax.Array]:
        """The searched parameters in their units: name -> float32[groups, K] per parent, or [groups, 1]. Densities are
        on the grid, and weights that are not active are 0."""
        result, start = {}, 0
        for searched in self.search_parameters:
            shape = (len(self.groups), self.columns(searched.name))
            block = genome[start : start + shape[0] * shape[1]].reshape(shape)
            start += shape[0] * shape[1]
            values = searched.low + (searched.high - searched.low) * to_unit_with_slope(block)
            if self.method.parameter(searched.name).quantised:
                values = on_grid(values)
            if searched.name == "weight" and self.active is not None:
                values = keep_largest(values, self.active)
            if self.parent_groups and self.method.parameter(searched.name).per_parent:
                values = values[:, np.array(self.parent_groups)]
            result[searched.name] = values
        return result

    def parameters(self, genome: jax.Array) -> dict[str, jax.Array]:
        """All parameters, searched and fixed, in the kernels' form: name -> float32[groups, K] or [groups]."""
        values = self.values(genome)
        for name, constants in self.constants:
            columns = self.parents if self.method.parameter(name).per_parent else 1
            values[name] = jnp.broadcast_to(jnp.asarray(constants, jnp.float32), (len(self.groups), columns))
        return {
            name: block if self.method.parameter(name).per_parent else block[:, 0] for name, block in values.items()
        }

    def named_values(self, genomes: np.ndarray, parents: Sequence[str]) -> dict[str, np.ndarray]:
        """The searched parameters of genomes float32[P, D] in their units: `weight[layers 0-3 attention][maths]` ->
        float32[P], without the parent for a parameter that all parents share. parents: what they are called."""
        columns, size = {}, len(genomes)
        # A few shapes for any number of genomes: a page of a running search shows as many as there are by then.
        rows = 256 * max(1, -(-size // 256))
        padded = np.zeros((rows, self.dims), np.float32)
        padded[:size] = genomes
        blocks = [_values(self, block) for block in np.split(padded, rows // 256)]
        for name in blocks[0]:
            values = np.concatenate([np.asarray(block[name]) for block in blocks])[:size]
            ends = [f"[{parent}]" for parent in parents] if self.method.parameter(name).per_parent else [""]
            for (group, column), end in zip(np.ndindex(values.shape[1:]), ends * len(self.groups), strict=True):
                columns[f"{name}[{self.groups[group]}]{end}"] = values[:, group, column]
        return columns

    def genome(self, values: Mapping[str, Any]) -> np.ndarray:
        """The genome of given values of the searched parameters, arrays that broadcast to `[groups, columns]`."""
        blocks = [np.zeros(0)]
        for searched in self.search_parameters:
            given = np.asarray(values[searched.name], np.float64)
            unit = (np.broadcast_to(given, (len(self.groups), self.columns(searched.name))) - searched.low) / (
                searched.high - searched.low
            )
            blocks.append(from_unit(unit).ravel())
        return np.concatenate(blocks).astype(np.float32)

    def _genomes(self, rows: Sequence[Mapping[str, Any]]) -> np.ndarray:
        """float32[S, D]: the genomes of S mappings of values."""
        return np.array([self.genome(row) for row in rows], np.float32).reshape(len(rows), self.dims)

    @property
    def start(self) -> np.ndarray:
        """The genome that the search starts from."""
        return self.genome(self._starts)

    def baselines(self) -> tuple[str, np.ndarray]:
        """The uniform merge: equal weights 1/K, the other searched parameters where the search starts."""
        values = dict(self._starts)
        if "weight" in values:
            uniform = uniform_start(self.method, "weight", self.parents)[:1]
            values["weight"] = np.clip(uniform, self._searched["weight"].low, self._searched["weight"].high)
        return "uniform merge", self._genomes([values])

    def seed_genomes(self, where: str, name: str) -> np.ndarray:
        """float32[S, D]: `uniform`: equal weights 1/K; `parents`: each parent alone, weight 1 for it and 0 for the
        others; `trimmed_parents`: these at density 0.2; `task_vectors`: all weights 1. The other parameters are where
        the search starts, and values outside of the bounds are moved to them. An interpolation between two parents has
        them at its ends, and is uniform in its middle.

        Raises InputError where a parameter that the seed sets is not searched, and where parents that share a weight
        would have different ones.
        """
        fraction, values = self.method.interpolates, self._starts
        shares = {"uniform": [0.5], "parents": [0.0, 1.0]}.get(name)
        if shares is not None and fraction in values:
            return self._clipped([{fraction: share} for share in shares])
        weights = {"uniform": np.full((1, 1), 1 / self.parents), "task_vectors": np.ones((1, 1))}.get(
            name, np.eye(self.parents)
        )
        trimmed = {"density": TRIMMED_DENSITY} if name == "trimmed_parents" else {}
        missing = next((parameter for parameter in ("weight", *trimmed) if parameter not in values), None)
        if missing is not None:
            raise InputError(
                where, f"{name}: {self.method.name} searches no {missing} here; search it, or leave this out"
            )
        if name == "parents" and self.method.stores_vectors:
            raise InputError(where, f"{name}: {self.method.name} changes every task vector; leave this out")
        if self.parent_groups and len(weights) > 1:
            raise InputError(where, f"{name}: the parents of a group share their weight; leave this out")
        return self._clipped([trimmed | {"weight": row} for row in weights])

    def _clipped(self, rows: Sequence[dict[str, Any]]) -> np.ndarray:
        """The genomes of values, the others where the search starts; values outside of the bounds are moved to them."""
        return self._genomes([
            {name: np.clip((self._starts | row)[name], axis.low, axis.high) for name, axis in self._searched.items()}
            for row in rows
        ])  # fmt: skip

    def plain_merges(self) -> tuple[np.ndarray, tuple[str, ...]]:
        """The uniform merge, with the other parameters where the search starts, and each parent alone, as far as the
        bounds, the fixed parameters and the groups of parents allow. A method without weights, or one parameter that
        leads from parent to parent, has none."""
        names, fraction = [parameter.name for parameter in self.method.parameters], self.method.interpolates
        mixing = fraction if fraction in names else "weight"
        if mixing not in names:
            return self._genomes([]), ()
        every_parent = "every parent" if self.parents > 1 else "the parent"
        if mixing not in self._searched:
            return self._genomes([]), (f"{every_parent} ({mixing} is fixed)",)
        axis = self._searched[mixing]
        uniform = 0.5 if mixing == fraction else uniform_start(self.method, mixing, self.parents)[0]
        # In words, why the space leaves it out (None: it does not), and its values.
        merges: list[tuple[str, str | None, dict[str, Any]]] = [(UNIFORM, axis.outside(uniform), {mixing: uniform})]
        if mixing == fraction:
            merges += [(f"parents[{k}]", axis.outside(share), {mixing: share}) for k, share in enumerate((0.0, 1.0))]
        else:
            complaint = (
                axis.outside(1.0) or (axis.outside(0.0) if self.parents > 1 else None) or self._change_of_parents()
            )
            if complaint is not None:
                merges.append((every_parent, complaint, {}))
            for k, row in enumerate(np.eye(self.columns(mixing)) if complaint is None else ()):
                members = [f"parents[{parent}]" for parent, group in enumerate(self.parent_groups) if group == k]
                alone = None if len(members) < 2 else "they share their parameters"
                merges.append((" and ".join(members), alone, UNCHANGED | {mixing: row}))
        genomes = self._genomes([self._starts | values for _, complaint, values in merges if complaint is None])
        _, kept = np.unique(genomes, axis=0, return_index=True)
        missing = tuple(f"{what} ({complaint})" for what, complaint, _ in merges if complaint is not None)
        return genomes[np.sort(kept)], missing

    def averages(self, where: str, members: np.ndarray) -> np.ndarray:
        """float32[S, D]: uniform averages of parents. members: bool[S, K], the parents in each. Raises InputError where
        the method, its fixed parameters, the bounds or the groups of parents leave them out."""
        mixing = self.method.interpolates or "weight"
        if not self.method.averages:
            averaging = ", ".join(name for name, method in METHODS.items() if method.averages)
            complaint: str | None = f"{self.method.name} averages no weights; expected one of {averaging}"
        elif mixing not in self._searched or self.parent_groups:
            complaint = "parents of a group share their weight" if mixing in self._searched else f"{mixing} is fixed"
        else:
            axis = self._searched[mixing]
            complaint = axis.outside(0.0) or axis.outside(1.0) or self._change_of_parents()
        if complaint is not None:
            raise InputError(where, f"the space lacks the averages of some parents: {complaint}")
        shares = np.asarray(members) / np.sum(members, axis=1, keepdims=True)
        # An interpolation has the share of the second parent.
        first = 1 if self.method.interpolates else 0
        return self._genomes([self._starts | UNCHANGED | {mixing: row[first:]} for row in shares])

    def parents_among(self, genomes: np.ndarray) -> np.ndarray:
        """bool[P]: true for the genomes, float32[P, D], of parents alone."""
        merges, missing = self.plain_merges()
        uniform = 0 if any(line.startswith(UNIFORM) for line in missing) else 1
        return rows_among(genomes, merges[uniform:])

    def decode(self, genomes: np.ndarray) -> Any:
        """Genomes go to the evaluator unchanged: its program merges them."""
        return genomes

    def pull_back(self, genomes: np.ndarray, cotangents: Any) -> np.ndarray:
        derivatives: np.ndarray = cotangents
        return derivatives

    def _change_of_parents(self) -> str | None:
        """The method, or the parameter beside the weight, that leaves no parent as it is, in words; None: none does."""
        if self.method.stores_vectors:
            return f"{self.method.name} changes every task vector"
        constants = dict(self.constants)
        for name, value in UNCHANGED.items():
            complaint = self._searched[name].outside(value) if name in self._searched else None
            if complaint is None and any(number != value for number in constants.get(name, ())):
                complaint = f"{name} is fixed, not at {value:g}"
            if complaint is not None:
                return complaint
        return None


@dataclass(frozen=True, kw_only=True)
class ParameterSpace(GroupSpace):
    """The parameters of a merge of decoders. `components` partitions `names` (the components of a layer).

    It may name shared leaves, too: the embedding then goes with that component of the first layers, the final norm and
    head of the last; shared leaves that are named without a component have one group of their own. `smooth`: a layer's
    parameters are interpolated between the groups of layers, the first and last of which stand for the first and last
    layer; shared leaves go with the first. `further_stacks`: the stacks of layers beside `layers`, each with the
    numbers of its layers, whose parameters are those of these layers.
    """

    groups: tuple[str, ...] = field(init=False)
    layers: int
    layers_per_group: int
    names: tuple[str, ...]
    components: tuple[tuple[str, ...], ...]
    shared: tuple[str, ...]
    smooth: bool = False
    further_stacks: tuple[tuple[str, tuple[int, ...]], ...] = ()

    def __post_init__(self) -> None:
        names = []
        for span in layer_spans(self.layers, self.layers_per_group):
            names += [f"{span} {'+'.join(part)}" for part in self.layer_components]
        object.__setattr__(self, "groups", (*names, *map("+".join, self.shared_components)))

    @cached_property
    def layer_components(self) -> tuple[tuple[str, ...], ...]:
        """The component groups that every group of layers has."""
        return tuple(part for part in self.components if set(part) & set(self.names))

    @cached_property
    def shared_components(self) -> tuple[tuple[str, ...], ...]:
        """The groups of shared leaves alone."""
        named = {name for part in self.components for name in part}
        together = [tuple(leaf for leaf in part if leaf in self.shared) for part in self.components
                    if part not in self.layer_components]  # fmt: skip
        others = [(leaf,) for leaf in self.shared if leaf not in named and leaf != "final_norm"]
        return tuple(part for part in [*together, *others] if part)

    @cached_property
    def blocks(self) -> np.ndarray:
        """int[L]: the group of layers of each layer."""
        return np.arange(self.layers) // self.layers_per_group

    @cached_property
    def component_ids(self) -> np.ndarray:
        """int[C]: the component group of each component."""
        return np.array(
            [next(i for i, part in enumerate(self.layer_components) if name in part) for name in self.names]
        )

    @cached_property
    def shared_groups(self) -> dict[str, int]:
        """The group of each shared leaf."""
        count = len(self.layer_components)
        last, first_alone = int(self.blocks[-1]) * count, (int(self.blocks[-1]) + 1) * count
        groups = {leaf: first_alone + i for i, part in enumerate(self.shared_components) for leaf in part}
        for leaf in self.shared:
            if leaf in groups:
                continue
            with_ = next((i for i, part in enumerate(self.layer_components) if leaf in part), None)
            if with_ is None:
                groups[leaf] = last + int(self.component_ids[self.names.index("norm")])
            else:
                groups[leaf] = with_ if self.smooth or leaf == "embed" else last + with_
        return groups

    def recipe(self, genome: jax.Array) -> Recipe:
        """genome float32[D] -> Recipe. Traceable; vmap it for a population."""
        per_group, groups = self.parameters(genome), self.shared_groups
        layers = {name: self._by_layer(name, block)[:, self.component_ids] for name, block in per_group.items()}
        further = {
            stack: {name: values[np.array(numbers)] for name, values in layers.items()}
            for stack, numbers in self.further_stacks
        }
        return Recipe(
            stacks={LAYERS: layers, **further},
            shared={leaf: {name: block[groups[leaf]] for name, block in per_group.items()} for leaf in self.shared},
        )

    def decode(self, genomes: np.ndarray) -> Recipe:
        """genomes float32[P, D] -> the recipes of P merges."""
        return _recipes(self, jnp.asarray(genomes))

    def pull_back(self, genomes: np.ndarray, cotangents: Recipe) -> np.ndarray:
        """float32[P, D]: derivatives by genomes of a function whose derivatives by their recipes are `cotangents`."""
        return np.asarray(_pull_back(self, jnp.asarray(genomes), cotangents))

    def _by_layer(self, name: str, block: jax.Array) -> jax.Array:
        """A parameter by group -> by layer and component group: float32[L, parts] or [L, parts, K]."""
        count = int(self.blocks[-1]) + 1
        table = block[: count * len(self.layer_components)].reshape(count, len(self.layer_components), *block.shape[1:])
        if not self.smooth or name not in self._searched:
            return table[self.blocks]
        at = np.linspace(0.0, count - 1.0, self.layers) if self.layers > 1 else np.zeros(1)
        below = np.floor(at).astype(int)
        above = np.minimum(below + 1, count - 1)
        share = jnp.asarray((at - below).reshape(-1, *(1,) * (table.ndim - 1)), jnp.float32)
        values = (1 - share) * table[below] + share * table[above]
        return on_grid(values) if self.method.parameter(name).quantised else values


@partial(jax.jit, static_argnums=0)
def _values(space: GroupSpace, genomes: jax.Array) -> dict[str, jax.Array]:
    return jax.vmap(space.values)(genomes)


@partial(jax.jit, static_argnums=0)
def _recipes(space: ParameterSpace, genomes: jax.Array) -> Recipe:
    return jax.vmap(space.recipe)(genomes)


@partial(jax.jit, static_argnums=0)
def _pull_back(space: ParameterSpace, genomes: jax.Array, cotangents: Recipe) -> jax.Array:
    def one(genome: jax.Array, cotangent: Recipe) -> jax.Array:
        gradient: jax.Array = jax.vjp(space.recipe, genome)[1](cotangent)[0]
        return gradient

    return jax.vmap(one)(genomes, cotangents)


def layer_spans(layers: int, layers_per_group: int) -> list[str]:
    """The labels of groups of so many neighbouring layers."""
    firsts = range(0, layers, layers_per_group)
    lasts = [min(first + layers_per_group, layers) - 1 for first in firsts]
    return [f"layer {a}" if a == b else f"layers {a}-{b}" for a, b in zip(firsts, lasts, strict=True)]


def uniform_start(method: Method, name: str, parents: int) -> tuple[float, ...]:
    """A parameter's value in the uniform merge: weight 1/K, else the method's default, or where a search starts."""
    parameter = method.parameter(name)
    defaults = (value for value in (parameter.default, parameter.start) if value is not None)
    return (next(defaults, 1.0 / parents),) * (parents if parameter.per_parent else 1)


def component_groups(
    text: Sequence[str], names: Sequence[str], shared: Sequence[str] = ()
) -> tuple[tuple[str, ...], ...] | None:
    """`["attention", "mlp+norm"]` -> groups, or None where they do not partition `names` (with any of `shared`)."""
    groups = tuple(tuple(part.strip() for part in entry.split("+")) for entry in text)
    given = [name for group in groups for name in group]
    others = [name for name in given if name in shared]
    fits = sorted(name for name in given if name not in shared) == sorted(names) and len(set(others)) == len(others)
    return groups if fits else None
