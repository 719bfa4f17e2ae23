"""The members of a pool: founders, and children that were bred from two members each.

Members are numbered: founders have 0 to K - 1; child p of generation g (from 0) of P children has K + g P + p. A
genome, float32[4 + G], describes a member's birth: the member's number, the numbers of its two parents, the number of
the method that bred it, and G genes in [0, 1], of which the method takes the first few. A founder has no parents and no
method (-1).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from evojax_merge.errors import InputError

# The columns of a genome; the genes are all from the last on.
NUMBER, FIRST, SECOND, METHOD, GENES = range(5)
# Stands for no parent and no method.
NONE = -1
# A genome's numbers are float32.
MAX_MEMBERS = 2**24


def founder_genomes(founders: int, genes: int) -> np.ndarray:
    """float32[K, 4 + G]: the genomes of K founders."""
    genomes = np.zeros((founders, GENES + genes), np.float32)
    genomes[:, NUMBER] = np.arange(founders)
    genomes[:, FIRST:GENES] = NONE
    return genomes


@dataclass(frozen=True, eq=False)
class Member:
    """A member and its breeding: `parents` are two members; a founder has none. The method took `parameters` (float64:
    `[2]` per parent, or `[]`) for all tensors. For layers from `split` on, the second parent comes before the first."""

    number: int
    parents: tuple["Member", ...] = ()
    method: str = ""
    parameters: Mapping[str, np.ndarray] = field(default_factory=dict)
    split: int = 0

    @property
    def is_founder(self) -> bool:
        return not self.parents

    def ordered(self, layer: int) -> tuple["Member", ...]:
        """The parents in the order in which a layer is merged."""
        return self.parents if layer < self.split else self.parents[::-1]

    def lineage(self) -> list["Member"]:
        """The members that had to be bred for this one, in order of birth, with itself as the last; empty for a
        founder."""
        bred: dict[int, Member] = {}
        waiting = [self]
        while waiting:
            member = waiting.pop()
            if not member.is_founder and member.number not in bred:
                bred[member.number] = member
                waiting += member.parents
        return [bred[number] for number in sorted(bred)]


def member_name(member: Member, founders: Sequence[str]) -> str:
    """A member's name in trees and recipes. founders: their names, by number."""
    return founders[member.number] if member.is_founder else f"member-{member.number}"


@dataclass(frozen=True, eq=False)
class Genealogy:
    """The genomes of a pool's members by number, in which a child's parents are looked up.

    founders: `float32[K, 4 + G]`; offspring: `float32[M, 4 + G]`, with the numbers from K on, as in the strategy's
    state.
    """

    founders: np.ndarray
    offspring: np.ndarray

    def genome(self, number: int) -> np.ndarray:
        """float32[4 + G]: the genome of a member. Raises InputError for a number that no member has."""
        founders = len(self.founders)
        if not 0 <= number < founders + len(self.offspring):
            raise InputError(
                "genomes", f"a parent is member {number}; expected founders (0 to {founders - 1}) or members that the "
                "search has bred",
            )  # fmt: skip
        genome: np.ndarray = self.founders[number] if number < founders else self.offspring[number - founders]
        return genome


def founding_genealogy(founders: int, genes: int) -> Genealogy:
    """The genealogy of a pool that has bred nothing yet."""
    genomes = founder_genomes(founders, genes)
    return Genealogy(genomes, genomes[:0])
