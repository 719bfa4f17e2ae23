"""The space of children: a genome names two members of a pool, the method that merges them, and its parameters.

The parameters are the same for all tensors, as in model breeding by hand. With a split point (M2N2, arXiv 2508.16204)
the layers before it are merged of the two parents in one order, those from it on in the other: the roles of the parents
are exchanged at the split.
"""

from dataclasses import dataclass, field, replace
from typing import NoReturn

import numpy as np
from merge_kernels import Method

from evojax_merge.errors import InputError
from evojax_merge.mergekit.write import shortest_decimal
from evojax_merge.schema.genealogy import FIRST, GENES, METHOD, NONE, NUMBER, SECOND, Genealogy, Member
from evojax_merge.spaces.parameter import uniform_start

# A child's parents.
PARENTS = 2


def genome_genes(methods: tuple[Method, ...], split: bool) -> int:
    """G, the number of a genome's genes: those of the method with the most parameters, and that of the split."""
    searched = ([each for each in method.parameters if each.searched] for method in methods)
    return max(sum(PARENTS if each.per_parent else 1 for each in parameters) for parameters in searched) + int(split)


@dataclass(frozen=True)
class BreedingSpace:
    """methods: the methods that a child may be bred by, by number; layers: L; split: whether there is a split point;
    genealogy: where parents are looked up."""

    methods: tuple[Method, ...]
    layers: int
    split: bool
    genealogy: Genealogy
    # By their genomes: equal members are one object.
    _members: dict[bytes, Member] = field(default_factory=dict, compare=False, repr=False)

    @property
    def dims(self) -> int:
        """D, the length of a genome."""
        return self.genealogy.founders.shape[1]

    @property
    def start(self) -> np.ndarray:
        """The first founder."""
        return np.asarray(self.genealogy.founders[0])

    def baselines(self) -> tuple[str, np.ndarray]:
        """All founders, unmerged."""
        return "best founder", self.genealogy.founders

    def seed_genomes(self, where: str, name: str) -> NoReturn:
        """Raises InputError: a pool's first candidates are its founders."""
        raise InputError(where, f"{name}: the first candidates of a pool are its founders; leave seeds out")

    def parents_among(self, genomes: np.ndarray) -> np.ndarray:
        """bool[P]: true for the genomes, float32[P, D], of founders."""
        return np.equal(np.asarray(genomes)[:, METHOD], NONE)

    def within(self, context: np.ndarray) -> "BreedingSpace":
        """The space of a search that has bred `context: float32[M, D]`, which the strategy lends it."""
        return replace(self, genealogy=replace(self.genealogy, offspring=context))

    def member(self, genome: np.ndarray) -> Member:
        """The member of a genome float32[D]."""
        return self.decode(genome[None])[0]

    def decode(self, genomes: np.ndarray) -> list[Member]:
        """The members of genomes float32[P, D], whose parents are in the genealogy."""
        genomes = np.asarray(genomes, np.float32)
        waiting = [*genomes]
        while waiting:
            # Parents first: a lineage may be longer than calls can be nested.
            descendant = waiting[-1]
            parents = (
                []
                if descendant[METHOD] == NONE
                else [self.genealogy.genome(int(descendant[i])) for i in (FIRST, SECOND)]
            )
            unknown = [parent for parent in parents if parent.tobytes() not in self._members]
            waiting += unknown
            if not unknown:
                waiting.pop()
                member = Member(int(descendant[NUMBER]))
                if parents:
                    method, genes = self.methods[int(descendant[METHOD])], descendant[GENES:]
                    place = min(int(genes[-1] * (self.layers + 1)), self.layers) if self.split else self.layers
                    bred_parents = tuple(self._members[parent.tobytes()] for parent in parents)
                    member = Member(member.number, bred_parents, method.name, _parameters(method, genes), place)
                self._members.setdefault(descendant.tobytes(), member)
        return [self._members[genome.tobytes()] for genome in genomes]


def _parameters(method: Method, genes: np.ndarray) -> dict[str, np.ndarray]:
    """The parameters that genes float32[G] in [0, 1] mean, from bound to bound; a parameter that is never searched has
    its default. The values are decimal fractions that a recipe can hold, densities with three digits."""
    values, taken = {}, 0
    for parameter in method.parameters:
        count = PARENTS if parameter.per_parent else 1
        if parameter.searched:
            shares = genes[taken : taken + count].astype(np.float64)
            taken += count
            numbers = parameter.low + (parameter.high - parameter.low) * shares
            decimals = [round(float(x), 3) if parameter.quantised else shortest_decimal(x) for x in numbers]
        else:
            decimals = list(uniform_start(method, parameter.name, PARENTS))
        values[parameter.name] = np.asarray(decimals if parameter.per_parent else decimals[0], np.float64)
    return values
