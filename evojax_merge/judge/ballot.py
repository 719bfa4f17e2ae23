"""A ballot: the rounds in which judges compare the candidates of a search, and the strengths that their votes show.

A generation is a round. Its votes are asked for one after the other, each on the pair that `pairs` chooses, until the
round has had its part of the budget, or no further vote would say much. Several judges may vote at the same time, from
any thread; the search waits in `strengths`.
"""

import threading
import time
from base64 import b64encode
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np

from evojax_merge.errors import Failed, InputError
from evojax_merge.judge.agreement import Agreement, agreements, asked
from evojax_merge.judge.batch import VotesAwaited, write_pairs
from evojax_merge.judge.pairs import Rule, challenged, information
from evojax_merge.judge.posterior import Kernel, Posterior, Preferences, fit_kernel, fit_preferences, outcomes_of
from evojax_merge.judge.votes import FilePair, Round, Vote, VoteFile, digest
from evojax_merge.tasks.voting import Choice, JudgedTask

# Nats of information below which a vote is not asked for: its winner is known, or the two are known to be equal.
LEAST_INFORMATION = 0.005
# How many of the best candidates of earlier generations meet those of a new one: without them, votes would compare
# candidates of one generation alone.
INCUMBENTS = 12
# The share of a judge's questions that another judge has answered as well, so that their agreement is seen.
SHARED = 0.15
# How many votes for a tie count as much as that two candidates gave the same answers.
EQUAL = 10.0
# Seconds after which a question whose judge asks no more goes to another judge, where none is left for that one. A
# page that is open asks every five seconds.
PATIENCE = 15.0
# Seconds between two looks at signals while the search waits for votes.
WAIT = 0.2


# A genome, float32[D] -> what its candidate is made of, in lines; None: there is nothing to say.
Describe = Callable[[np.ndarray], str | None]


@dataclass
class Question:
    """Two answers to a prompt, blind. number: names it in its vote; left, right: the answers; candidates: those that
    wrote them; asked: when its judge asked for it last, by a clock that nothing else depends on."""

    number: int
    example: int
    prompt: str
    left: str
    right: str
    candidates: tuple[int, int]
    asked: float = field(default_factory=time.monotonic, compare=False)


def _equals(rounds: Sequence[Round]) -> list[tuple[int, int, Choice, float]]:
    """Ties of candidates that gave the answers of an earlier one to all prompts, though their genomes differ: they are
    as good as each other, and nobody has to be asked."""
    first: dict[str, tuple[int, bytes]] = {}
    ties: dict[bytes, tuple[int, int, Choice, float]] = {}
    start = 0
    for one in rounds:
        for number, (genome, answers) in enumerate(zip(one.genomes, one.answers, strict=False), start):
            earliest, same = first.setdefault(answers, (number, genome.tobytes()))
            if genome.tobytes() != same:
                ties[genome.tobytes()] = (earliest, number, "tie", EQUAL)
        start += len(one.genomes)
    return list(ties.values())


class Ballot:
    """Holds one task's rounds. rounds: how many the search will hold; seed: of prompts, sides and equal pairs; wake:
    called where the search waits, so that signals are seen; rule: chooses the pairs; pairs: the file for those that
    wait for votes, where these come by file; done: the generations so far; log: prints a line."""

    def __init__(
        self, task: JudgedTask, file: VoteFile, rounds: int, seed: int, wake: Callable[[], None] = lambda: None,
        rule: Rule = challenged, pairs: Path | None = None, done: int = 0,
        log: Callable[[str], None] = lambda line: None,
    ) -> None:  # fmt: skip
        self.task, self._file, self._expected, self._seed, self._wake = task, file, rounds, seed, wake
        self._rule, self._pairs_file, self._done, self._log = rule, pairs, done, log
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
        # A page that an earlier process served may send a vote: that process had other numbers.
        self._number = time.time_ns() // 1_000_000
        self._error: BaseException | None = None
        self._describe: Describe = lambda genome: None
        # The answers of all candidates so far, by the bytes of their genomes.
        self.answers: dict[bytes, Sequence[str]] = {}

    # -----------------------------------------------------------------------------------------------------------
    # The search's side

    def strengths(
        self, task: JudgedTask, genomes: np.ndarray, texts: Sequence[Sequence[str]],
        describe: Describe = lambda one: None,
    ) -> np.ndarray:  # fmt: skip
        """float64[P]: the posterior mean strengths of a generation's candidates, float32[P, D], which wrote `texts`,
        one for each prompt of the task, once the judges have voted on them. task: the ballot's, on the examples that
        generations are scored on; describe: what a genome's candidate is made of."""
        with self._changed:
            self._describe = describe
            self.answers |= {genome.tobytes(): written for genome, written in zip(genomes, texts, strict=True)}
            one = self._latest = self._begin(genomes, texts, task)
            earlier = self._rounds()[:-1]
            left = max(0, self.task.voting.config.votes - sum(len(each.votes) for each in earlier))
            remaining = self._expected - len(earlier)
            # The last generation has two shares: its votes say which of the best candidates wins.
            share = -(-left // (remaining + 1)) if remaining > 1 else left
            if not one.closed:
                # By the votes before the round, so that a search that goes on in its middle asks the same questions.
                before = [replace(each, votes=[]) if each is one else each for each in self._rounds()]
                self._kernel = self._preferences_of(before, genomes.shape[1]).kernel
                self._most, self._pairs = min(left, share), None
                self._update()
                self._vote_until(lambda: len(one.votes) >= self._most or not self._informs(self._differing()))
                self._file.close(one)
            self._round = None
            return self.posterior(genomes)

    def incumbents(self, genomes: np.ndarray, count: int = INCUMBENTS) -> np.ndarray:
        """float64[K, D]: the best candidates before the generation of these genomes, float32[P, D], best first."""
        with self._changed:
            generations = self._generations()
            met = (n for n, one in enumerate(generations) if np.array_equal(one.genomes[: len(genomes)], genomes))
            earlier = generations[: next(met, len(generations))]
            return self._best_of(earlier, count, genomes.shape[1])

    def best(self, count: int) -> np.ndarray:
        """float64[K, D]: the best candidates of all generations so far by the votes on them, best first."""
        with self._changed:
            rounds = self._rounds()
            return self._best_of(rounds, count, rounds[0].genomes.shape[1] if rounds else 0)

    def _best_of(self, rounds: Sequence[Round], count: int, dims: int) -> np.ndarray:
        preferences = self._preferences_of(rounds, dims)
        if not len(preferences.outcomes.weights):
            return np.zeros((0, dims))
        mean = preferences.at(preferences.genomes).mean
        # A candidate that met several generations stands in each of their rounds.
        order = dict.fromkeys(tuple(preferences.genomes[n]) for n in np.argsort(-mean, kind="stable"))
        return np.array(list(order)[:count], float).reshape(-1, dims)

    def posterior(self, genomes: np.ndarray) -> np.ndarray:
        """float64[P]: the mean strengths of candidates, float32[P, D], by the votes so far."""
        return self._preferences_of(self._rounds(), genomes.shape[1]).at(genomes).mean

    def preferences(self, generations: int, dims: int) -> Preferences:
        """The preferences that the votes on so many first generations of candidates, float32[P, D], show."""
        with self._changed:
            return self._preferences_of(self._generations()[:generations], dims)

    def _preferences_of(self, rounds: Sequence[Round], dims: int, kernel: Kernel | None = None) -> Preferences:
        """The preferences that the votes on candidates of D dimensions show. kernel: by default the one that fits."""
        starts = np.cumsum([0, *(len(each.genomes) for each in rounds)])
        votes: list[tuple[int, int, Choice, float]] = [
            (start + vote.left, start + vote.right, vote.choice, vote.weight)
            for start, each in zip(starts, rounds, strict=False)
            for vote in each.votes
        ]
        genomes = np.concatenate([np.zeros((0, dims)), *(one.genomes for one in rounds)])
        outcomes = outcomes_of(votes + _equals(rounds) if votes else [])
        return Preferences(genomes, outcomes, kernel or fit_kernel(genomes, outcomes))

    def meetings(self, task: JudgedTask, winner: Sequence[str], others: Sequence[Sequence[str]]) -> np.ndarray:
        """float64[K, N]: for each of K models and each prompt of the held-out task 1 where the judges preferred the
        model's answer to the winner's, -1 where the winner's, 0 where neither, or the answers are equal."""
        with self._changed:
            texts = [winner, *others]
            one = self._begin(np.zeros((len(texts), 0)), texts, task)
            self._pairs = [(0, k) for k in range(1, len(texts))]
            self._most = sum(text != ours for other in others for text, ours in zip(other, winner, strict=True))
            if not one.closed:
                self._vote_until(lambda: len(one.votes) >= self._most)
                self._file.close(one)
            self._round = None
        result = np.zeros((len(others), task.size))
        for vote in one.votes:
            if vote.choice in ("left", "right"):
                preferred = vote.left if vote.choice == "left" else vote.right
                result[max(vote.left, vote.right) - 1, vote.example] = 1.0 if preferred else -1.0
        return result

    def _begin(self, genomes: np.ndarray, texts: Sequence[Sequence[str]], task: JudgedTask) -> Round:
        """The round of these candidates: a new one, or the one that the file has of them."""
        rows = [",".join(map(repr, map(float, row))) for row in genomes]
        name = digest(task.name, *rows, *(text for candidate in texts for text in candidate))
        one = self._file.find(name)
        if one is None:
            generations = self._generations()
            begun = self._done if self._latest is None else generations.index(self._latest) + 1
            if genomes.shape[1] and generations[begun:]:
                raise InputError(
                    self._file.path, f"its votes on task {self.task.name} are of other candidates than this search's: "
                    "it is of another run, or of one with other settings; leave --replay out, or replay its own config",
                )  # fmt: skip
            one = self._file.open(name, task.name, genomes, [digest(*candidate) for candidate in texts])
        self._round, self._texts, self._examples, self._open = one, texts, task, {}
        return one

    def _vote_until(self, decided: Callable[[], bool]) -> None:
        """Wait for votes, or ask the function that votes in place of people."""
        if self.task.voting.judge is None and self._pairs_file is None and not decided():
            assert self._round is not None
            what = f"generation {len(self._rounds())}" if self._pairs is None else "the winner against the other models"
            given = f", {len(self._round.votes)} are there" if self._round.votes else ""
            self._log(f"{self.task.name}: {what}: waiting for votes, at most {self._most}{given}")
        while not decided():
            if self._error is not None:
                raise Failed(f"task {self.task.name}: no judge can vote any more ({self._error})")
            judge = self.task.voting.judge
            if judge is not None:
                question = self.question(judge.name)
                if question is None:
                    return
                left, right = map(self._examples.content, (question.left, question.right))
                choice = judge.choose(self._examples.record(question.example), question.prompt, left, right)
                self.vote(question.number, choice, judge.name)
            elif self._pairs_file is not None:
                self._write_pairs(self._pairs_file)
            else:
                self._changed.notify_all()
                self._changed.wait(WAIT)
                self._wake()

    def _write_pairs(self, path: Path) -> None:
        """Write the pairs that the round wants votes on next. Raises VotesAwaited, always."""
        assert self._round is not None
        pairs: list[dict[str, Any]] = []
        while (question := self.question(f"pair {len(pairs)}")) is not None:
            # A question that is asked again, after other votes, needs votes of its own.
            place = (question.example, *question.candidates)
            name = digest(self._round.digest, *map(str, place), str(len(self._round.votes)))
            self._file.ask(self._round, FilePair(name, *place, (digest(question.left), digest(question.right))))
            pairs.append({
                "pair": name, "question": self.task.voting.config.question, "prompt": question.prompt,
                "left": self._shown(question.left), "right": self._shown(question.right),
                "pictures": self.task.shows_pictures,
            })  # fmt: skip
        self._open = {}
        write_pairs(path, pairs)
        raise VotesAwaited(len(pairs), path)

    def _shown(self, answer: str) -> str:
        """An answer in a file of pairs: a text, or a picture as a data URI."""
        picture = self._examples.picture(answer)
        return answer if picture is None else f"data:image/png;base64,{b64encode(picture).decode()}"

    def _rounds(self) -> list[Round]:
        """The generations so far. A file that is replayed has later ones as well, which say nothing yet."""
        rounds = self._generations()
        return rounds if self._latest is None else rounds[: rounds.index(self._latest) + 1]

    def _generations(self) -> list[Round]:
        """All generations of the file."""
        return [each for each in self._file.of_task(self.task.name) if each.genomes.shape[1]]

    def _update(self) -> None:
        """The strengths of the round's candidates by the votes so far."""
        rounds, one = self._rounds(), self._round
        assert self._kernel is not None and one is not None
        preferences = self._preferences_of(rounds, one.genomes.shape[1], self._kernel)
        start = sum(len(each.genomes) for each in rounds[: rounds.index(one)])
        fitted = fit_preferences(preferences.genomes, preferences.outcomes, preferences.kernel)
        self._posterior = fitted.part(slice(start, start + len(one.genomes)))

    # -----------------------------------------------------------------------------------------------------------
    # The judges' side

    def question(self, judge: str) -> Question | None:
        """The judge's next question: the one that the judge has open, or another; None: there is none at the moment."""
        with self._changed:
            if self._round is None or self._round.closed:
                return None
            if judge in self._open:
                self._open[judge].asked = time.monotonic()
                return self._open[judge]
            spent = len(self._round.votes) + len(self._open)
            chosen = None if spent >= self._most else self._next_round(judge) or self._repeated(judge) or self._next()
            if chosen is None:
                # The oldest question whose judge seems to have left becomes the question of this one.
                for other, question in self._open.items():
                    if time.monotonic() - question.asked > PATIENCE:
                        question.asked = time.monotonic()
                        self._open[judge] = self._open.pop(other)
                        return question
                return None
            left, right, example = chosen
            self._number += 1
            self._open[judge] = Question(
                self._number, example, self._examples.prompt(example), self._texts[left][example],
                self._texts[right][example], (left, right),
            )  # fmt: skip
            return self._open[judge]

    def bout(self, judge: str) -> list[Vote]:
        """The votes of the judge's current bout, or of the last one: on two candidates in a row."""
        with self._changed:
            votes = [vote for vote in self._round.votes if vote.judge == judge] if self._round is not None else []
            latest = [(vote.left, vote.right) for vote in votes[-1:]]
            same = list(takewhile(lambda vote: (vote.left, vote.right) in latest, votes[::-1]))
            # Two candidates may have met in several bouts.
            return same[: (len(same) - 1) % self.task.voting.config.bout + 1][::-1]

    def _next_round(self, judge: str) -> tuple[int, int, int] | None:
        """The next question of a bout that has begun; None: there is none."""
        bout = self.bout(judge)
        if self._pairs is not None or not 0 < len(bout) < self.task.voting.config.bout:
            return None
        left, right, fought = bout[-1].left, bout[-1].right, {vote.example for vote in bout}
        examples = [n for n in self._differing_prompts(left, right) if n not in fought]
        return (left, right, self._least_used(examples)) if examples else None

    def _repeated(self, judge: str) -> tuple[int, int, int] | None:
        """A question that another judge has answered, where the judge has answered few such; else None."""
        assert self._round is not None
        if self._pairs is not None:
            return None
        answered = {asked(vote) for vote in self._round.votes if vote.judge == judge}
        others = {asked(vote): vote for vote in self._round.votes if vote.judge != judge}
        if len(answered & others.keys()) >= SHARED * len(answered):
            return None
        left = (vote for question, vote in others.items() if question not in answered)
        return next(((vote.left, vote.right, vote.example) for vote in left), None)

    def hand_over(self, earlier: str, judge: str) -> None:
        """Give a judge's open question to the name that the judge has now."""
        with self._changed:
            if earlier in self._open and judge not in self._open:
                self._open[judge] = self._open.pop(earlier)

    def leave(self, judge: str) -> None:
        """Give a judge's open question back: others may answer it."""
        with self._changed:
            self._open.pop(judge, None)

    def vote(self, number: int, choice: Choice, judge: str) -> bool:
        """Write a judge's answer to a question down. False: the question is not open (any more)."""
        with self._changed:
            question = self._open.get(judge)
            if question is None or question.number != number or self._round is None:
                return False
            del self._open[judge]
            now = datetime.now(UTC).isoformat(timespec="seconds")
            left, right = question.candidates
            answers = digest(question.left), digest(question.right)
            weight = self.task.voting.config.judges.get(judge, 1.0)
            self._file.add(self._round, Vote(question.example, left, right, choice, answers, judge, weight, now))
            if self._pairs is None:
                self._update()
            self._changed.notify_all()
            return True

    def standing(self) -> dict[str, Any]:
        """The part of a round that judges see. number: from 1 on; votes, most: those so far, and at most; left: those
        for all generations; heldout: the winner is being compared; waiting: no question is open; agreements: of judges,
        in all rounds; strengths: candidate, mean and standard deviation, best first; leader: what the strongest is made
        of, such as its family tree."""
        with self._changed:
            rounds, one = self._rounds(), self._round
            spent = sum(len(each.votes) for each in rounds)
            strengths, leader = list[tuple[str, float, float]](), ""
            if self._posterior is not None and one is not None and self._pairs is None:
                mean, variances = self._posterior.mean, np.diag(self._posterior.covariance)
                rows = zip(one.genomes, mean, np.sqrt(np.maximum(variances, 0.0)), strict=True)
                strengths = [(self._name(genome), float(mean), float(deviation)) for genome, mean, deviation in rows]
                leader = self._describe(one.genomes[int(mean.argmax())].astype(np.float32)) or ""
            return {
                "number": len(rounds), "votes": len(one.votes) if one else 0, "most": self._most if one else 0,
                "left": max(0, self.task.voting.config.votes - spent), "heldout": self._pairs is not None,
                "waiting": one is None, "agreements": [each.describe() for each in self.agreements()],
                "strengths": sorted(strengths, key=lambda row: -row[1]), "leader": leader,
            }  # fmt: skip

    def _name(self, genome: np.ndarray) -> str:
        """A candidate's name: the generation in which it was first, and its number there, both from 1."""
        for number, one in enumerate(self._rounds(), start=1):
            places = np.flatnonzero((one.genomes == genome).all(1))
            if len(places):
                return f"{number}.{places[0] + 1}"
        raise AssertionError

    def agreements(self) -> list[Agreement]:
        """How far the judges of the generations agree."""
        return agreements(self._rounds())

    def picture(self, name: str) -> bytes | None:
        """A picture of the round, as a PNG; None: it has none of the name."""
        with self._changed:
            return self._examples.picture(name)

    def stop(self, error: BaseException) -> None:
        """End the search's wait: no judge can vote any more."""
        with self._changed:
            self._error = error
            self._changed.notify_all()

    def _next(self) -> tuple[int, int, int] | None:
        """The next question: the candidates left and right, and the prompt."""
        assert self._round is not None
        if self._pairs is not None:
            voted = {(max(vote.left, vote.right), vote.example) for vote in self._round.votes}
            voted |= {(max(one.candidates), one.example) for one in self._open.values()}
            chosen = next(
                ((winner, k, n) for n in range(self._examples.size) for winner, k in self._pairs
                 if self._texts[winner][n] != self._texts[k][n] and (k, n) not in voted), None,
            )  # fmt: skip
            if chosen is None:
                return None
        else:
            allowed = self._differing()
            for one in self._open.values():
                left, right = one.candidates
                allowed[left, right] = allowed[right, left] = False
            # Of all pairs the one whose vote says most, if any says enough.
            if not allowed.any() or not self._informs(allowed):
                return None
            assert self._posterior is not None
            pair = self._rule(self._posterior, allowed, self._generator(0))
            chosen = (*pair, self._least_used(self._differing_prompts(*pair)))
        first, second, example = chosen
        is_swapped = self._generator(1).random() >= 0.5
        return (second, first, example) if is_swapped else (first, second, example)

    def _differing_prompts(self, left: int, right: int) -> list[int]:
        return [n for n in range(self._examples.size) if self._texts[left][n] != self._texts[right][n]]

    def _least_used(self, examples: Sequence[int]) -> int:
        """One of some prompts that the round has used least."""
        assert self._round is not None
        used = Counter([*(vote.example for vote in self._round.votes), *(one.example for one in self._open.values())])
        least = min(used[n] for n in examples)
        return int(self._generator(2).choice([n for n in examples if used[n] == least]))

    def _differing(self) -> np.ndarray:
        """bool[P, P]: the pairs of candidates whose answers differ."""
        answers = [tuple(candidate) for candidate in self._texts]
        return np.array([[one != other for other in answers] for one in answers])

    def _informs(self, allowed: np.ndarray) -> bool:
        """Return whether a vote on one of the allowed pairs, bool[P, P], says enough to be asked for."""
        assert self._posterior is not None
        return float(np.max(information(self._posterior), where=allowed, initial=0.0)) >= LEAST_INFORMATION

    def _generator(self, use: int) -> np.random.Generator:
        """The random numbers behind the votes and the open questions of the round, for one use of them."""
        assert self._round is not None
        votes = len(self._round.votes) + len(self._open)
        return np.random.default_rng([self._seed % 2**32, int(self._round.digest, 16), votes, use])
