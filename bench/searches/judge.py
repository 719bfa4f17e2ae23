"""How far the votes of a simulated person take a search, against the score in that person's mind (an hour).

    python -m bench judge
    python -m bench judge --seeds 2 --kinds right --rules information random

The person prefers the answer with the higher hidden score, and errs in a fifth of the votes. Kinds: `right`, answers to
the sums of the demo family that have more of the right letters; `form`, answers of the wanted length and ending;
`pictures`, digits of two generators whose stroke is neither too light nor too dark (with the package diffusers).
Columns: `fitness gains` is of the search that sees the hidden score itself; the rules that choose the next pair; `one
by one`, where a vote says whether one answer is good. All searches have the same generations, and all but `fitness` the
same votes. With the packages optuna-dashboard and botorch, `Optuna` asks for the better of two genomes of its
preferential sampler, as many times. `--rules page`, with Chromium, has the person vote on the page of judges, by its
keys. A figure is the mean hidden score of the winner, chosen as every search chooses it, less that of the uniform
merge, as a share of what `fitness` gains.
Models and examples of a kind are opened once, with the first seed, which draws the pictures' noise.
"""

import argparse
import difflib
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from bench.shared.browser import Browser
from bench.shared.machine import describe
from evojax_merge.evaluation.scores import TaskScores
from evojax_merge.judge.ballot import Ballot
from evojax_merge.judge.evaluation import judged, judged_task, with_best
from evojax_merge.judge.pairs import Rule, challenged, information
from evojax_merge.judge.posterior import Posterior
from evojax_merge.judge.proposals import proposing
from evojax_merge.judge.server import served
from evojax_merge.judge.votes import VoteFile
from evojax_merge.problem import SearchProblem, build_problem, config_from
from evojax_merge.search.genomes import SpaceEvaluator
from evojax_merge.search.loop import evolve
from evojax_merge.search.protocols import Progress
from evojax_merge.search.recording import Reporter, Storage
from evojax_merge.steps.selection import open_evaluators, rescore
from evojax_merge.tasks.splits import Splits
from evojax_merge.tasks.voting import METRIC, Choice, JudgedTask

CONFIG: dict[str, Any] = {
    "base": "zoo:base", "parents": ["zoo:maths", "zoo:japanese"],
    "space": {
        "method": "task_arithmetic", "components": ["attention+mlp+norm"], "layers_per_group": "all",
        "parameters": {"weight": {"low": 0.0, "high": 1.5}},
    },
    "tasks": [{
        "name": "taste", "kind": "human", "file": "zoo:search.jsonl", "heldout": "zoo:heldout.jsonl",
        "max_new_tokens": 6, "limit": 32,
    }],
}  # fmt: skip
NOISE = 0.2
# The share of ink that a picture's judge likes best.
INK = 0.4
KEYS: dict[Choice, str] = {"left": "ArrowLeft", "right": "ArrowRight", "tie": "ArrowUp", "both_bad": "ArrowDown"}
# The seconds from each key to the next question on the page, by the browser's own clock.
TIMER = """
var seconds = [], pressed = null, number = 0;
document.addEventListener("keydown", () => { pressed = performance.now(); number = open ? open.number : 0; }, true);
new MutationObserver(() => {
  if (pressed === null || open === null || open.number <= number) return;
  seconds.push((performance.now() - pressed) / 1000);
  pressed = null;
}).observe(document.body, { subtree: true, childList: true, characterData: true, attributes: true });
0
"""
# The draws of `top_two`.
DRAWS = 100
# (the record of a prompt, what a judge sees as its answer: a text or a picture) -> the score in the judge's mind
Hidden = Callable[[Mapping[str, Any], Any], float]


def random_pair(posterior: Posterior, allowed: np.ndarray, generator: np.random.Generator) -> tuple[int, int]:
    """Any pair."""
    return _one_of(np.triu(allowed), generator)


def top_two(posterior: Posterior, allowed: np.ndarray, generator: np.random.Generator) -> tuple[int, int]:
    """Two candidates that may be the best: the best of one draw from the posterior, and the best of another draw among
    those that may be compared with it (top-two Thompson sampling, Russo, 2016)."""
    draws = posterior.sample(DRAWS, generator)
    able = allowed.any(1)
    first = int(np.where(able, draws[0], -np.inf).argmax())
    rivals = np.where(allowed[first], draws[1:], -np.inf)
    ahead = np.flatnonzero(rivals.max(1) > draws[1:, first])
    return first, int(rivals[ahead[0] if len(ahead) else 0].argmax())


def most_informative(posterior: Posterior, allowed: np.ndarray, generator: np.random.Generator) -> tuple[int, int]:
    """The pair whose vote says most about the strengths; among equals one by chance."""
    table = np.where(allowed, information(posterior), -np.inf)
    return _one_of(np.triu(table >= table.max() - 1e-12), generator)


def _one_of(pairs: np.ndarray, generator: np.random.Generator) -> tuple[int, int]:
    rows, columns = np.nonzero(pairs)
    number = int(generator.integers(len(rows)))
    return int(rows[number]), int(columns[number])


RULES: dict[str, Rule] = {
    "random": random_pair,
    "top_two": top_two,
    "information": most_informative,
    "challenged": challenged,
}


def right_letters(record: Mapping[str, Any], answer: str) -> float:
    """The share of letters that agree with the right answer."""
    return difflib.SequenceMatcher(None, answer.strip(), record["target"].strip(), autojunk=False).ratio()


def wanted_form(record: Mapping[str, Any], answer: str) -> float:
    """Half for the ending of the right answer, half for its number of words."""
    words, wanted = answer.split(), record["target"].split()
    ending = words[-1:] == wanted[-1:]
    return 0.5 * ending + 0.5 / (1 + abs(len(words) - len(wanted)))


def even_stroke(record: Mapping[str, Any], picture: np.ndarray) -> float:
    """1 for a picture with the wanted share of ink, and less for a lighter or a darker one."""
    return 1 - abs(float(picture.mean()) - INK)


KINDS: dict[str, Hidden] = {"right": right_letters, "form": wanted_form, "pictures": even_stroke}


def config_of(kind: str) -> dict[str, Any]:
    """The config of a kind's searches, but for the votes and the search."""
    if kind != "pictures":
        return CONFIG
    from bench.shared.digit_generators import FAMILY

    return {
        "backend": "torch", "base": str(FAMILY.resolve_reference("base")),
        "parents": [str(FAMILY.resolve_reference(name)) for name in ("low", "high")],
        "space": {"method": "task_arithmetic", "parameters": {"weight": {"low": -0.5, "high": 2.0}}},
        "tasks": [{"name": "taste", "kind": "human_images", "images": 64, "heldout": 0.5, "steps": 4, "batch": 32}],
    }  # fmt: skip


@dataclass
class Person:
    """A judge who prefers the higher hidden score, and errs in a share `NOISE` of the votes."""

    hidden: Hidden
    generator: np.random.Generator
    name: str = "person"
    files: tuple[Path, ...] = ()
    # The seconds from each vote to the next question, which are those of a new generation where one has ended.
    waited: list[float] = field(default_factory=list)
    _chosen_at: float | None = None

    def choose(self, record: dict[str, Any], prompt: str, left: Any, right: Any) -> Choice:
        if self._chosen_at is not None:
            self.waited.append(time.perf_counter() - self._chosen_at)
        choice = self._choice(self.hidden(record, left) - self.hidden(record, right))
        self._chosen_at = time.perf_counter()
        return choice

    def _choice(self, difference: float) -> Choice:
        if difference == 0:
            return "tie"
        return "left" if (difference > 0) != (self.generator.random() < NOISE) else "right"

    def likes(self, record: dict[str, Any], answer: Any, least: float) -> bool:
        return (self.hidden(record, answer) >= least) != (self.generator.random() < NOISE)

    def report(self) -> str | None:
        return None


@dataclass(frozen=True)
class HiddenEvaluator(SpaceEvaluator[Any]):
    """Scores candidates by the hidden score."""

    hidden: Hidden = right_letters

    def score(self, genomes: np.ndarray, progress: Progress = lambda done: None) -> TaskScores:
        scores = super().score(genomes, progress)
        return _scored(judged_task(self, "taste"), scores, [
            [self.hidden(record, answer) for record, answer in zip(*seen, strict=True)]
            for seen in answers_of(judged_task(self, "taste"), scores)
        ])  # fmt: skip


@dataclass(frozen=True)
class OneByOneEvaluator(SpaceEvaluator[Any]):
    """Scores candidates by votes on single answers, the same number for each of a generation."""

    person: Person | None = None
    votes: int = 1
    least: float = 0.5

    def score(self, genomes: np.ndarray, progress: Progress = lambda done: None) -> TaskScores:
        scores, person = super().score(genomes, progress), self.person
        assert person is not None
        rows = []
        for records, answers in answers_of(judged_task(self, "taste"), scores):
            asked = person.generator.choice(len(records), self.votes, replace=False)
            liked = sum(person.likes(records[n], answers[n], self.least) for n in asked)
            rows.append([(1 + liked) / (2 + self.votes)] * len(records))
        return _scored(judged_task(self, "taste"), scores, rows)


def answers_of(task: JudgedTask, scores: TaskScores) -> Iterator[tuple[list[dict[str, Any]], list[Any]]]:
    """The records of the task and the answers to them as a judge sees them, for each candidate."""
    records = [task.record(n) for n in range(task.size)]
    return ((records, list(map(task.content, answers))) for answers in scores.outputs["taste"])


def _scored(task: JudgedTask, scores: TaskScores, rows: Any) -> TaskScores:
    return replace(scores, matrices={task.name: {METRIC: np.array(rows, np.float32).reshape(-1, task.size)}})


def problem_of(kind: str, seed: int, generations: int, population: int, votes: int) -> SearchProblem:
    config = config_of(kind)
    document = {**config, "seed": seed, "search": {"generations": generations, "population": population}}
    document["tasks"] = [{**config["tasks"][0], "votes": votes}]
    path = Path("judge.yaml")
    return build_problem(path, config_from(path, yaml.safe_load(yaml.safe_dump(document)), [], None))


def gain_of(winner: np.ndarray, problem: SearchProblem, truth: HiddenEvaluator) -> float:
    """The hidden score of a genome less that of the uniform merge."""
    plain = problem.space.baselines()[1][:1]
    values = truth.score(np.stack([winner, plain[0]])).matrices["taste"][METRIC].mean(1)
    return float(values[0] - values[1])


def search(problem: SearchProblem, on: Splits[Any], ballots: Mapping[str, Ballot] | None = None) -> np.ndarray:
    """The genome of the winner."""
    archive = with_best(evolve(problem, on, Storage(), Reporter()), ballots or {}, problem.search.finalists)
    return rescore(problem.space, on.search, archive, lambda done: None)[0].genome


def by_votes(problem: SearchProblem, on: Splits[Any], person: Person, rule: str) -> np.ndarray:
    searched = problem.splits.search[0]
    task = replace(searched, voting=replace(searched.voting, judge=person))
    with tempfile.TemporaryDirectory() as folder:
        file = VoteFile(Path(folder) / "votes.jsonl")
        ballots = {"taste": Ballot(task, file, problem.search.generations, problem.seed, rule=RULES[rule])}
        return search(proposing(problem, ballots), judged(on, ballots), ballots)


def by_page(problem: SearchProblem, on: Splits[Any], person: Person) -> tuple[np.ndarray, list[str]]:
    """The genome of the winner of a search whose person votes on the page of judges, in a headless Chromium; and the
    addresses that the browser asked for elsewhere, and what its console complained of."""
    # The evaluators' own, which keeps their pictures: they are opened once for all seeds.
    task = judged_task(on.shards[0], "taste")
    records = {task.prompt(n): task.record(n) for n in range(task.size)}
    with tempfile.TemporaryDirectory() as folder:
        ballot = Ballot(task, VoteFile(Path(folder) / "votes.jsonl"), problem.search.generations, problem.seed)
        with (
            served([ballot]) as address, Browser(Path(folder)) as browser, ThreadPoolExecutor(1) as thread
        ):  # fmt: skip
            ballots = {task.name: ballot}
            winner = thread.submit(search, proposing(problem, ballots), judged(on, ballots), ballots)
            try:
                browser.open(address)
                browser.evaluate(TIMER)
                while not winner.done():
                    if not browser.evaluate("open !== null && !sending"):
                        time.sleep(0.005)
                        continue
                    prompt, *names = browser.evaluate("[open.prompt, open.left, open.right]")
                    left, right = (task.content(name.removeprefix("picture/")) for name in names)
                    choice = person.choose(records[prompt], prompt, left, right)
                    latest = browser.evaluate("open.number")
                    browser.press(KEYS[choice])
                    browser.wait(f"open === null || open.number > {latest}", seconds=600)
            except BaseException as error:
                # Else the search would wait for votes for ever.
                ballot.stop(error)
                raise
            person.waited[:] = browser.evaluate("seconds")
            complaints = [url for url in browser.requests if not url.startswith((address, "data:", "about:"))]
            return winner.result(), complaints + browser.errors


def by_optuna(problem: SearchProblem, truth: HiddenEvaluator, person: Person, votes: int) -> np.ndarray:
    """The genome that Optuna's preferential sampler ends with: of each pair that it proposes, the person votes on the
    answers to one prompt. Where a factorisation of the sampler fails, a new sampler goes on with the same votes, as in
    a process that is started again; where the new one fails too, that candidate is drawn at random."""
    import optuna
    import torch
    from optuna_dashboard.preferential import create_study, load_study
    from optuna_dashboard.preferential.samplers.gp import PreferentialGPSampler

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    # In float32 the sampler's own factorisations fail more often.
    torch.set_default_dtype(torch.float64)
    storage, name, seeds = optuna.storages.InMemoryStorage(), "taste", np.random.default_rng(problem.seed)
    study = create_study(
        n_generate=2, study_name=name, storage=storage, sampler=PreferentialGPSampler(seed=problem.seed)
    )
    answers = {}
    new = random = 0

    def suggest() -> Any:
        trial = study.ask()
        return trial, [trial.suggest_float(f"x{d}", 0.0, 1.0) for d in range(problem.space.dims)]

    def go_on(sampler: Any) -> Any:
        return load_study(study_name=name, storage=storage, sampler=sampler(seed=int(seeds.integers(2**31))))

    def propose() -> Any:
        nonlocal study, new, random
        try:
            trial, values = suggest()
        except torch.linalg.LinAlgError:
            new += 1
            study = go_on(PreferentialGPSampler)
            try:
                trial, values = suggest()
            except torch.linalg.LinAlgError:
                random += 1
                study = go_on(optuna.samplers.RandomSampler)
                trial, values = suggest()
                study = go_on(PreferentialGPSampler)
        genome = np.array(values, np.float32)
        scores = SpaceEvaluator.score(truth, genome[None])
        answers[trial.number] = (genome, *next(answers_of(judged_task(truth, "taste"), scores)))
        return trial

    best = propose()
    for _ in range(votes):
        other = propose()
        (_, records, ours), (_, _, theirs) = answers[best.number], answers[other.number]
        n = int(person.generator.integers(len(records)))
        choice = person.choose(records[n], "", ours[n], theirs[n])
        worse, better = (other, best) if choice in ("left", "tie") else (best, other)
        study.report_preference(better, worse)
        best = better
    print(f"Optuna's sampler failed {new} times; {random} of {votes} candidates were drawn at random", flush=True)
    return answers[best.number][0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    rows = (*RULES, "one by one", "Optuna")
    parser.add_argument("--rules", nargs="+", choices=(*rows, "page"), default=list(rows))
    parser.add_argument("--votes", type=int, default=150)
    parser.add_argument("--generations", type=int, default=8)
    parser.add_argument("--population", type=int, default=8)
    arguments = parser.parse_args()
    if "pictures" in arguments.kinds and find_spec("diffusers") is None:
        print("diffusers is not installed: pictures are left out", flush=True)
        arguments.kinds.remove("pictures")
    if "Optuna" in arguments.rules and not (find_spec("optuna_dashboard") and find_spec("botorch")):
        print("optuna-dashboard or botorch is not installed: their sampler is left out", flush=True)
        arguments.rules.remove("Optuna")
    print("| kind, seed | fitness gains |" + "".join(f" {rule} |" for rule in arguments.rules))
    print("| --- | ---: |" + " ---: |" * len(arguments.rules), flush=True)
    waited: list[float] = []
    elsewhere: list[str] = []
    for kind in arguments.kinds:
        shares: list[list[float]] = []
        on: Splits[SpaceEvaluator[Any]] | None = None
        for seed in range(arguments.first_seed, arguments.first_seed + arguments.seeds):
            problem = problem_of(kind, seed, arguments.generations, arguments.population, arguments.votes)
            on = open_evaluators(problem, problem.prepare()) if on is None else on
            shard = on.shards[0]
            truth = HiddenEvaluator(shard.space, shard.evaluator, shard.devices, shard.goal, KINDS[kind])
            seen = replace(on, shards=[truth], search=truth)
            most = gain_of(search(problem, seen), problem, truth)
            gains = []
            for rule in arguments.rules:
                person = Person(KINDS[kind], np.random.default_rng([seed, 7]))
                if rule == "one by one":
                    each = -(-arguments.votes // (arguments.generations * arguments.population))
                    one = OneByOneEvaluator(shard.space, shard.evaluator, shard.devices, shard.goal, person, each)
                    winner = search(problem, replace(on, shards=[one], search=one))
                elif rule == "Optuna":
                    winner = by_optuna(problem, truth, person, arguments.votes)
                elif rule == "page":
                    winner, complaints = by_page(problem, on, person)
                    waited += person.waited
                    elsewhere += complaints
                else:
                    winner = by_votes(problem, on, person, rule)
                    waited += person.waited
                gains.append(gain_of(winner, problem, truth) / most)
            shares.append(gains)
            print(f"| {kind}, {seed} | {most:+.3f} |" + "".join(f" {gain:.0%} |" for gain in gains), flush=True)
        means = np.mean(shares, axis=0)
        print(f"| {kind}, mean | |" + "".join(f" {mean:.0%} |" for mean in means), flush=True)
    print(f"\n{arguments.votes} votes, {NOISE:.0%} of them wrong; {describe()}")
    if waited:
        # One vote in twenty is the last of its generation, and waits for the next.
        median, most = np.quantile(waited, [0.5, 0.9])
        print(f"from a vote to the next question: {median:.3f} s (median), under {most:.3f} s in nine of ten")
    if "page" in arguments.rules:
        print(f"requests to elsewhere, and errors of the page: {', '.join(elsewhere) or 'none'}")


if __name__ == "__main__":
    main()
