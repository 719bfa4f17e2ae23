"""A ballot: the rounds in which judges compare the candidates of a search, and the strengths that their votes show.

A generation is a round. Its votes are asked for one after the other, each on the pair that `pairs` chooses, until the
round has had its part of the budget, or no further vote would say much. Several judges may vote at the same time, from
any thread; the search waits in `strengths`.
"""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np

from evojax_merge.errors import Failed
from evojax_merge.judge.batch import Batch, Pair
from evojax_merge.judge.pairs import Rule, information, top_two
from evojax_merge.judge.posterior import (
    Kernel,
    Outcomes,
    Posterior,
    distances_between,
    fit_kernel,
    fit_preferences,
    outcomes_of,
)
from evojax_merge.judge.votes import Round, Vote, VoteFile, digest
from evojax_merge.tasks.human import HumanTask
from evojax_merge.tasks.votes import Choice

# Nats of information below which a vote is not asked for: its winner is known, or the two are known to be equal.
LEAST_INFORMATION = 0.005
# The standard deviation of strengths before the first vote.
FIRST_DEVIATION = 2.0
# Seconds after which a question that nobody answers goes to another judge, where none is left for that one.
PATIENCE = 60.0
# Seconds between two looks at signals while the search waits for votes.
WAIT = 0.2


@dataclass(frozen=True)
class Question:
    """Two answers to a prompt, blind. number: names it in its vote; left, right: the answers; candidates: the numbers
    of those that wrote them."""

    number: int
    example: int
    prompt: str
    left: str
    right: str
    candidates: tuple[int, int]


@dataclass(frozen=True)
class Standing:
    """The part of a round that judges may see: its number from 1 on, the votes so far and at most, the votes that the
    search has left, and the strengths of its candidates (mean, standard deviation), best first. heldout: whether
    the winner is being compared; waiting: no question is open."""

    number: int
    votes: int
    most: int
    left: int
    strengths: tuple[tuple[int, float, float], ...]
    heldout: bool
    waiting: bool


class Ballot:
    """Holds one task's rounds. rounds: how many the search will hold; seed: of prompts, sides and equal pairs; wake:
    called where the search waits, so that signals are seen; rule: chooses the pairs; batch: votes come by file."""

    def __init__(
        self, task: HumanTask, file: VoteFile, rounds: int, seed: int, wake: Callable[[], None] = lambda: None,
        rule: Rule = top_two, batch: Batch | None = None,
    ) -> None:  # fmt: skip
        self.task, self._file, self._expected, self._seed, self._wake = task, file, rounds, seed, wake
        self._rule, self._batch = rule, batch
        self._changed = threading.Condition(threading.RLock())
        self._round: Round | None = None
        # The last generation that came.
        self._latest: Round | None = None
        self._texts: Sequence[Sequence[str]] = ()
        self._most = 0
        self._pairs: list[tuple[int, int]] | None = None
        self._examples = task
        self._kernel: Kernel | None = None
        self._posterior: Posterior | None = None
        self._open: dict[str, Question] = {}
        self._number = 0
        # When each question was asked, in seconds of a clock that nothing else depends on.
        self._asked_at: dict[int, float] = {}
        self._error: BaseException | None = None

    # -----------------------------------------------------------------------------------------------------------
    # The search's side

    def strengths(self, task: HumanTask, genomes: np.ndarray, texts: Sequence[Sequence[str]]) -> np.ndarray:
        """float64[P]: the posterior mean strengths of a generation's candidates, float32[P, D], which wrote `texts`,
        one for each prompt of the task, once the judges have voted on them. task: the ballot's, on the examples that
        generations are scored on."""
        with self._changed:
            one = self._latest = self._begin(genomes, texts, task)
            earlier = self._rounds()[:-1]
            left = max(0, self.task.votes - sum(len(each.votes) for each in earlier))
            share = -(-left // max(1, self._expected - len(earlier)))
            if not one.closed:
                self._kernel, self._most, self._pairs = self._fit_kernel(), min(left, share), None
                self._update()
                self._vote_until(self._is_decided)
                self._file.close(one)
            self._round = None
            return self.posterior(genomes)

    def posterior(self, genomes: np.ndarray) -> np.ndarray:
        """float64[P]: the mean strengths of candidates, float32[P, D], by the votes so far."""
        rounds = list(self._rounds())
        before = np.concatenate([np.zeros((0, genomes.shape[1])), *(each.genomes for each in rounds)])
        outcomes = self._outcomes(rounds)
        kernel = fit_kernel(before, outcomes) if len(outcomes.weights) else Kernel(1.0, FIRST_DEVIATION)
        return fit_preferences(np.concatenate([before, genomes]), outcomes, kernel).mean[len(before) :]

    def meetings(self, task: HumanTask, winner: Sequence[str], others: Sequence[Sequence[str]]) -> np.ndarray:
        """float64[K, N]: for each of K models and each prompt of the held-out task 1 where the judges preferred the
        model's answer to the winner's, -1 where they preferred the winner's, 0 where neither, or the answers are
        equal."""
        with self._changed:
            texts = [winner, *others]
            one = self._begin(np.zeros((len(texts), 0)), texts, task)
            self._pairs = [(0, k) for k in range(1, len(texts))]
            differing = [(k, n) for k in range(1, len(texts)) for n in range(task.size) if texts[k][n] != winner[n]]
            self._most = len(differing)
            if not one.closed:
                self._vote_until(lambda: len(one.votes) >= self._most)
                self._file.close(one)
            self._round = None
        result = np.zeros((len(others), task.size))
        for vote in one.votes:
            if vote.choice in ("left", "right"):
                preferred, other = (vote.left, vote.right) if vote.choice == "left" else (vote.right, vote.left)
                result[max(preferred, other) - 1, vote.example] = 1.0 if preferred else -1.0
        return result

    def _begin(self, genomes: np.ndarray, texts: Sequence[Sequence[str]], task: HumanTask) -> Round:
        """The round of these candidates: a new one, or the one that the file has of them."""
        rows = [",".join(map(repr, map(float, row))) for row in genomes]
        name = digest(task.name, *rows, *(text for candidate in texts for text in candidate))
        one = self._file.find(name) or self._file.open(name, task.name, genomes)
        self._round, self._texts, self._examples, self._open = one, texts, task, {}
        return one

    def _vote_until(self, decided: Callable[[], bool]) -> None:
        """Wait for votes, or ask the function that votes in place of people."""
        while not decided():
            if self._error is not None:
                raise Failed(f"task {self.task.name}: no judge can vote any more ({self._error})")
            if self.task.judge is not None:
                question = self.question(self.task.judge.name)
                if question is None:
                    return
                record = dict(self._examples.records[question.example])
                choice = self.task.judge.choose(record, question.prompt, question.left, question.right)
                self.vote(question.number, choice, self.task.judge.name)
            elif self._batch is not None:
                self._vote_by_file(self._batch)
            else:
                self._changed.notify_all()
                self._changed.wait(WAIT)
                self._wake()

    def _vote_by_file(self, batch: Batch) -> None:
        """Take the votes that were read on the pairs which the round wants next. Raises VotesAwaited where there are
        none, once these pairs are written."""
        assert self._round is not None
        asked: list[tuple[str, str, Question]] = []
        while (question := self.question(f"pair {len(asked)}")) is not None:
            name = digest(self._round.digest, str(question.example), *map(str, question.candidates))
            asked.append((f"pair {len(asked)}", name, question))
        given = [(slot, question, vote) for slot, name, question in asked for vote in batch.votes.get(name, [])[:1]]
        if not given:
            batch.write([
                Pair(name, self.task.question, question.prompt, question.left, question.right)
                for _, name, question in asked
            ])  # fmt: skip
        for slot, question, (choice, judge) in given:
            self.vote(question.number, choice, slot, judge=judge)
        self._open = {}

    def _rounds(self) -> list[Round]:
        """The generations so far. A file that is replayed has later ones as well, which say nothing yet."""
        rounds = [each for each in self._file.of_task(self.task.name) if each.genomes.shape[1]]
        return rounds if self._latest is None else rounds[: rounds.index(self._latest) + 1]

    def _fit_kernel(self) -> Kernel:
        rounds = self._rounds()
        genomes, outcomes = np.concatenate([each.genomes for each in rounds]), self._outcomes(rounds)
        if len(outcomes.weights):
            return fit_kernel(genomes, outcomes)
        distances = distances_between(genomes)
        return Kernel(float(np.median(distances[distances > 0])) if (distances > 0).any() else 1.0, FIRST_DEVIATION)

    @staticmethod
    def _outcomes(rounds: Sequence[Round]) -> Outcomes:
        starts = np.cumsum([0, *(len(each.genomes) for each in rounds)])
        return outcomes_of([
            (start + vote.left, start + vote.right, vote.choice, vote.weight)
            for start, each in zip(starts, rounds, strict=False)
            for vote in each.votes
        ])  # fmt: skip

    def _update(self) -> None:
        """The strengths of the round's candidates by the votes so far."""
        rounds = self._rounds()
        assert self._kernel is not None and self._round is not None
        fitted = fit_preferences(
            np.concatenate([each.genomes for each in rounds]), self._outcomes(rounds), self._kernel
        )
        start = sum(len(each.genomes) for each in rounds[: rounds.index(self._round)])
        kept = slice(start, start + len(self._round.genomes))
        self._posterior = Posterior(fitted.mean[kept], fitted.covariance[kept, kept], fitted.evidence)

    def _is_decided(self) -> bool:
        assert self._round is not None
        return len(self._round.votes) >= self._most or not self._informs(self._differing())

    # -----------------------------------------------------------------------------------------------------------
    # The judges' side

    def question(self, judge: str) -> Question | None:
        """The question that a judge answers next: the one that the judge has open, or another; None: there is none at
        the moment."""
        with self._changed:
            if self._round is None or self._round.closed:
                return None
            if judge in self._open:
                return self._open[judge]
            votes = len(self._round.votes) + len(self._open)
            chosen = None if votes >= self._most else self._next()
            if chosen is None:
                return self._left_behind(judge)
            (first, second), example = chosen
            generator = self._generator(votes, 1)
            left, right = (first, second) if generator.random() < 0.5 else (second, first)
            self._number += 1
            self._asked_at[self._number] = time.monotonic()
            self._open[judge] = Question(
                self._number, example, self._examples.prompt(example), self._texts[left][example],
                self._texts[right][example], (left, right),
            )  # fmt: skip
            return self._open[judge]

    def _left_behind(self, judge: str) -> Question | None:
        """The oldest question whose judge seems to have left, now the question of `judge`; None: there is none."""
        for other, question in self._open.items():
            if time.monotonic() - self._asked_at[question.number] > PATIENCE:
                self._asked_at[question.number] = time.monotonic()
                self._open[judge] = self._open.pop(other)
                return question
        return None

    def vote(self, number: int, choice: Choice, asked: str, weight: float = 1.0, judge: str = "") -> bool:
        """Write the answer to a question of `asked` down; judge: who answered, where that is another. False: the
        question is not open (any more)."""
        with self._changed:
            question = self._open.get(asked)
            if question is None or question.number != number or self._round is None:
                return False
            del self._open[asked]
            now = datetime.now(UTC).isoformat(timespec="seconds")
            left, right = question.candidates
            answers = digest(question.left), digest(question.right)
            self._file.add(
                self._round,
                Vote(question.example, left, right, choice, answers, judge or asked, weight, now),
            )
            if self._pairs is None:
                self._update()
            self._changed.notify_all()
            return True

    def standing(self) -> Standing:
        with self._changed:
            rounds = self._rounds()
            spent = sum(len(each.votes) for each in rounds)
            strengths: tuple[tuple[int, float, float], ...] = ()
            if self._posterior is not None and self._round is not None and self._pairs is None:
                rows = zip(self._posterior.mean, self._posterior.deviations, strict=True)
                named = [(number, float(mean), float(deviation)) for number, (mean, deviation) in enumerate(rows)]
                strengths = tuple(sorted(named, key=lambda row: -row[1]))
            return Standing(
                len(rounds), len(self._round.votes) if self._round else 0, self._most if self._round else 0,
                max(0, self.task.votes - spent), strengths, self._pairs is not None, self._round is None,
            )  # fmt: skip

    def stop(self, error: BaseException) -> None:
        """End the search's wait: no judge can vote any more."""
        with self._changed:
            self._error = error
            self._changed.notify_all()

    def _next(self) -> tuple[tuple[int, int], int] | None:
        """The next pair, and the prompt."""
        assert self._round is not None
        if self._pairs is not None:
            asked = {(max(vote.left, vote.right), vote.example) for vote in self._round.votes}
            asked |= {(max(one.candidates), one.example) for one in self._open.values()}
            for n in range(self._examples.size):
                for winner, k in self._pairs:
                    if self._texts[winner][n] != self._texts[k][n] and (k, n) not in asked:
                        return (winner, k), n
            return None
        pair = self._best_pair()
        if pair is None:
            return None
        # The prompt that the round has used least.
        used = np.zeros(self._examples.size)
        for example in [vote.example for vote in self._round.votes] + [one.example for one in self._open.values()]:
            used[example] += 1
        differing = [n for n in range(self._examples.size) if self._texts[pair[0]][n] != self._texts[pair[1]][n]]
        least = min(used[n] for n in differing)
        generator = self._generator(len(self._round.votes) + len(self._open), 2)
        return pair, int(generator.choice([n for n in differing if used[n] == least]))

    def _best_pair(self) -> tuple[int, int] | None:
        """The pair of candidates whose vote says most; None: no vote says enough."""
        allowed = self._differing()
        for one in self._open.values():
            left, right = one.candidates
            allowed[left, right] = allowed[right, left] = False
        if not allowed.any() or not self._informs(allowed):
            return None
        assert self._posterior is not None and self._round is not None
        return self._rule(self._posterior, allowed, self._generator(len(self._round.votes) + len(self._open), 0))

    def _differing(self) -> np.ndarray:
        """bool[P, P]: the pairs of candidates whose answers differ."""
        answers = [tuple(candidate) for candidate in self._texts]
        return np.array([[one != other for other in answers] for one in answers])

    def _informs(self, allowed: np.ndarray) -> bool:
        """Return whether a vote on one of the allowed pairs, bool[P, P], says enough to be asked for."""
        assert self._posterior is not None
        return float(np.max(information(self._posterior), where=allowed, initial=0.0)) >= LEAST_INFORMATION

    def _generator(self, votes: int, use: int) -> np.random.Generator:
        """The random numbers behind so many votes of the round, for one use of them."""
        assert self._round is not None
        return np.random.default_rng([self._seed % 2**32, int(self._round.digest, 16), votes, use])
