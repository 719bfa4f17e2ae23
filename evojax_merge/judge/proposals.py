"""The strategy `votes`: Bayesian optimisation around the strongest candidate.

CMA-ES goes by the order of a generation's candidates, which a few votes hardly show. The posterior of all votes says
more: where strengths are high, and where they may be. A generation consists of genomes that are the best in draws
from the posterior (Thompson sampling), among those drawn around the strongest candidate so far, around the highest
mean strength near it, and around its rivals, the best candidates of other draws, with steps that shorten from
generation to generation (after TuRBO, Eriksson et al., arXiv 1910.01739, and GimmBO, arXiv 2601.18585). Genomes stay
inside the bounds: beyond them other genomes stand for merges that were met before, which no distance between genomes
says.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from evojax_merge.config.search_config import VOTES
from evojax_merge.evaluation.scores import Scores
from evojax_merge.judge.ballot import Ballot
from evojax_merge.judge.posterior import Preferences
from evojax_merge.problem import SearchProblem
from evojax_merge.search.protocols import State, Strategy
from evojax_merge.search.strategies.cma_es import cma_es
from evojax_merge.search.strategies.registry import StrategySettings
from evojax_merge.spaces.bounds import EDGE

# The steps of the last generation, as a share of those of the first.
LAST_STEP = 0.5
# Genomes that are drawn around a centre, or around all rivals together; steps from the strongest candidate to the
# highest mean strength.
DRAWN, CLIMBS = 200, 3


def votes(settings: StrategySettings) -> Strategy:
    """Votes on the one task that people judge propose the candidates: draws from their posterior near the strongest."""
    # The first generation is drawn before anyone has voted; `proposing` joins the later ones to the votes.
    return replace(cma_es(settings), name=VOTES)


@dataclass(frozen=True)
class ProposedByVotes:
    """The strategy of a judged search. first: draws the first generation; dims: D; sigma: the standard deviation of
    steps in the first generation; generations: of the search. State: `first`'s, and `ended`, int32[]: the number of
    generations that votes have ended."""

    first: Strategy
    ballot: Ballot
    dims: int
    sigma: float
    generations: int

    @property
    def name(self) -> str:
        return self.first.name

    @property
    def population(self) -> int:
        return self.first.population

    def init(self, key: jax.Array, genomes: np.ndarray) -> State:
        return {"first": self.first.init(key, genomes), "ended": np.int32(0)}

    def ask(self, key: jax.Array, state: Any) -> tuple[Any, State]:
        ended = int(state["ended"])
        preferences = self.ballot.preferences(ended, self.dims)
        if not len(preferences.outcomes.weights):
            return _inside(np.asarray(self.first.ask(key, state["first"])[0])), state
        generator = np.random.default_rng(np.asarray(jax.random.key_data(key)))
        return propose(preferences, self.population, self._step(ended), generator), state

    def tell(self, key: jax.Array, state: Any, genomes: Any, scores: Scores) -> State:
        return {"first": state["first"], "ended": np.int32(state["ended"] + 1)}

    def finalists(self, state: Any) -> np.ndarray:
        """None: nobody has seen the posterior's own best genome, and those that votes put first are as good."""
        return np.zeros((0, self.dims), np.float32)

    def metrics(self, state: Any) -> dict[str, float]:
        return {"sigma": self._step(int(state["ended"]))}

    def _step(self, ended: int) -> float:
        """The standard deviation of steps in the generation after so many."""
        return self.sigma * LAST_STEP ** (ended / max(1, self.generations - 1))


def propose(preferences: Preferences, count: int, step: float, generator: np.random.Generator) -> np.ndarray:
    """float32[count, D]: genomes that may be better than all candidates so far."""
    strongest = preferences.genomes[preferences.at(preferences.genomes).mean.argmax()].astype(np.float32)
    highest = strongest
    for _ in range(CLIMBS):
        choices = np.concatenate([highest[None], _around(highest, step / 2, DRAWN, generator)])
        highest = choices[preferences.at(choices).mean.argmax()]
    candidates = np.unique(preferences.genomes, axis=0).astype(np.float32)
    rivals = candidates[np.unique(preferences.at(candidates).sample(count, generator).argmax(1))]
    drawn = np.concatenate([
        *(_around(centre, step, max(DRAWN, count), generator) for centre in (strongest, highest)),
        *(_around(rival, step, -(-DRAWN // len(rivals)), generator) for rival in rivals),
    ])  # fmt: skip
    proposed = list[np.ndarray]()
    while len(proposed) < count:
        best = preferences.at(drawn).sample(count, generator).argmax(1)
        # In the order of the draws, each once.
        proposed += [drawn[n] for n in dict.fromkeys(best.tolist())]
        drawn = np.delete(drawn, best, axis=0)
    return np.array(proposed[:count])


def _around(centre: np.ndarray, step: float, count: int, generator: np.random.Generator) -> np.ndarray:
    # As strategies do, in the precision in which candidates are made.
    return _inside((centre + step * generator.standard_normal((count, len(centre)))).astype(np.float32))


def _inside(genomes: np.ndarray) -> np.ndarray:
    """The genomes, each gene at the nearest that no other stands for (see `bounds.to_unit`)."""
    return np.clip(genomes, np.float32(-EDGE), np.float32(1 + EDGE))


def proposing(problem: SearchProblem[Any], ballots: Mapping[str, Ballot]) -> SearchProblem[Any]:
    """The problem with its strategy, if that is `votes`, joined to the votes on the task that is the fitness."""
    if problem.search.strategy != VOTES:
        return problem
    (ballot,) = [ballots[task.name] for task in problem.splits.search if task.weight > 0]
    search = problem.search
    proposed = ProposedByVotes(problem.strategy, ballot, problem.space.dims, search.sigma, search.generations)
    return replace(problem, strategy=proposed)
