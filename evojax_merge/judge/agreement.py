"""How far judges agree, on the questions that two of them were asked."""

from collections.abc import Iterable
from dataclasses import dataclass

from evojax_merge.judge.votes import Round, Vote
from evojax_merge.tasks.voting import SWAPPED, Choice


@dataclass(frozen=True)
class Agreement:
    """Two judges on the same pairs of answers. shared: the number of these pairs; agreed: on how many they chose the
    same; kappa: Cohen's, the agreement beyond chance, None where chance alone would make them agree."""

    first: str
    second: str
    shared: int
    agreed: int
    kappa: float | None

    def describe(self) -> str:
        share = f"{self.agreed} of {self.shared} shared pairs alike"
        return f"{self.first} and {self.second}: {share}" + ("" if self.kappa is None else f", kappa {self.kappa:.2f}")


def asked(vote: Vote) -> tuple[int, int, int]:
    """The question of a vote, whichever side each answer was on: the candidates, ascending, and the prompt."""
    return min(vote.left, vote.right), max(vote.left, vote.right), vote.example


def agreements(rounds: Iterable[Round]) -> list[Agreement]:
    """The agreement of every two judges who share a question, in the order of their names."""
    chosen: dict[tuple[str, int, int, int], dict[str, Choice]] = {}
    for one in rounds:
        for vote in one.votes:
            choice = vote.choice if vote.left < vote.right else SWAPPED[vote.choice]
            chosen.setdefault((one.digest, *asked(vote)), {})[vote.judge] = choice
    pairs: dict[tuple[str, str], list[tuple[Choice, Choice]]] = {}
    for choices in chosen.values():
        names = sorted(choices)
        for k, first in enumerate(names):
            for second in names[k + 1 :]:
                pairs.setdefault((first, second), []).append((choices[first], choices[second]))
    result = []
    for judges, rows in sorted(pairs.items()):
        size, agreed = len(rows), sum(one == other for one, other in rows)
        by_chance = sum(
            sum(one == choice for one, _ in rows) * sum(other == choice for _, other in rows) for choice in SWAPPED
        ) / size**2  # fmt: skip
        kappa = None if by_chance == 1 else (agreed / size - by_chance) / (1 - by_chance)
        result.append(Agreement(*judges, size, agreed, kappa))
    return result
