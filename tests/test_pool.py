"""A pool of models that breed: genomes and members, who breeds and who stays, what is scored, and whole searches as
real processes."""

import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from helpers.commands import assert_refused, run_here
from helpers.families import build_family
from helpers.files import read_json, read_lines, read_recipe, write_lines, write_yaml
from helpers.models import random_records, state, tiny_config
from helpers.sampling import thorough
from helpers.searches import open_problem
from hostile import start_command
from merge_kernels import METHODS
from reference.merging import slerp

from evojax_merge.config.search_config import Config
from evojax_merge.errors import InputError
from evojax_merge.evaluation.scores import Scores, fitness
from evojax_merge.mergekit.execute import merge_to, prepare
from evojax_merge.mergekit.write import dump_yaml
from evojax_merge.models.architecture import tensors_of
from evojax_merge.report.winner import PoolReport
from evojax_merge.schema.genealogy import (
    FIRST,
    GENES,
    METHOD,
    NONE,
    NUMBER,
    SECOND,
    Genealogy,
    founder_genomes,
    founding_genealogy,
)
from evojax_merge.search.checkpoints import Saved
from evojax_merge.search.loop import INIT_KEY, generation_key
from evojax_merge.search.strategies.pool import Pool, attraction, keep_best, keep_competing, pool
from evojax_merge.search.strategies.registry import PoolSettings, StrategySettings
from evojax_merge.spaces.breeding import BreedingSpace, genome_genes
from evojax_merge.steps.selection import open_evaluator

FOUNDERS, GENERATIONS, POPULATION = 3, 5, 6
RANDOM_METHODS = ["slerp", "dare_ties", "linear"]

# ---------------------------------------------------------------------------------------------------------------
# Genomes and members


def space_of(methods: list[str], founders: int = 3, layers: int = 4, split: bool = False) -> BreedingSpace:
    known = tuple(METHODS[name] for name in methods)
    return BreedingSpace(known, layers, split, founding_genealogy(founders, genome_genes(known, split)))


def child(space: BreedingSpace, number: int, parents: tuple[int, int], method: int, genes: list[float]) -> np.ndarray:
    genome = np.zeros(space.dims, np.float32)
    genome[:GENES] = number, *parents, method
    genome[GENES : GENES + len(genes)] = genes
    return genome


def test_genes_are_parameters_from_bound_to_bound():
    space = space_of(["slerp", "dare_ties"])
    # Two weights, two densities, lambda: SLERP's only gene is the first.
    assert space.dims == GENES + 5
    genomes = [child(space, 3, (0, 1), 0, [0.25]), child(space, 4, (2, 0), 1, [0.5, 1.0, 0.1234567, 0.0, 0.75])]
    slerp, dare = space.decode(np.array(genomes))
    assert (slerp.method, slerp.number, [one.number for one in slerp.parents]) == ("slerp", 3, [0, 1])
    assert slerp.parameters == {"t": np.float64(0.25)} and not slerp.is_founder
    assert [one.number for one in dare.parents] == [2, 0] and dare.method == "dare_ties"
    np.testing.assert_array_equal(dare.parameters["weight"], [0.5, 1.0])
    # Densities are what a recipe says with three digits.
    np.testing.assert_array_equal(dare.parameters["density"], [0.123, 0.0])
    assert dare.parameters["lambda"] == 1.5
    assert space.decode(founder_genomes(3, 5))[2].is_founder


@pytest.mark.parametrize(("gene", "place"), [(0.0, 0), (0.3, 1), (0.6, 3), (0.999, 4), (1.0, 4)])
def test_from_the_split_on_parents_change_places(gene, place):
    space = space_of(["slerp"], split=True)
    (member,) = space.decode(child(space, 3, (0, 1), 0, [0.4, gene])[None])
    assert member.split == place
    orders = [[parent.number for parent in member.ordered(layer)] for layer in range(4)]
    assert orders == [[0, 1]] * place + [[1, 0]] * (4 - place)


def test_a_lineage_may_be_long_and_is_in_order_of_birth():
    space = space_of(["slerp"])
    births = [child(space, 3, (0, 1), 0, [0.5])]
    births += [child(space, number, (number - 1, number % 3), 0, [0.5]) for number in range(4, 3004)]
    space = space.within(np.array(births[:-1]))
    (last,) = space.decode(births[-1][None])
    assert [one.number for one in last.lineage()] == list(range(3, 3004))
    # A member is one object, however it is met.
    assert space.member(births[0]) is last.lineage()[0]
    # In the tree each of them stands once, and what is met again is not unfolded.
    lines = PoolReport(last, 4, ("a", "b", "c")).terminal().splitlines()
    assert len(lines) == 2 * 3001 + 1 and lines[0] == "member-3003: slerp of t 0.5"


# ---------------------------------------------------------------------------------------------------------------
# Who breeds, and who stays


def strategy_of(founders: int = 3, population: int = 4, size: int = 4, **settings: Any) -> Pool:
    given = {"selection": "complementary", "replace": "worst"} | settings
    made = PoolSettings(founders=founders, methods=2, size=size, **given)
    return pool(StrategySettings(GENES + 2, population, 1 / 6, 10, pool=made))


def scores_of(values: Any, tasks: tuple[int, ...] = (), weights: tuple[float, ...] = (1.0,)) -> Scores:
    matrix = np.asarray(values, np.float32)
    task_of = np.array(tasks or [0] * matrix.shape[1])
    names = tuple(f"task{t}" for t in range(len(weights)))
    return Scores(matrix, np.ones(matrix.shape, bool), task_of, names, np.array(weights))


def advance(strategy: Pool, state: Any, generation: int, score: Any) -> tuple[np.ndarray, Any]:
    genomes, asked = strategy.ask(generation_key(0, generation), state)
    genomes = np.asarray(genomes)
    return genomes, strategy.tell(generation_key(0, generation), asked, genomes, scores_of(score(genomes)))


def by_genes(genomes: np.ndarray) -> np.ndarray:
    """Two examples; founders are worth 0, children what their genes are."""
    return np.where(genomes[:, [METHOD]] == NONE, 0, genomes[:, GENES:])


def test_attraction_is_the_papers():
    rng = np.random.default_rng(0)
    scores, shares = rng.normal(-2, 1, (5, 7)), rng.random(7)
    for first in range(5):
        found = attraction(scores, shares, first)
        for b in range(5):
            expected = 0.0
            for j in range(7):
                above = [scores[i, j] - min(scores[:, j]) for i in range(5)]
                expected += shares[j] / (sum(above) + 1e-9) * max(above[b] - above[first], 0)
            assert found[b] == pytest.approx(expected, rel=1e-12)


def test_the_complement_is_who_solves_what_the_first_does_not():
    # 0 and 1 solve the first half, 3 the second; 2 is a little better than 0 everywhere.
    scores = np.array([[1, 1, 0, 0], [1, 1, 0, 0.1], [1.1, 1.1, 0.2, 0.2], [0, 0, 1, 1]], float)
    assert np.argmax(attraction(scores, np.full(4, 0.25), 0)) == 3


def test_competition_keeps_who_alone_solves_an_example():
    generalists = [[0.9, 0.9, 0.9, 0.0], [0.91, 0.9, 0.9, 0.0], [0.9, 0.91, 0.9, 0.0], [0.9, 0.9, 0.91, 0.0]]
    scores, shares = np.array([*generalists, [0.0, 0.0, 0.0, 1.0]]), np.full(4, 0.25)
    assert 4 not in keep_best(scores, shares, 4)
    assert 4 in keep_competing(scores, shares, 4)
    # Log-probabilities are all below 0: only how far above the lowest they are counts.
    assert keep_competing(scores - 5, shares, 4).tolist() == keep_competing(scores, shares, 4).tolist()
    # Of equals the older stays.
    assert keep_competing(np.ones((3, 2)), np.ones(2) / 2, 2).tolist() == [0, 1]


@pytest.mark.parametrize("selection", ["complementary", "tournament", "random"])
@pytest.mark.parametrize("replacement", ["worst", "competition"])
def test_a_pool_improves_and_is_as_large_as_it_may_be(selection, replacement):
    strategy = strategy_of(selection=selection, replace=replacement)
    state = strategy.init(generation_key(0, INIT_KEY), founder_genomes(3, 2)[:1])
    means, born = [], []
    for generation in range(12):
        genomes, state = advance(strategy, state, generation, by_genes)
        born += genomes[genomes[:, METHOD] != NONE, NUMBER].astype(int).tolist()
        means.append(strategy.metrics(state)["pool_mean"])
        members = [n for n in state.members.tolist() if n != NONE]
        assert len(members) == min(4, 3 + len(born)) == strategy.metrics(state)["members"]
        # Parents are members that were there, and two of them.
        children = genomes[genomes[:, METHOD] != NONE]
        assert (children[:, FIRST] != children[:, SECOND]).all()
        assert (children[:, [FIRST, SECOND]] < children[:, [NUMBER]]).all()
        assert ((children[:, GENES:] >= 0) & (children[:, GENES:] <= 1)).all()
    assert len(set(born)) == len(born) == 12 * 4 - 3
    assert means[-1] > 0.7 > means[0]


def test_founders_come_first_however_many_they_are():
    strategy = strategy_of(founders=6, population=4)
    state = strategy.init(generation_key(0, INIT_KEY), founder_genomes(6, 2)[:1])
    first, state = advance(strategy, state, 0, by_genes)
    second, state = advance(strategy, state, 1, by_genes)
    assert first[:, NUMBER].tolist() == [0, 1, 2, 3] and second[:, NUMBER].tolist() == [4, 5, 12, 13]
    assert (first[:, METHOD] == NONE).all() and second[2:, METHOD].min() >= 0
    # Every number is found again under itself.
    for number in (0, 5, 12, 13):
        assert Genealogy(founder_genomes(6, 2), strategy.context(state)).genome(number)[NUMBER] == number


def test_who_fails_never_enters():
    strategy = strategy_of()
    state = strategy.init(generation_key(0, INIT_KEY), founder_genomes(3, 2)[:1])

    def only_founder_2(genomes: np.ndarray) -> np.ndarray:
        values = np.where(genomes[:, [NUMBER]] == 2, 0.5, np.nan) * np.ones((1, 2))
        values[0] = [0.5, np.nan]
        return values

    genomes, state = advance(strategy, state, 0, only_founder_2)
    assert state.members.tolist() == [2, NONE, NONE, NONE]
    # One member cannot breed: founders do.
    genomes, _ = strategy.ask(generation_key(0, 1), state)
    assert (np.asarray(genomes)[:, [FIRST, SECOND]] < 3).all()


def test_examples_count_as_their_tasks_do():
    """Three examples of a task of weight 1/4, one of a task of weight 3/4."""
    strategy = strategy_of(size=2)
    state = strategy.init(generation_key(0, INIT_KEY), founder_genomes(3, 2)[:1])
    genomes, state = strategy.ask(generation_key(0, 0), state)
    values = [[1, 1, 1, 0], [0, 0, 0, 1], [0, 0, 0, 0], [0, 0, 1, 0.5]]
    scores = scores_of(values, (0, 0, 0, 1), (0.25, 0.75))
    state = strategy.tell(generation_key(0, 0), state, genomes, scores)
    np.testing.assert_allclose(state.shares, [1 / 12, 1 / 12, 1 / 12, 3 / 4])
    assert state.members.tolist() == [1, 6] and strategy.metrics(state)["founders"] == 1
    assert strategy.metrics(state)["pool_mean"] == pytest.approx(scores.fitness[[1, 3]].mean())


def test_a_saved_state_goes_on_as_if_it_had_never_stopped():
    strategy = strategy_of(replace="competition")
    state = strategy.init(generation_key(0, INIT_KEY), founder_genomes(3, 2)[:1])
    for generation in range(4):
        _, state = advance(strategy, state, generation, by_genes)
    saved = Saved(4, {name: np.asarray(value) for name, value in vars(state).items()}, 0, b"")
    again = strategy_of(replace="competition")
    restored = saved.state(again.init(generation_key(0, INIT_KEY), founder_genomes(3, 2)[:1]))
    for generation in range(4, 7):
        one, state = advance(strategy, state, generation, by_genes)
        other, restored = advance(again, restored, generation, by_genes)
        np.testing.assert_array_equal(one, other)
    # What does not grow must fit.
    with pytest.raises(InputError, match="another version"):
        saved.state(strategy_of(size=5).init(generation_key(0, INIT_KEY), founder_genomes(3, 2)[:1]))


# ---------------------------------------------------------------------------------------------------------------
# Models


@pytest.fixture(scope="module")
def config_file(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("pool")
    build_family(root, tiny_config("qwen3", tie_word_embeddings=False), FOUNDERS, torch.bfloat16)
    write_lines(root / "tasks.jsonl", random_records(12))
    write_lines(root / "heldout.jsonl", random_records(8, seed=2))
    document = {
        "base": "base",
        "parents": [f"parent{k}" for k in range(FOUNDERS)],
        "pool": {"methods": RANDOM_METHODS, "split": True, "size": 4, "slots": 1},
        "tasks": [
            {"name": "text", "kind": "likelihood", "file": "tasks.jsonl", "heldout": "heldout.jsonl"},
            {"name": "words", "kind": "exact_match", "file": "tasks.jsonl", "max_new_tokens": 2, "weight": 0},
        ],
        "search": {"generations": GENERATIONS, "population": POPULATION},
        "seed": 5,
    }
    return write_yaml(root / "config.yaml", document)


def execute(documents: list[dict[str, Any]], folder: Path) -> Path:
    """The merges of a lineage, each as a model folder that the later ones name; the last one's."""
    for i, document in enumerate(documents):
        name = document.get("name", "result")
        assert (i == len(documents) - 1) == (name == "result")
        text = dump_yaml({key: value for key, value in document.items() if key != "name"})
        # Relative references are looked up beside the recipe.
        folder.mkdir(exist_ok=True)
        (folder / f"{name}.yaml").write_text(text)
        merge_to(prepare(read_recipe(folder / f"{name}.yaml")), folder / name, card="")
    return folder / "result"


def test_what_is_scored_is_what_the_lineage_gives(config_file, tmp_path):
    """Members of the third generation of random breeding, by every method: their weights are those that their recipes
    give, to the bit, and so are their scores."""
    problem = open_problem(config_file)
    evaluator = open_evaluator(problem, problem.prepare().shards[0])
    space, bank = problem.space, evaluator.evaluator.bank
    rng, births = np.random.default_rng(1), []
    for p in range(9):
        number = FOUNDERS + p
        parents = rng.choice(np.arange(max(0, number - 4), number), 2, replace=False)
        genes = rng.random(space.dims - GENES)
        births.append(child(space, number, tuple(parents), p % 3, genes.tolist()))
    problem, evaluator = problem.within(np.array(births)), evaluator.within(np.array(births))
    members = problem.space.decode(np.array(births[-3:]))
    assert {one.method for one in members} == set(RANDOM_METHODS) and min(len(one.lineage()) for one in members) > 2
    assert any(0 < one.split < problem.backend.models.decoder.layers for member in members for one in member.lineage())
    scores, folders = evaluator.score(np.array(births[-3:])), []
    bank.hold(members)
    for genome, member in zip(births[-3:], members, strict=True):
        folders.append(execute(problem.backend.candidates.to_recipe(genome), tmp_path / str(len(folders))))
        written = state(folders[-1])
        assert set(written) == {name for name, _, _ in tensors_of(problem.backend.models.decoder)}
        for name, values in written.items():
            np.testing.assert_array_equal(np.asarray(bank.store.read(member, name), np.float32), values, err_msg=name)
    run_here("evaluate", *folders, "--tasks", _tasks(config_file, tmp_path), "--json", tmp_path / "scores.json")
    told = [row["fitness"] for row in read_json(tmp_path / "scores.json")]
    np.testing.assert_allclose(told, fitness(evaluator.tasks, scores), atol=1e-6)


def _tasks(config_file: Path, folder: Path) -> Path:
    task = yaml.safe_load(config_file.read_text())["tasks"][0]
    task = {name: value for name, value in task.items() if name != "heldout"} | {
        "file": str(config_file.parent / "tasks.jsonl")
    }
    return write_yaml(folder / "tasks.yaml", {"tasks": [task]})


def test_a_child_between_its_parents(config_file):
    """SLERP of two founders, against float64; the first layers of one order, the last of the other."""
    problem = open_problem(config_file, "pool.methods=[slerp]")
    evaluator = open_evaluator(problem, problem.prepare().shards[0])
    space = problem.space
    layers = problem.backend.models.decoder.layers
    genome = child(space, FOUNDERS, (2, 0), 0, [0.25, 1.5 / (layers + 1)])
    (member,), bank = space.decode(genome[None]), evaluator.evaluator.bank
    bank.hold([member])
    first, second = state(config_file.parent / "parent2"), state(config_file.parent / "parent0")
    for name, leaf, place in tensors_of(problem.backend.models.decoder):
        early = place[0] < 1 if leaf.stack is not None else leaf.component == "embedding"
        ordered = [parent[name].astype(np.float64) for parent in ((first, second) if early else (second, first))]
        expected = slerp(*ordered, 0.25)
        np.testing.assert_allclose(
            np.asarray(bank.store.read(member, name), np.float64), expected, rtol=2**-8, atol=1e-4
        )


def test_a_child_that_no_recipe_could_give_has_failed(config_file):
    """Linear weights that sum to zero, beside a child that is right."""
    problem = open_problem(config_file)
    evaluator = open_evaluator(problem, problem.prepare().shards[0])
    number = RANDOM_METHODS.index("linear")
    children = [child(problem.space, FOUNDERS + p, (0, 1), number, [weight, 0]) for p, weight in enumerate((0, 0.5))]
    found = fitness(evaluator.tasks, evaluator.score(np.array(children)))
    assert np.isnan(found).tolist() == [True, False]


def test_members_are_bred_again_where_they_were_not_kept(config_file):
    """With one slot the pool's members go and come back; nothing of what is found depends on it."""
    found = []
    for slots in (1, 8):
        problem = open_problem(config_file, f"pool.slots={slots}")
        evaluator = open_evaluator(problem, problem.prepare().shards[0])
        strategy, values = problem.strategy, []
        saved = strategy.init(generation_key(5, INIT_KEY), problem.space.start[None])
        for generation in range(3):
            genomes, asked = strategy.ask(generation_key(5, generation), saved)
            bred = evaluator.within(strategy.context(asked))
            scores = bred.score(np.asarray(genomes)).matrices["text"]["log_probability"]
            saved = strategy.tell(generation_key(5, generation), asked, genomes, scores_of(scores))
            values.append(scores)
        found.append((np.array(values), evaluator.evaluator.bank.bred))
    np.testing.assert_array_equal(found[0][0], found[1][0])
    assert found[0][1] >= found[1][1] >= 3 * POPULATION - FOUNDERS


# ---------------------------------------------------------------------------------------------------------------
# Whole searches


@pytest.fixture(scope="module")
def finished(config_file, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "whole"
    (out.parent / "stdout").write_text(run_here("search", config_file, "--out", out).stdout)
    return out


def contents(out: Path) -> dict[str, bytes]:
    files = ["history.jsonl", "result.json", "config.yaml", "best/recipe.yaml", "best/model/model.safetensors"]
    return {name: (out / name).read_bytes() for name in files}


def test_a_search_ends_with_a_model_and_its_family_tree(finished, config_file, tmp_path):
    history = read_lines(finished / "history.jsonl")
    assert [row["members"] for row in history] == [4] * GENERATIONS
    result = read_json(finished / "result.json")
    documents = list(yaml.safe_load_all((finished / "best/recipe.yaml").read_text()))
    lineage = result["lineage"]
    # The seed is one whose winner is not a founder's child.
    assert len(documents) == len(lineage) > 1
    assert [one.get("name", lineage[-1]["name"]) for one in documents] == [one["name"] for one in lineage]
    assert lineage[-1]["name"] == f"member-{int(result['genome'][NUMBER])}"
    winner = execute(documents, tmp_path)
    assert (winner / "model.safetensors").read_bytes() == (finished / "best/model/model.safetensors").read_bytes()
    card, told = (finished / "best/model/README.md").read_text(), (finished.parent / "stdout").read_text()
    # Compared with the best of the founders, the candidates of the first generation that no method bred.
    rows = zip(history[0]["genomes"], history[0]["fitness"], strict=True)
    founders = [fitness for genome, fitness in rows if genome[METHOD] == NONE]
    best = int(np.argmax(founders))
    assert len(founders) == FOUNDERS and result["best_founder"] == f"parent{best}"
    assert result["search_fitness"]["best founder"] == pytest.approx(founders[best], abs=1e-5)
    for text in (card, told):
        assert f"{lineage[-1]['name']}: {lineage[-1]['method']}" in text and "  parent" in text
        assert f", the best founder parent{best} {founders[best]:.4f}." in " ".join(text.split())
    assert str(config_file.parent) not in card
    assert "The winner's family tree" in (finished / "report.html").read_text(encoding="utf-8")
    assert [row["role"] for row in result["table"]] == ["base", *["parent"] * FOUNDERS, "winner"]
    assert yaml.safe_load((finished / "config.yaml").read_text())["search"]["strategy"] == "pool"


@thorough
def test_killed_and_resumed_is_as_never_stopped(config_file, finished, tmp_path):
    out, model = tmp_path / "killed", tmp_path / "model"
    process = start_command("search", config_file, "--out", out)
    history = out / "history.jsonl"
    while not (history.exists() and history.read_bytes().count(b"\n") >= 3):
        assert process.poll() is None, "ended before it could be killed"
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    # What was found so far can be had, ancestors and all.
    run_here("export", out, model, "--best-so-far")
    assert (model / "model.safetensors").exists()
    run_here("search", config_file, "--out", out, "--resume")
    assert contents(out) == contents(finished)


# ---------------------------------------------------------------------------------------------------------------
# Wrong input


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"parents": ["parent0"]}, ("parents: 1 model", "2 or more")),
        ({"pool": {"methods": ["slurp"]}}, ("pool.methods[0]", "slurp", "'slerp'")),
        ({"pool": {"methods": ["slerp", "passthrough"]}}, ("pool.methods[1]", "passthrough takes 1 models, found 2")),
        ({"pool": {"methods": ["slerp", "slerp"]}}, ("pool.methods[1]", "slerp stands there already")),
        ({"pool": {"methods": ["ties"]}, "base": None}, ("base: missing", "ties")),
        ({"pool": {"size": 1}}, ("pool.size", "2")),
        ({"pool": {"selection": "best"}}, ("pool.selection", "complementary, tournament or random")),
        ({"pool": {"method": "slerp"}}, ("pool.method", "unknown key", "methods")),
        ({"space": {"method": "slerp"}}, ("exactly one of the keys space, data_flow, pool, mixture, stages",)),
        ({"search": {"strategy": "cma_es"}}, ("search.strategy: cma_es", "leave it out")),
        ({"search": {"rungs": 2}}, ("search.rungs: 2", "on all examples")),
        ({"search": {"seeds": ["uniform"]}}, ("seeds: uniform", "founders")),
        ({"pool": None, "space": {"method": "slerp"}, "parents": ["parent0", "parent1"],
          "search": {"strategy": "pool"}}, ("strategy: pool", "no section pool")),
        ({"pool": None, "stages": [{"pool": {}}]}, ("stages", "pool: a stage has a space or a data_flow")),
        ({"tokenizer_source": "parent0"}, ("tokenizer_source",)),
        ({"parents": ["parent0", "wider"]}, ("others/parent0", "[64, 56]", "[64, 48]")),
        ({"parents": ["parent0", "tied"]}, ("shared/parent0", "tie_word_embeddings")),
        ({"search": {"generations": 1_000_000, "population": 100}}, ("generations: 1,000,000", "16,777,216")),
    ],
)  # fmt: skip
def test_wrong_input_is_one_line(config_file, tmp_path, changes, says):
    root = config_file.parent
    if not (root / "wider").exists():
        build_family(root / "others", tiny_config("qwen3", hidden_size=56, tie_word_embeddings=False), 1)
        build_family(root / "shared", tiny_config("qwen3", tie_word_embeddings=True), 1)
        (root / "wider").symlink_to(root / "others/parent0")
        (root / "tied").symlink_to(root / "shared/parent0")
    path = write_yaml(root / f"{tmp_path.name}.yaml", yaml.safe_load(config_file.read_text()) | changes)
    assert_refused(says, "search", path, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_config_without_a_pool_is_what_it_was(config_file):
    document = yaml.safe_load(config_file.read_text())
    plain = {key: value for key, value in document.items() if key not in ("pool", "search")}
    config = Config.model_validate(plain | {"space": {"method": "ties"}})
    assert "pool" not in config.model_dump(mode="json") and config.search.strategy == "cma_es"
    pooled = Config.model_validate(plain | {"pool": {}})
    assert pooled.model_dump(mode="json")["pool"]["methods"] == ["slerp"] and pooled.search.strategy == "pool"
    assert Config.model_validate(pooled.model_dump(mode="json")) == pooled
