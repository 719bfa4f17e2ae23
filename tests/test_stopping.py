"""A search that ends before its last generation: by each criterion, killed and resumed, and extended."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
from helpers.searches import search_in
from test_racing import Hill, Plain, one_token, text_task

from evojax_merge.config.search_config import SearchConfig
from evojax_merge.errors import InputError
from evojax_merge.search import loop
from evojax_merge.search.recording import Reporter
from evojax_merge.search.run_folder import RunFolder, open_run
from evojax_merge.search.successive_halving import stratified_shards

TOPS = np.random.default_rng(0).normal(0, 0.5, (64, 2))
GENERATIONS, POPULATION = 12, 8


class Told(Reporter):
    def __init__(self) -> None:
        self.lines: list[str] = []
        self.generations: list[int] = []

    def log(self, text: str) -> None:
        self.lines.append(text)

    def finished(self, generation) -> None:
        self.generations.append(generation.number)


class Level(Hill):
    """Every candidate is as good as any other."""

    def score(self, genomes, progress=lambda done: None):
        return super().score(np.zeros_like(genomes), progress)


def search(folder, *, resume: bool = False, rungs: int = 1, kind=Hill, **settings):
    """The archive, the history's bytes, and what was told."""
    shards = [kind(shard, TOPS) for shard in stratified_shards("rungs", [text_task("hills", 64)], one_token, rungs, 0)]
    config = SearchConfig(**({"population": POPULATION, "generations": GENERATIONS, "sigma": 0.5} | settings))
    document = {"inputs": {}, "search": config.model_dump(mode="json")}
    run, told = open_run(folder, document, resume=resume, overwrite=False), Told()
    archive = search_in(run.path, config, 1, Plain(), shards, reporter=told)
    return archive, run.history.read_bytes(), told


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A search of all generations."""
    archive, history, _ = search(tmp_path_factory.mktemp("whole") / "run")
    assert archive.stopped is None and archive.generations == GENERATIONS
    return history


def first(history: bytes, generations: int) -> bytes:
    return b"".join(history.splitlines(keepends=True)[:generations])


@pytest.fixture
def clock(monkeypatch):
    """One on which every evaluation takes a second."""
    ticks = itertools.count()
    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=lambda: float(next(ticks))))


@pytest.mark.parametrize(("evaluations", "generations"), [(8, 1), (15, 1), (16, 2), (31, 3)])
def test_evaluations_are_never_more(evaluations, generations, whole, tmp_path):
    archive, history, told = search(tmp_path / "run", stop={"evaluations": evaluations})
    assert history == first(whole, generations) and archive.generations == generations
    assert archive.stopped.criterion == "evaluations"
    assert told.lines[-1] == (
        f"stopped after generation {generations} of 12 (search.stop.evaluations: {8 * generations} candidates were "
        f"evaluated, and 8 more would be over {evaluations})"
    )


def test_a_budget_of_all_generations_stops_nothing(whole, tmp_path):
    archive, history, _ = search(tmp_path / "run", stop={"evaluations": 96, "stagnation": 12, "target": 1e30})
    assert archive.stopped is None and history == whole


def test_a_target_is_reached_on_all_examples(tmp_path):
    """With successive halving, by a candidate that met all of them."""
    for rungs in (1, 4):
        _, whole, _ = search(tmp_path / f"whole{rungs}", rungs=rungs)
        rows = RunFolder(tmp_path / f"whole{rungs}").read_history()
        target = rows[5]["best_so_far"]
        reached = next(row["generation"] for row in rows if row["best_so_far"] >= target)
        archive, history, _ = search(tmp_path / f"run{rungs}", rungs=rungs, stop={"target": target})
        assert archive.stopped.criterion == "target" and history == first(whole, reached)
        assert archive.fitness[0] >= target
    # One that the start has reached already ends it after the first.
    assert search(tmp_path / "low", stop={"target": -1e9})[0].generations == 1


def test_stagnation_counts_from_the_generation_that_found_the_best(whole, tmp_path):
    archive, _, told = search(tmp_path / "level", kind=Level, stop={"stagnation": 3})
    assert archive.generations == 4 and archive.stopped.criterion == "stagnation"
    assert "has not risen for 3 generations" in told.lines[-1]


def test_seconds_count_over_resumes(whole, tmp_path, clock):
    archive, history, told = search(tmp_path / "run", stop={"seconds": 5})
    assert archive.generations == 5 and archive.stopped.criterion == "seconds" and history == first(whole, 5)
    assert "5.0 s, of 5 s" in told.lines[-1]
    search(tmp_path / "parts", generations=3)
    archive, history, told = search(tmp_path / "parts", resume=True, stop={"seconds": 5})
    assert told.generations == [4, 5] and history == first(whole, 5)


@pytest.mark.parametrize("stop", [{"evaluations": 40}, {"target": -1e9}, {"stagnation": 1}])
def test_what_has_stopped_stays_so_and_goes_on_with_more(stop, whole, tmp_path):
    kind = Level if "stagnation" in stop else Hill
    archive, history, _ = search(tmp_path / "run", kind=kind, stop=stop)
    again, unchanged, told = search(tmp_path / "run", kind=kind, stop=stop, resume=True)
    assert unchanged == history and told.generations == [] and again.stopped == archive.stopped
    assert f"{archive.generations} generations are saved: nothing to search (search.stop." in told.lines[-1]
    np.testing.assert_array_equal(again.genomes, archive.genomes)
    np.testing.assert_array_equal(again.proposed, archive.proposed)
    # Neither the criteria nor how often it was stopped shows in what comes.
    longer, history, told = search(tmp_path / "run", kind=kind, resume=True)
    assert longer.stopped is None and told.generations == list(range(archive.generations + 1, GENERATIONS + 1))
    assert history == (whole if kind is Hill else search(tmp_path / "level", kind=Level)[1])


def test_a_budget_below_one_generation_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"stop\.evaluations: 7 are fewer than the 8 candidates of one generation"):
        search(tmp_path / "run", stop={"evaluations": 7})
