"""The genetic algorithm of layer paths: its operators, what it finds, runs that are continued, bad input."""

import json
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.commands import run_here
from helpers.families import build_family
from helpers.files import write_yaml
from helpers.searches import search_in
from helpers.trees import search_trees
from hypothesis import given, settings
from hypothesis import strategies as st
from test_search import OwnScorer

import evojax_merge as em
from evojax_merge.config.search_config import SearchConfig
from evojax_merge.models.paths import LayerPath
from evojax_merge.search.loop import INIT_KEY, Archive, generation_key
from evojax_merge.search.protocols import HasMoves
from evojax_merge.search.recording import Generation, Reporter
from evojax_merge.search.strategies import path_ga
from evojax_merge.search.strategies.registry import StrategySettings, make_strategy, seeds_of
from evojax_merge.spaces.bounds import from_unit
from evojax_merge.spaces.layer_path import LayerEdit, MoveSpace, ScaleBounds

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from bench.searches.strategy_functions import scores_of

BOUNDS = ScaleBounds(0.5, 2.0)


def make(name: str, space: MoveSpace, population: int = 12) -> Any:
    settings = StrategySettings(space.dims, population, 1 / 6, 100, from_unit, move_genes=space.move_genes)
    return make_strategy("search", name, settings)


def spaces() -> st.SearchStrategy[MoveSpace]:
    def space(depth: int, donors: list[int], count: int, window: int, scaled: bool) -> MoveSpace:
        return MoveSpace((depth, *donors), count, min(window, depth), BOUNDS, scaled, 40, 0)

    depths = st.integers(1, 7)
    return st.builds(space, depths, st.lists(depths, max_size=2), st.integers(1, 5), st.integers(1, 4), st.booleans())


# ---------------------------------------------------------------------------------------------------------------
# Operators


@given(spaces(), st.integers(0, 2**31 - 1))
@settings(max_examples=40)
def test_every_genome_is_a_list_of_moves(space: MoveSpace, seed: int) -> None:
    """What is asked for is, gene by gene, what the space makes of the moves that it decodes to."""
    assert isinstance(space, HasMoves)
    strategy, rng = make("path_ga", space, 6), np.random.default_rng(seed)
    state = strategy.init(generation_key(seed, INIT_KEY), space.start[None])
    for number in range(4):
        genomes, state = strategy.ask(generation_key(seed, number), state)
        genomes = np.asarray(genomes)
        assert genomes.shape == (6, space.dims) and genomes.dtype == np.float32
        if number == 0:
            np.testing.assert_array_equal(genomes[0], space.start)
        for genome in genomes:
            if np.array_equal(genome, space.start):
                continue
            moves = space.moves(genome)
            # There is nothing to scale by where there are no scales.
            assert space.scaled or all(move.what != "scale" for move in moves)
            again = space.genome(moves).reshape(space.count, -1)
            rows = genome.reshape(space.count, -1)
            # A block that would end behind the last layer is cut, by the space alone.
            uncut = [gene for gene in range(len(space.genes)) if space.genes[gene] != "length"]
            np.testing.assert_allclose(rows[: len(moves), uncut], again[: len(moves), uncut], atol=1e-5)
            assert (rows[len(moves) :, 0] == again[len(moves) :, 0]).all()
            # A scale of 1 is drawn exactly.
            assert all(abs(move.scale - 1) > 1e-4 or abs(np.log(move.scale)) < 1e-6 for move in moves)
        fitness = rng.normal(size=6).round(1)
        fitness[rng.random(6) < 0.2] = np.nan
        state = strategy.tell(generation_key(seed, number), state, genomes, scores_of(fitness))


def test_children_take_whole_moves_from_two_parents() -> None:
    """Of parents that share a move, each child has it; any other of its moves is one of a parent's."""
    space = MoveSpace((6, 6), 4, 3, BOUNDS, True, 40, 0)
    strategy = make("path_ga", space)
    shared = LayerEdit("repeat", 2, 2)
    lists = [
        [shared, LayerEdit("skip", 0, 1), LayerEdit("scale", 1, 3, 0.7)],
        [LayerEdit("splice", 4, 1, 1.0, 1), shared, LayerEdit("scale", 5, 1, 1.5)],
    ]
    parents = [strategy._moves(space.genome(moves), space.start) for moves in lists]
    (both,), rng, lengths = set(parents[0]) & set(parents[1]), np.random.default_rng(0), set()
    for _ in range(200):
        child = strategy._recombined(rng, *parents)
        counts = Counter(child)
        assert counts[both] == 1 or len(child) == space.count
        assert set(child) <= {*parents[0], *parents[1]} and max(counts.values()) == 1 and len(child) <= space.count
        lengths.add(len(child))
    assert lengths == {1, 2, 3, 4}


@given(spaces(), st.integers(0, 2**31 - 1))
@settings(max_examples=20)
def test_members_score_differently_and_nothing_is_evaluated_twice(space: MoveSpace, seed: int) -> None:
    """Equals fill only the places that nothing else is left for, and the draws of a child are counted."""
    strategy, rng = make("path_ga", space, 6), np.random.default_rng(seed)
    state, met = strategy.init(generation_key(seed, INIT_KEY), space.start[None]), set[bytes]()
    for number in range(6):
        genomes, state = strategy.ask(generation_key(seed, number), state)
        genomes = np.asarray(genomes)
        again = sum(genome.tobytes() in met for genome in genomes) + 6 - len(np.unique(genomes, axis=0))
        # A space of this many genomes, of one move or none, is soon exhausted.
        assert not again or space.count == 1 or max(space.move_genes[2:4]) == 1
        met |= {genome.tobytes() for genome in genomes}
        fitness = rng.integers(4, size=6) / 4
        state = strategy.tell(generation_key(seed, number), state, genomes, scores_of(fitness))
        best = np.unique(state.fitness)[::-1]
        np.testing.assert_array_equal(state.fitness[: len(best)], best)
    assert len(state.evaluated) == 36


def test_the_latest_genomes_alone_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(path_ga, "MAX_EVALUATED", 8)
    space = MoveSpace((6,), 3, 2, BOUNDS, False, 40, 0)
    strategy = make("path_ga", space, 5)
    state = strategy.init(generation_key(0, INIT_KEY), space.start[None])
    for number in range(3):
        genomes, state = strategy.ask(generation_key(0, number), state)
        before, state = state, strategy.tell(generation_key(0, number), state, genomes, scores_of(np.zeros(5)))
    assert len(state.evaluated) == 8
    np.testing.assert_array_equal(state.evaluated[:3], before.evaluated[-3:])


def test_members_are_the_best_and_of_equals_the_shorter() -> None:
    space = MoveSpace((4,), 3, 2, BOUNDS, False, 40, 0)
    strategy = make("path_ga", space, 3)
    state = strategy.init(generation_key(0, INIT_KEY), space.start[None])
    moves = [LayerEdit("skip", 0, 1), LayerEdit("repeat", 1, 1), LayerEdit("repeat", 3, 1)]
    genomes = np.stack([space.genome(moves), space.genome(moves[:1]), space.genome(moves[1:])])
    state = strategy.tell(generation_key(0, 0), state, genomes, scores_of(np.array([1.0, 1.0, np.nan])))
    np.testing.assert_array_equal(state.members, genomes[[1, 0, 2]])
    np.testing.assert_array_equal(state.fitness, [1.0, 1.0, -np.inf])
    # A worse generation changes nothing; a better candidate takes the place of the failed one.
    others = np.stack([space.genome(moves[2:]), space.genome(moves[:2]), space.start])
    state = strategy.tell(generation_key(0, 1), state, others, scores_of(np.array([np.nan, -np.inf, 0.5])))
    # An equal of the best waits behind what scores otherwise.
    np.testing.assert_array_equal(state.members, [genomes[1], space.start, genomes[0]])
    assert strategy.metrics(state) == {"moves": 1.0}


# ---------------------------------------------------------------------------------------------------------------
# What it finds

# Three edits of six layers: the first one skipped, a block repeated, and one layer of another parent.
TARGET = (1, 2, 3, 2, 3, 10, 5)


def closeness(path: LayerPath | None, target: Sequence[int] = TARGET) -> float:
    """Minus the edit distance (Levenshtein) of a path's layers from a target's."""
    if path is None:
        return np.nan
    row = list(range(len(target) + 1))
    for i, layer in enumerate(path.layers, 1):
        before, row[0] = row[0], i
        for j, wanted in enumerate(target, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (layer != wanted))
    return -float(row[-1])


def trap(path: LayerPath | None) -> float:
    """A deceptive landscape: a slope leads to three layers of the other parent, at 0; two middle layers run twice are
    worse than most of it, and run four times the best path, at 1."""
    looped = {2: -1.5, 4: 1.0}
    for times, fitness in looped.items():
        if path is not None and path.layers == (0, *(1, 2) * times, 3, 4, 5):
            return fitness
    return closeness(path, (0, 7, 8, 3, 10, 11))


def best_of(
    name: str, space: MoveSpace, seed: int, generations: int,
    landscape: Callable[[LayerPath | None], float] = closeness, goal: float = 0.0,
) -> float:  # fmt: skip
    """The best fitness of a search that ends at the goal, or after so many generations."""
    strategy, best = make(name, space, 20), -np.inf
    state = strategy.init(generation_key(seed, INIT_KEY), space.start[None])
    for number in range(generations):
        genomes, state = strategy.ask(generation_key(seed, number), state)
        fitness = np.array([landscape(path) for path in space.decode(np.asarray(genomes))])
        best = max(best, np.nanmax(fitness))
        if best >= goal:
            break
        state = strategy.tell(generation_key(seed, number), state, genomes, scores_of(fitness))
    return best


def test_it_finds_a_path_that_random_search_does_not() -> None:
    space = MoveSpace((6, 6), 5, 3, BOUNDS, False, 12, 0)
    edits = [LayerEdit("skip", 0, 1), LayerEdit("repeat", 2, 2), LayerEdit("splice", 4, 1, 1, 1)]
    assert closeness(space.path(edits)) == 0
    found = {name: [best_of(name, space, seed, 30) for seed in range(3)] for name in ("path_ga", "random")}
    assert sorted(found["path_ga"])[1] == 0
    assert max(found["random"]) < 0


@pytest.mark.parametrize("seed", [1, 3, 4, 6, 7])
def test_it_leaves_a_local_optimum(seed: int) -> None:
    """A search whose members may score the same, and whose children may have been evaluated, ends at 0 from these
    seeds."""
    assert best_of("path_ga", MoveSpace((6, 6), 4, 2, BOUNDS, False, 14, 0), seed, 60, trap, 1.0) == 1


# ---------------------------------------------------------------------------------------------------------------
# Whole searches


class Stop(Exception):
    pass


class Stopping(Reporter):
    def finished(self, generation: Generation) -> None:
        if generation.number == 3:
            raise Stop


def test_a_search_begins_at_the_parents_and_continues_to_the_byte(tmp_path: Path) -> None:
    """Interrupted after the third generation; test_data_flow.py kills searches of real models."""
    space = MoveSpace((6, 6), 3, 3, BOUNDS, True, 12, 0)

    def search(name: str, reporter: Reporter) -> Archive:
        def score(genomes: np.ndarray) -> np.ndarray:
            return np.array([closeness(path) for path in space.decode(genomes)])

        (tmp_path / name).mkdir(exist_ok=True)
        config = SearchConfig(strategy="path_ga", population=6, generations=6)
        return search_in(tmp_path / name, config, 1, space, [OwnScorer(score)], reporter=reporter)

    whole = search("whole", Reporter())
    with pytest.raises(Stop):
        search("parts", Stopping())
    parts = search("parts", Reporter())
    np.testing.assert_array_equal(whole.genomes, parts.genomes)
    histories = [(tmp_path / name / "history.jsonl").read_bytes() for name in ("whole", "parts")]
    assert histories[0] == histories[1]
    rows = [json.loads(line) for line in histories[0].splitlines()]
    paths = space.decode(np.array(rows[0]["genomes"], np.float32)[:2])
    assert [path.layers for path in paths if path is not None] == [tuple(range(6)), tuple(range(6, 12))]
    best = [row["best_so_far"] for row in rows]
    assert len(best) == 6 and best == sorted(best) and best[-1] > best[0]


@pytest.mark.parametrize(
    ("named", "seeds"), [({}, ["parents"]), ({"seeds": []}, []), ({"seeds": ["uniform"]}, ["uniform"])], ids=str
)
def test_seeds_are_the_parents_unless_others_are_named(named: dict[str, Any], seeds: list[str]) -> None:
    search = SearchConfig(strategy="path_ga", **named)
    assert list(seeds_of("search.strategy", search)) == seeds
    document = search.model_dump(mode="json")
    assert ("seeds" in document) == ("seeds" in named) and SearchConfig(**document) == search
    assert seeds_of("search.strategy", SearchConfig(strategy="cma_es")) is None
    assert list(seeds_of("search.strategy", SearchConfig(strategy="grid"))) == []


@pytest.mark.parametrize(
    "space",
    [{"space": {"method": "linear", "parameters": {"weight": {}}}}, {"data_flow": {"form": "indicator"}}],
    ids=["parameter", "indicator"],
)
def test_a_space_without_moves_is_refused(
    space: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build_family(tmp_path)
    tasks = [{"name": "text", "kind": "likelihood", "file": "tasks.jsonl", "heldout": 0.25}]
    document = {"parents": ["parent0", "parent1"], "tasks": tasks, "search": {"strategy": "path_ga"}, **space}
    config = write_yaml(tmp_path / "config.yaml", document)
    (line,) = run_here("search", config, "--out", tmp_path / "run", status=2).stderr.splitlines()
    assert line.endswith(
        "config.yaml: search: strategy: path_ga searches moves of a layer path, and this space has none; expected "
        "data_flow with form: moves, or another strategy, such as cma_es"
    )
    assert not (tmp_path / "run").exists()


def test_pytrees_have_no_moves() -> None:
    parents = [{"w": np.zeros(3, np.float32)}, {"w": np.ones(3, np.float32)}]
    with pytest.raises(em.InputError, match="path_ga searches moves of a layer path"):
        search_trees(parents, lambda merged: merged["w"].sum(), strategy="path_ga")


def test_repeats_of_repeats_are_too_long_before_they_fill_the_memory() -> None:
    """A thousand repeats of all layers would have 2 ** 1000 times as many."""
    space = MoveSpace((4,), 1000, 4, BOUNDS, False, 40, 0)
    genome = space.genome([LayerEdit("repeat", 0, 4)] * 1000)
    assert space.decode(genome[None]) == [None]
