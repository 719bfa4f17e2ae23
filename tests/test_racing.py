"""Races over examples: who meets what, who stops, what the strategy and the history are told."""

from dataclasses import dataclass, field

import numpy as np
import pytest
from helpers.files import read_lines, write_lines, write_yaml
from helpers.sampling import sample
from helpers.searches import open_problem, search_in

from bench.searches.racing import halve
from evojax_merge.config.search_config import SearchConfig
from evojax_merge.errors import InputError
from evojax_merge.evaluation.scores import TaskScores, fitness
from evojax_merge.problem import read_config
from evojax_merge.search.run_folder import open_run
from evojax_merge.search.successive_halving import (
    halving_passes,
    init_surrogate,
    order_shards,
    shard_order,
    stratified_shards,
)
from evojax_merge.search.surrogate import RIDGES, append_candidates, empty_surrogate, predict_fitness, regress
from evojax_merge.steps.selection import open_evaluator, open_evaluators
from evojax_merge.tasks.text import Example, TextTask


def text_task(name: str, size: int, weight: float = 1.0) -> TextTask:
    """Examples whose prompts are their numbers."""
    examples = tuple(Example(str(i), (" x",), "x", i + 1) for i in range(size))
    return TextTask(name, "likelihood", "log_probability", weight, f"{name}.jsonl", examples)


def one_token(task: TextTask) -> np.ndarray:
    return np.ones(task.size, int)


def numbers(task: TextTask) -> list[int]:
    return [int(example.prompt) for example in task.examples]


@dataclass
class SurrogateData:
    """Scores that are known beforehand: truth[task]: float32[P, N]. A genome is the number of its candidate. `requests`
    collects who was asked what, as (candidate, task, example)."""

    tasks: list[TextTask]
    truth: dict[str, np.ndarray]
    requests: list[tuple[int, str, int]] = field(default_factory=list)

    def passes(self, population: int) -> int:
        return population

    def score(self, genomes, progress=lambda done: None) -> TaskScores:
        rows = genomes[:, 0].astype(int)
        progress(len(rows))
        self.requests += [(int(p), task.name, i) for p in rows for task in self.tasks for i in numbers(task)]
        return TaskScores(
            {task.name: {task.metric: self.truth[task.name][np.ix_(rows, numbers(task))]} for task in self.tasks}
        )


def known_blocks(truth: dict[str, np.ndarray], weights: dict[str, float], rungs: int) -> list[SurrogateData]:
    tasks = [text_task(name, matrix.shape[1], weights[name]) for name, matrix in truth.items()]
    return [SurrogateData(shard, truth) for shard in stratified_shards("search.rungs", tasks, one_token, rungs, 0)]


def random_truth(population: int, noise: float, seed: int, sizes: dict[str, int]) -> dict[str, np.ndarray]:
    """A quality for each candidate, hardness for each example, and noise for each pair."""
    rng = np.random.default_rng(seed)
    quality = rng.standard_normal((population, 1))
    return {
        name: (quality + 3 * rng.standard_normal(size) + noise * rng.standard_normal((population, size))).astype("f")
        for name, size in sizes.items()
    }


def everyone(population: int) -> np.ndarray:
    return np.arange(population, dtype=np.float32)[:, None]


# ---------------------------------------------------------------------------------------------------------------
# Blocks


@pytest.mark.parametrize(("sizes", "rungs", "shards"), [((37, 8), 4, 8), ((37, 8), 1, 1), ((37, 5), 4, 4)])
def test_blocks_share_out_every_task(sizes, rungs, shards):
    tasks = [text_task("a", sizes[0]), text_task("b", sizes[1], 0.3), text_task("shown", 1, 0.0)]
    dealt = stratified_shards("search.rungs", tasks, one_token, rungs, 3)
    assert len(dealt) == shards
    for i, task in enumerate(tasks[:2]):
        parts = [numbers(shard[i]) for shard in dealt]
        assert sorted(i for part in parts for i in part) == list(range(task.size))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert all(shard[2] == tasks[2] for shard in dealt)
    assert dealt == stratified_shards("search.rungs", tasks, one_token, rungs, 3)
    assert rungs == 1 or dealt != stratified_shards("search.rungs", tasks, one_token, rungs, 4)


def test_blocks_share_out_short_and_long_examples():
    """Of every run of lengths, each block has as many as any other, to within two."""
    long = np.random.default_rng(0).permutation(np.arange(100) // 3)
    dealt = stratified_shards("search.rungs", [text_task("a", 100)], lambda task: long, 4, 0)
    for low in range(0, 30, 4):
        counts = [sum(low <= long[i] < low + 9 for i in numbers(shard[0])) for shard in dealt]
        assert max(counts) - min(counts) <= 2 and sum(counts) == ((long >= low) & (long < low + 9)).sum()


def test_a_task_of_one_example_cannot_be_raced():
    with pytest.raises(InputError, match=r"search\.rungs: 3; .* b has one"):
        stratified_shards("search.rungs", [text_task("a", 9), text_task("b", 1)], one_token, 3, 0)


def test_blocks_take_turns():
    for seed in range(5):
        orders = [shard_order(8, seed, generation) for generation in range(24)]
        assert all(sorted(order) == list(range(8)) for order in orders)
        for epoch in range(0, 24, 8):
            assert sorted(order[0] for order in orders[epoch : epoch + 8]) == list(range(8))
    assert shard_order(1, 0, 5) == [0]


# ---------------------------------------------------------------------------------------------------------------
# A race


@pytest.mark.parametrize(("population", "rungs"), [(16, 4), (13, 3), (5, 5), (6, 1)])
def test_the_poor_stop_early_and_nobody_meets_an_example_twice(population, rungs):
    sizes, weights = {"a": 64, "b": 37}, {"a": 1.0, "b": 2.0}
    truth = random_truth(population, 2.0, 1, sizes)
    shards = known_blocks(truth, weights, rungs)
    order, steps = shard_order(len(shards), 0, 3), []
    examples = order_shards(shards, order)
    halved = halve(examples, everyone(population), init_surrogate(shards, 1), steps.append)
    assert sum(steps) == halving_passes(examples, population)

    requests = [one for shard in shards for one in shard.requests]
    assert len(requests) == len(set(requests)) == halved.examples.sum()
    met = {p: {(task, i) for q, task, i in requests if q == p} for p in range(population)}
    assert [len(met[p]) for p in range(population)] == halved.examples.tolist()
    # In rung r there are P / 2^r candidates, rounded up, and 2^r of the blocks are met in their order.
    ends = [sum(task.size for b in order[: 2**r] for task in shards[b].tasks) for r in range(rungs)]
    for r, end in enumerate(ends):
        assert (halved.examples >= end).sum() == -(-population // 2**r)
    assert set(halved.examples.tolist()) <= set(ends)
    np.testing.assert_array_equal(halved.complete, halved.examples == 101)

    def mean(p, examples):
        part = {name: [truth[name][p, i] for task, i in examples if task == name] for name in sizes}
        return sum(weights[name] / 3 * np.mean(part[name], dtype=np.float64) for name in sizes)

    np.testing.assert_allclose(halved.fitness, [mean(p, met[p]) for p in range(population)], rtol=1e-6)
    for p in range(population):
        for q in range(population):
            if halved.examples[p] < halved.examples[q]:
                # With nothing known, who went on was no worse on what both had met.
                assert mean(p, met[p]) <= mean(q, met[p]) + 1e-6

    np.testing.assert_array_equal(halved.scores.predicted[halved.complete], halved.fitness[halved.complete])
    assert np.isfinite(halved.scores.predicted).all()


def test_who_meets_everything_scores_as_without_a_race():
    """To the last bit, whose turn it is."""
    truth = random_truth(16, 1.0, 2, {"a": 70, "b": 30})
    weights = {"a": 1.0, "b": 0.5}
    shards = known_blocks(truth, weights, 4)
    (whole,) = known_blocks(truth, weights, 1)
    expected = fitness(whole.tasks, whole.score(everyone(16)))
    seen: dict[int, float] = {}
    known = init_surrogate(shards, 1)
    for generation in range(16):
        halved = halve(order_shards(shards, shard_order(8, 0, generation)), everyone(16), known)
        known = halved.surrogate
        assert halved.complete.sum() == 2
        np.testing.assert_allclose(halved.fitness[halved.complete], expected[halved.complete], rtol=1e-6)
        for p in np.flatnonzero(halved.complete):
            assert seen.setdefault(int(p), halved.fitness[p]) == halved.fitness[p]
    assert int(np.argmax(expected)) in seen


def test_one_block_is_no_race():
    truth = random_truth(9, 1.0, 3, {"a": 20})
    (shard,) = known_blocks(truth, {"a": 1.0}, 1)
    halved = halve(order_shards([shard], [0]), everyone(9), init_surrogate([shard], 1))
    np.testing.assert_array_equal(halved.fitness, fitness(shard.tasks, shard.score(everyone(9))))
    np.testing.assert_array_equal(np.argsort(halved.scores.predicted), np.argsort(halved.fitness))
    assert halved.complete.all() and (halved.examples == 20).all()
    assert halved.scores_of_best == {"a/log_probability": pytest.approx(halved.fitness.max())}


def test_failed_candidates_stop_and_leave_their_place():
    truth = random_truth(8, 1.0, 4, {"a": 64})
    quality = truth["a"].mean(axis=1)
    shards = known_blocks(truth, {"a": 1.0}, 3)
    order = shard_order(4, 0, 0)
    early, late = np.argsort(-quality)[:2]
    truth["a"][early, numbers(shards[order[0]].tasks[0])[0]] = np.nan
    truth["a"][late, numbers(shards[order[3]].tasks[0])[0]] = np.inf
    halved = halve(order_shards(shards, order), everyone(8), init_surrogate(shards, 1))
    assert halved.examples[early] == 16 and halved.examples[late] == 64
    for p in (early, late):
        assert np.isnan(halved.fitness[p]) and np.isnan(halved.scores.predicted[p]) and not halved.complete[p]
    assert (halved.examples >= 32).sum() == 4 and (halved.examples == 64).sum() == 2 and halved.complete.sum() == 1
    assert np.isfinite(halved.scores.predicted).sum() == 6

    truth["a"][:] = np.nan
    halved = halve(order_shards(shards, order), everyone(8), init_surrogate(shards, 1))
    assert (halved.examples == 16).all() and not halved.complete.any() and np.isnan(halved.scores.predicted).all()


def test_a_race_finds_the_best_where_as_many_passes_shared_evenly_do_not():
    """200 populations of 16 with a known best one, and noise that 80 of 256 examples do not average out."""
    found, evenly, saved = 0, 0, []
    for seed in range(200):
        truth = random_truth(16, 3.0, seed, {"a": 256})
        shards = known_blocks(truth, {"a": 1.0}, 4)
        order = order_shards(shards, shard_order(8, 0, seed))
        halved = halve(order, everyone(16), init_surrogate(shards, 1))
        best = int(np.argmax(truth["a"].mean(axis=1)))
        saved.append(1 - halved.examples.sum() / (16 * 256))
        found += int(np.nanargmax(halved.scores.predicted)) == best
        evenly += int(np.argmax(truth["a"][:, :80].mean(axis=1))) == best
    assert np.mean(saved) == 0.6875
    assert found >= 180 and found > evenly + 20


# ---------------------------------------------------------------------------------------------------------------
# What those that met everything tell of the others


def relatives(candidates: int, genes: int, examples: int, seed: int, noise: float = 0.0):
    """Genomes near each other, and scores that follow from them, example by example."""
    rng = np.random.default_rng(seed)
    slopes, hard = rng.standard_normal((genes, examples)), 3 * rng.standard_normal(examples)
    genomes = rng.standard_normal((candidates, genes)).astype(np.float32)
    scores = hard + 0.3 * genomes @ slopes + noise * rng.standard_normal((candidates, examples))
    return genomes, scores.astype(np.float32)


def best_of(values: np.ndarray) -> int:
    return int(np.argmax(values))


@pytest.mark.parametrize(("genes", "noise"), sample([(4, 0.0), (4, 0.2), (12, 0.1)], 1))
def test_relatives_rank_by_what_is_foreseen(genes, noise):
    """100 populations of 16 of which an eighth of 128 examples is seen: foresight finds the best more often than the
    mean on the examples does, and its errors are smaller."""
    found, plain, error, plain_error = 0, 0, 0.0, 0.0
    for seed in range(100):
        genomes, scores = relatives(80, genes, 128, seed, noise)
        known = append_candidates(empty_surrogate(64, genes, 128), genomes[:64], scores[:64] / 128)
        met = np.random.default_rng(seed).permutation(128)[:16]
        counts, part, truth = np.full(16, 8.0), scores[64:, met] / 128, scores[64:].mean(axis=1, dtype=np.float64)
        foreseen = predict_fitness(known, genomes[64:], part, met, counts)
        shown = predict_fitness(empty_surrogate(64, genes, 128), genomes[64:], part, met, counts)
        np.testing.assert_allclose(shown, scores[64:, met].mean(axis=1), atol=1e-5)
        found, plain = found + (best_of(foreseen) == best_of(truth)), plain + (best_of(shown) == best_of(truth))
        error, plain_error = error + np.var(foreseen - truth), plain_error + np.var(shown - truth)
    assert found > plain + 20 and error < plain_error / 4


def test_noise_foretells_nothing():
    """Targets that have nothing to do with the features are foretold by their mean."""
    rng, spread = np.random.default_rng(0), []
    for _ in range(50):
        features, targets, at = rng.standard_normal((64, 20)), rng.standard_normal(64), rng.standard_normal((16, 20))
        spread.append(np.sqrt(np.mean((regress(features, targets, at) - targets.mean()) ** 2)))
    assert np.median(spread) < 0.1 and np.mean(spread) < 0.3


def test_candidates_that_met_other_examples_are_compared_fairly():
    """One met easy examples, the other hard ones: one known candidate tells which is which."""
    hard = np.array([0, 0, 0, 0, -9, -9, -9, -9], np.float32)
    known = append_candidates(empty_surrogate(4, 1, 8), np.zeros((1, 1)), hard[None] / 8)
    at = np.zeros((1, 1))
    poor = predict_fitness(known, at, (hard[None, :4] - 1) / 8, np.arange(4), np.full(4, 2.0))
    good = predict_fitness(known, at, (hard[None, 4:] + 1) / 8, np.arange(4, 8), np.full(4, 2.0))
    np.testing.assert_allclose([poor[0], good[0]], [-5.5, -3.5], rtol=1e-6)


def test_the_ridge_is_the_one_that_leaving_out_prefers():
    """Against fits that really leave an example out."""
    rng = np.random.default_rng(3)
    features, at = rng.standard_normal((12, 5)), rng.standard_normal((7, 5))
    targets = features @ rng.standard_normal(5) + 0.5 * rng.standard_normal(12)
    center = features - features.mean(axis=0)
    # The ridge is a share of the variance of all examples, left out or not.
    penalty = {ridge: ridge * np.sum(center**2) / 12 for ridge in RIDGES}

    def fit(x, y, to, ridge):
        mean = x.mean(axis=0)
        slope = np.linalg.solve((x - mean).T @ (x - mean) + ridge * np.eye(5), (x - mean).T @ (y - y.mean()))
        return y.mean() + (to - mean) @ slope

    def left_out(ridge):
        rest = [np.arange(12) != i for i in range(12)]
        return np.mean(
            [(targets[i] - fit(features[r], targets[r], features[i], ridge)) ** 2 for i, r in enumerate(rest)]
        )

    best = min(RIDGES, key=lambda ridge: left_out(penalty[ridge]))
    np.testing.assert_allclose(regress(features, targets, at), fit(features, targets, at, penalty[best]), rtol=1e-9)


def test_the_window_keeps_the_latest():
    known = empty_surrogate(3, 1, 2)
    for value in range(5):
        known = append_candidates(known, np.full((1, 1), value), np.full((1, 2), value))
    np.testing.assert_array_equal(known.genomes[:, 0], [2, 3, 4])
    many = append_candidates(known, np.arange(10)[:, None], np.zeros((10, 2)))
    np.testing.assert_array_equal(many.genomes[:, 0], [7, 8, 9])
    assert append_candidates(known, np.zeros((0, 1)), np.zeros((0, 2))).contributions.shape == (3, 2)


# ---------------------------------------------------------------------------------------------------------------
# A search


@dataclass(frozen=True)
class Plain:
    """A space of two numbers that are what they are."""

    dims: int = 2
    start: np.ndarray = field(default_factory=lambda: np.array([2.0, -1.5], np.float32))


@dataclass
class Hill:
    """Each example is a hill with a top of its own near 0; the best genome on all is at the mean of the tops."""

    tasks: list[TextTask]
    tops: np.ndarray

    def passes(self, population: int) -> int:
        return population

    def score(self, genomes, progress=lambda done: None) -> TaskScores:
        (task,) = self.tasks
        distance = genomes[:, None, :] - self.tops[None, numbers(task)]
        return TaskScores({task.name: {task.metric: -(distance**2).sum(axis=-1).astype(np.float32)}})


def climb(folder, generations: int, rungs: int = 4, resume: bool = False):
    tops = np.random.default_rng(0).normal(0, 0.5, (64, 2))
    shards = [
        Hill(shard, tops) for shard in stratified_shards("search.rungs", [text_task("hills", 64)], one_token, rungs, 0)
    ]
    config = SearchConfig(population=8, generations=generations, sigma=0.5)
    run = open_run(folder, {"inputs": {}}, resume=resume, overwrite=False)
    return run, search_in(run.path, config, 1, Plain(), shards), tops


def test_a_raced_search_ends_where_a_whole_one_does(tmp_path):
    top = np.zeros(2)
    for rungs in (1, 4):
        run, outcome, tops = climb(tmp_path / str(rungs), 25, rungs)
        top = tops.mean(axis=0)
        best = -((tops - top) ** 2).sum(axis=1).mean()
        assert outcome.fitness[0] == pytest.approx(best, abs=2e-3)
        np.testing.assert_allclose(outcome.genomes[0], top, atol=0.05)
        passes = sum(sum(row["examples"]) for row in run.read_history())
        assert passes == 25 * (8 * 64 if rungs == 1 else 8 * 8 + 4 * 8 + 2 * 16 + 1 * 32)


def test_only_who_met_all_examples_enters_the_archive(tmp_path):
    run, outcome, tops = climb(tmp_path / "run", 12)
    whole = -((outcome.genomes[:, None, :] - tops[None]) ** 2).sum(axis=-1).mean(axis=1)
    np.testing.assert_allclose(outcome.fitness, whole, rtol=1e-5)
    history = run.read_history()
    for row in history:
        complete = [f for f, n in zip(row["fitness"], row["examples"], strict=True) if n == 64]
        assert len(complete) == 1 and row["best"] == complete[0]
        assert row["scores_of_best"] == {"hills/log_probability": pytest.approx(row["best"])}
    assert history[-1]["best_so_far"] == max(row["best"] for row in history) == outcome.fitness[0]


def test_a_resumed_race_writes_the_same_history(tmp_path):
    whole, outcome, _ = climb(tmp_path / "whole", 11)
    climb(tmp_path / "parts", 4)
    parts, again, _ = climb(tmp_path / "parts", 11, resume=True)
    assert parts.history.read_bytes() == whole.history.read_bytes()
    np.testing.assert_array_equal(again.genomes, outcome.genomes)
    np.testing.assert_array_equal(again.proposed, outcome.proposed)


# ---------------------------------------------------------------------------------------------------------------
# With models


SPACES = {
    "merge": {"space": {"method": "ties", "parameters": {"weight": {"high": 1.5}}, "fixed": {"density": 0.7}}},
    "path": {"data_flow": {"moves": 2, "window": 2}},
}


def text(words, count: int) -> str:
    return " ".join(f"w{next(words)}" for _ in range(count))


def write_config(family, folder, space: str, rungs: int):
    # All of one length: one shape to compile.
    words = iter(np.random.default_rng(0).integers(4, 64, 22 * 6).tolist())
    records = [{"prompt": text(words, 4), "target": text(words, 2)} for _ in range(22)]
    write_lines(folder / "tasks.jsonl", records)
    document = {
        "parents": [str(parent) for parent in family.parents],
        "tasks": [
            {"name": "text", "kind": "likelihood", "file": "tasks.jsonl", "heldout": 0.2},
            {"name": "short", "kind": "likelihood", "file": "tasks.jsonl", "weight": 0.5, "limit": 9},
            {"name": "shown", "kind": "likelihood", "file": "tasks.jsonl", "weight": 0},
        ],
        "search": {"generations": 3, "population": 8, "rungs": rungs},
        **SPACES[space],
    }
    if space == "merge":
        document["base"] = str(family.base)
    return write_yaml(folder / "config.yaml", document)


@pytest.mark.parametrize("space", sample(SPACES, 1))
def test_models_in_a_race_score_as_on_everything(family, tmp_path, space):
    path = write_config(family, tmp_path, space, 4)
    problem = open_problem(path)
    whole = open_problem(path, "search.rungs=1")
    on = open_evaluators(problem, problem.prepare())
    shards, full = on.shards, on.search
    searched = open_evaluator(whole, whole.prepare().shards[0])
    assert len(shards) == 8 and [task.name for task in full.tasks] == ["text", "short"]
    genomes = problem.space.start + 0.3 * np.random.default_rng(0).standard_normal((8, problem.space.dims))
    genomes = genomes.astype(np.float32)
    order = order_shards(shards, shard_order(8, 0, 1))
    halved = halve(order, genomes, init_surrogate(shards, problem.space.dims))
    expected = fitness(searched.tasks, searched.score(genomes))
    assert halved.complete.sum() == 1
    np.testing.assert_allclose(halved.fitness[halved.complete], expected[halved.complete], rtol=1e-5)
    assert halved.examples.max() == 18 + 9


def test_the_command_races_and_says_what_it_saved(family, tmp_path, capsys):
    from evojax_merge.commands import search as search_command

    path = write_config(family, tmp_path, "merge", 3)
    search_command.search(path, tmp_path / "run", resume=False, overwrite=False, seed=None, overrides=[])
    said = " ".join(capsys.readouterr().out.split())
    history = read_lines(tmp_path / "run/history.jsonl")
    done = sum(sum(row["examples"]) for row in history)
    assert f"successive halving: {done:,} of {3 * 8 * 27:,} passes" in said
    assert 0.45 < 1 - done / (3 * 8 * 27) < 0.55
    assert all(row["examples"].count(27) == 2 for row in history)


def test_rungs_that_cannot_be_are_refused(family, tmp_path):
    path = write_config(family, tmp_path, "merge", 2)
    with pytest.raises(InputError, match=r"search\.rungs: 2; .* short has one"):
        open_problem(path, "tasks.1.limit=1")
    with pytest.raises(InputError, match=r"search\.rungs"):
        read_config(path, ["search.rungs=0"], None)
