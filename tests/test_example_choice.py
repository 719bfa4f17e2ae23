"""Choosing the examples of a race: the item model, the draw, what the weights estimate, and searches that choose."""

import json
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np
import pytest
from helpers.sampling import sample, thorough
from helpers.searches import open_problem, search_in
from test_racing import Hill, Plain, SurrogateData, everyone, one_token, text_task, write_config

from bench.searches.racing import halve
from evojax_merge.commands import search as search_command
from evojax_merge.config.search_config import SearchConfig
from evojax_merge.errors import InputError
from evojax_merge.evaluation.scores import fitness
from evojax_merge.problem import read_config
from evojax_merge.search.example_choice import (
    STRATUM_SHARE,
    ExampleChoice,
    choose_examples,
    draw_order,
    example_spread,
    inclusion_probabilities,
    length_strata,
)
from evojax_merge.search.item_response import expected_responses, fit_item_model, predicted_spread
from evojax_merge.search.recording import Reporter
from evojax_merge.search.run_folder import open_run
from evojax_merge.search.successive_halving import rung_shards, stratified_shards
from evojax_merge.search.surrogate import append_candidates, empty_surrogate, predict_fitness
from evojax_merge.steps.selection import open_evaluator


@dataclass(frozen=True)
class Test:
    """Examples whose difficulty and discrimination are known."""

    __test__ = False

    slopes: np.ndarray
    intercepts: np.ndarray

    def right(self, abilities: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-(abilities[:, None] * self.slopes + self.intercepts)))


def simulated_test(examples: int, seed: int, dead: float = 0.0) -> Test:
    """`dead`: the share of examples that everyone gets right, or everyone wrong."""
    rng = np.random.default_rng(seed)
    intercepts = np.where(
        rng.random(examples) < dead, rng.choice([-9.0, 9.0], examples), 1.5 * rng.standard_normal(examples)
    )
    return Test(rng.lognormal(0.2, 0.4, examples), intercepts)


def correlation(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.corrcoef(one, other)[0, 1])


# ---------------------------------------------------------------------------------------------------------------
# The item model


def test_the_item_model_recovers_abilities_and_how_hard_examples_are():
    """From right and wrong answers, drawn from the two-parameter logistic model."""
    rng, test = np.random.default_rng(0), simulated_test(200, 0)
    abilities = rng.standard_normal(64)
    answers = (rng.random((64, 200)) < test.right(abilities)).astype(float)
    model = fit_item_model(answers, np.zeros(200, int))
    # Each is on a scale of its own; a factor and a shift of the abilities are the slopes' and the intercepts'.
    assert correlation(model.abilities[:, 0], abilities) > 0.97
    assert correlation(model.items[:, -1], test.intercepts) > 0.93
    assert np.sqrt(np.mean((expected_responses(model.items, model.abilities) - test.right(abilities)) ** 2)) < 0.12
    assert model.dispersion.mean() == pytest.approx(1.0, abs=0.15)


@pytest.mark.parametrize("scale", [1.0, 250.0])
def test_scores_that_are_no_answers(scale):
    """Log-probabilities of any size: what is expected is nearer to the noiseless scores than what was observed."""
    rng = np.random.default_rng(2)
    ability, hard = rng.standard_normal((64, 1)), rng.lognormal(0, 1, 100)
    truth = -scale * hard * np.exp(-0.5 * ability)
    scores = truth + scale * 0.1 * hard * rng.standard_normal(truth.shape)
    model = fit_item_model(scores, np.zeros(100, int))
    low = scores.min()
    expected = low + model.scale * expected_responses(model.items, model.abilities)
    assert np.mean((expected - truth) ** 2) < 0.5 * np.mean((scores - truth) ** 2)
    assert (model.dispersion < 0.2).all()
    assert correlation(predicted_spread(model), scores.std(axis=0)) > 0.95


def test_tasks_have_scales_of_their_own():
    rng, test = np.random.default_rng(3), simulated_test(60, 3)
    answers = (rng.random((40, 60)) < test.right(rng.standard_normal(40))).astype(float)
    task_of = np.repeat([0, 1], 30)
    plain = fit_item_model(answers, task_of)
    scaled = fit_item_model(np.where(task_of == 1, -700 + 300 * answers, answers), task_of)
    np.testing.assert_allclose(scaled.items, plain.items, atol=1e-6)
    np.testing.assert_allclose(
        predicted_spread(scaled),
        np.where(task_of == 1, 300, 1) * predicted_spread(plain),
        rtol=1e-6,
    )


def test_candidates_that_all_score_the_same_are_no_trouble():
    for scores in (np.ones((5, 8)), np.zeros((1, 8)), np.full((3, 8), -4.5)):
        model = fit_item_model(scores, np.zeros(8, int))
        assert np.isfinite(model.items).all() and np.isfinite(predicted_spread(model)).all()


def test_decided_examples_are_predicted_to_differ_least():
    rng, test = np.random.default_rng(4), simulated_test(100, 4, dead=0.5)
    answers = (rng.random((64, 100)) < test.right(rng.standard_normal(64))).astype(float)
    dead = np.abs(test.intercepts) == 9
    model = fit_item_model(answers, np.zeros(100, int))
    spread = predicted_spread(model)
    assert spread[dead].max() < np.quantile(spread[~dead], 0.1)


# ---------------------------------------------------------------------------------------------------------------
# The draw


def test_an_order_holds_every_example_once_and_ends_with_all():
    rng = np.random.default_rng(0)
    for count in (8, 13, 40, 47):
        order, weights = draw_order(rng.random(count), 8, rng)
        assert sorted(np.concatenate(order).tolist()) == list(range(count))
        assert [len(part) for part in order] == [count // 8 + (part < count % 8) for part in range(8)]
        for part in range(8):
            asked = sum(map(len, order[: part + 1]))
            assert (1 / weights[part]).sum() == pytest.approx(asked) and (weights[part] >= 1).all()
        np.testing.assert_array_equal(weights[-1], 1)


def test_examples_are_asked_as_often_as_their_weights_say():
    """3,000 draws, after one, two and four of eight parts."""
    rng, count = np.random.default_rng(1), 48
    spread = rng.lognormal(0, 1, count)
    size, often = 0.8 * spread / spread.mean() + 0.2, np.zeros((3, count))
    for _ in range(3000):
        order, _ = draw_order(spread, 8, rng)
        for i, parts in enumerate((1, 2, 4)):
            often[i, np.concatenate(order[:parts])] += 1 / 3000
    for row, asked in zip(often, (6, 12, 24), strict=True):
        expected = inclusion_probabilities(size, asked)
        assert expected.sum() == pytest.approx(asked) and expected.max() <= 1
        np.testing.assert_allclose(row, expected, rtol=0.12, atol=0.02)


def test_weighted_means_of_chosen_examples_have_the_right_mean():
    """That examples of a large spread score better is no advantage: here scores go with it, and 8 and 32 of 64 are
    asked."""
    rng = np.random.default_rng(2)
    spread = rng.lognormal(0, 1, 64)
    scores = 3 * spread + rng.standard_normal(64)
    for parts, bias in ((1, 0.02), (4, 0.01)):
        weighted, plain = [], []
        for _ in range(1000):
            order, weights = draw_order(spread, 8, rng)
            asked = np.concatenate(order[:parts])
            weighted.append((weights[parts - 1, asked] * scores[asked]).sum() / 64)
            plain.append(scores[asked].mean())
        assert abs(np.mean(weighted) / scores.mean() - 1) < bias
        assert np.mean(plain) > 1.3 * scores.mean()


def test_strata_are_of_similar_length():
    lengths = np.random.default_rng(0).integers(5, 8000, 200)
    strata = length_strata(lengths, 8)
    assert sorted(np.concatenate(strata).tolist()) == list(range(200))
    assert all(len(stratum) % 8 == 0 and len(stratum) >= 8 * STRATUM_SHARE for stratum in strata) and len(strata) > 3
    for short, long in pairwise(strata):
        assert lengths[short].max() < lengths[long].min()
    assert len(length_strata(np.full(200, 7), 8)) == 1 and len(length_strata(lengths[:9], 8)) == 1


# ---------------------------------------------------------------------------------------------------------------
# A race


@dataclass
class Chosen(SurrogateData):
    """Scores that are known beforehand, on any of the examples."""

    def subset(self, examples):
        return replace(self, tasks=[task.subset(own.tolist()) for task, own in zip(self.tasks, examples, strict=True)])


def choice_of(truth: dict[str, np.ndarray], parts: int = 8) -> ExampleChoice:
    tasks = [text_task(name, matrix.shape[1]) for name, matrix in truth.items()]
    return ExampleChoice(Chosen(tasks, truth), [length_strata(one_token(task), parts) for task in tasks], parts)


def answers_of(population: int, seed: int, examples: int, dead: float) -> tuple[np.ndarray, np.ndarray]:
    """Answers of a population to a test, and of 64 that came before."""
    rng, test = np.random.default_rng(seed), simulated_test(examples, seed, dead)
    drawn = [rng.random((p, examples)) < test.right(rng.standard_normal(p)) for p in (population, 64)]
    return drawn[0].astype(np.float32), drawn[1].astype(np.float32)


def test_nobody_meets_an_example_twice_and_the_whole_is_what_it_was():
    truth = {
        "a": answers_of(16, 0, 70, 0.3)[0],
        "b": np.random.default_rng(1).standard_normal((16, 30)).astype(np.float32),
    }
    choice = choice_of(truth)
    expected = fitness(choice.evaluator.tasks, choice.evaluator.score(everyone(16)))
    choice.evaluator.requests.clear()
    known = empty_surrogate(64, 1, 100)
    for generation in range(12):
        choice.evaluator.requests.clear()
        order = choose_examples(choice, known, 0, generation)
        halved = halve(order, everyone(16), known)
        known = halved.surrogate
        requests = choice.evaluator.requests
        assert len(requests) == len(set(requests)) == halved.examples.sum()
        assert halved.complete.sum() == 2
        np.testing.assert_array_equal(halved.fitness[halved.complete], expected[halved.complete])
        best = halved.scores.values[halved.complete]
        np.testing.assert_array_equal(best[:, :70], truth["a"][halved.complete])
        np.testing.assert_array_equal(best[:, 70:], truth["b"][halved.complete])
        sizes = [sum(part.size for part in order.parts[:end]) for end in rung_shards(8)]
        assert set(halved.examples.tolist()) == set(sizes) and sizes[-1] == 100
    # Later generations have other first examples, and not at random.
    again = choose_examples(choice, known, 0, 11)
    same = choose_examples(choice, known, 0, 11)
    other = choose_examples(choice, known, 0, 12)
    assert again.parts[0].columns.tolist() == same.parts[0].columns.tolist() != other.parts[0].columns.tolist()


def test_chosen_examples_tell_candidates_apart_better_than_random_ones():
    """Half of the examples are decided, and an eighth is asked: the error of 16 candidates' predicted differences."""
    errors: dict[str, list[float]] = {"chosen": [], "random": []}
    for seed in range(12):
        own, before = answers_of(16, seed, 128, 0.5)
        choice, nothing = choice_of({"a": own}), empty_surrogate(64, 1, 128)
        known = append_candidates(nothing, np.zeros((64, 1)), before / 128)
        truth = own.mean(axis=1)
        for name, data in (("chosen", known), ("random", nothing)):
            order = choose_examples(choice, data, seed, 0)
            columns = order.parts[0].columns
            counts = order.counts[0, columns]
            predicted = predict_fitness(known, np.zeros((16, 1)), own[:, columns] / 128, columns, counts)
            errors[name].append(float(np.var(predicted - truth)))
    assert np.mean(errors["chosen"]) < 0.7 * np.mean(errors["random"])


def test_without_earlier_candidates_all_examples_are_as_likely():
    np.testing.assert_array_equal(example_spread(empty_surrogate(64, 1, 5), np.zeros(5, int)), 1)
    choice, nothing = choice_of({"a": np.zeros((4, 64), np.float32)}), empty_surrogate(64, 1, 64)
    first = [tuple(choose_examples(choice, nothing, 0, g).parts[0].columns) for g in range(200)]
    often = np.bincount(np.concatenate(first), minlength=64)
    assert often.sum() == 200 * 8 and often.min() > 8 and often.max() < 48
    np.testing.assert_allclose(choose_examples(choice, nothing, 0, 0).counts[:, 0], [8, 4, 2, 1])


# ---------------------------------------------------------------------------------------------------------------
# A search


class Broken(Exception):
    """Ends a search between two generations."""


@dataclass
class BreaksOff(Reporter):
    after: int = field(default=0)

    def finished(self, generation):
        if generation.number == self.after:
            raise Broken


class Divisible(Hill):
    def subset(self, examples):
        (task,), (own,) = self.tasks, examples
        return Divisible([task.subset(own.tolist())], self.tops)


def climb(folder, generations: int, resume: bool = False, reporter: Reporter | None = None):
    tops = np.random.default_rng(0).normal(0, 0.5, (64, 2))
    task = text_task("hills", 64)
    shards = [Hill(shard, tops) for shard in stratified_shards("search.rungs", [task], one_token, 4, 0)]
    strata = [length_strata(one_token(task), 8)]
    run = open_run(folder, {"inputs": {}}, resume=resume, overwrite=False)
    config = SearchConfig(population=8, generations=generations, sigma=0.5)
    choice = Divisible([task], tops)
    outcome = search_in(run.path, config, 1, Plain(), shards, reporter=reporter, choice=choice, strata=strata)
    return run, outcome, tops


def test_a_search_that_chooses_is_broken_off_and_resumed_to_the_byte(tmp_path):
    whole, outcome, tops = climb(tmp_path / "whole", 12)
    with pytest.raises(Broken):
        climb(tmp_path / "parts", 12, reporter=BreaksOff(after=5))
    parts, again, _ = climb(tmp_path / "parts", 12, resume=True)
    assert parts.history.read_bytes() == whole.history.read_bytes()
    np.testing.assert_array_equal(again.genomes, outcome.genomes)
    np.testing.assert_array_equal(again.proposed, outcome.proposed)
    # It is no other search but for the order of the examples: it climbs.
    best = -((tops - tops.mean(axis=0)) ** 2).sum(axis=1).mean()
    assert outcome.fitness[0] == pytest.approx(best, abs=0.05)


# ---------------------------------------------------------------------------------------------------------------
# With models

CHOSEN = ["search.rung_examples=item_response"]


@pytest.mark.parametrize("space", sample(["merge", "path"], 1))
def test_models_score_on_chosen_examples_as_on_all(family, tmp_path, space):
    path = write_config(family, tmp_path, space, 3)
    problem = open_problem(path, *CHOSEN)
    splits = problem.prepare()
    everything, shards = splits.choice, splits.shards
    opened = open_evaluator(problem, everything)
    genomes = problem.space.start + 0.3 * np.random.default_rng(0).standard_normal((3, problem.space.dims))
    genomes = genomes.astype(np.float32)
    whole = opened.score(genomes)
    examples = [np.array([1, 4, 9, 17]), np.array([0, 8])]
    some = opened.subset(examples)
    assert [numbers_of(task) for task in some.tasks] == [
        [numbers_of(task)[i] for i in own] for task, own in zip(opened.tasks, examples, strict=True)
    ]
    found = some.score(genomes)
    for task, own in zip(opened.tasks, examples, strict=True):
        np.testing.assert_allclose(
            found.matrices[task.name][task.metric], whole.matrices[task.name][task.metric][:, own], rtol=1e-5
        )
    # What is compiled for the shards is all that is compiled.
    for batched in (*everything, *some.evaluator.evaluator.batched_tasks):
        like = next(one for shard in shards for one in shard if one.task.name == batched.task.name)
        shapes = {str(shape) for batch in batched.scoring.batches for shape in batch.compiled_shapes}
        assert shapes <= {str(shape) for batch in like.scoring.batches for shape in batch.compiled_shapes}


def numbers_of(task):
    return [example.prompt for example in task.examples]


@thorough
def test_the_command_chooses_examples_and_goes_on_to_the_byte(family, tmp_path, capsys):
    path = write_config(family, tmp_path, "merge", 3)
    settings = {"overwrite": False, "seed": None}

    def search(out, generations, resume=False):
        overrides = [*CHOSEN, f"search.generations={generations}"]
        search_command.search(path, tmp_path / out, resume=resume, overrides=overrides, **settings)
        return (tmp_path / out / "history.jsonl").read_bytes()

    whole = search("whole", 4)
    assert "successive halving" in capsys.readouterr().out
    search("parts", 2)
    assert search("parts", 4, resume=True) == whole
    rows = [json.loads(line) for line in whole.splitlines()]
    assert all(row["examples"].count(27) == 2 for row in rows)
    for name in ("best/recipe.yaml", "result.json"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["search.rungs=1"], r"search: rung_examples: item_response; without a race .* give `rungs` above 1"),
        (["search.rung_examples=hardest"], r"search\.rung_examples: expected .*random.*item_response"),
    ],
)
def test_what_cannot_be_chosen_is_refused(family, tmp_path, overrides, said):
    path = write_config(family, tmp_path, "merge", 3)
    with pytest.raises(InputError, match=said):
        read_config(path, [*CHOSEN, *overrides], None)
