"""Tasks without labels: how many neighbours of a candidate give its answer, against merges that are scored alone."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.commands import run_here
from helpers.families import Family
from helpers.files import read_json, read_lines, write_lines, write_yaml
from helpers.models import even_records, word_tokenizer, words
from helpers.sampling import sample, thorough
from helpers.searches import problem_of, search_config
from hypothesis import given, settings
from hypothesis import strategies as st

from evojax_merge.config.documents import parse
from evojax_merge.config.search_config import TaskFile
from evojax_merge.errors import InputError
from evojax_merge.evaluation.scores import TaskScores
from evojax_merge.search.genomes import Neighbours, neighbours_of
from evojax_merge.steps.planning import make_plan
from evojax_merge.steps.selection import open_evaluators
from evojax_merge.tasks.opening import open_whole_task

RECORDS = even_records(8, seed=3)
CHOICES = ["w5", "w6 w7", "w40"]
WRITTEN = {"max_new_tokens": 3}


def agreement(folder: Path, **keys: Any) -> dict[str, Any]:
    """The section of a task on prompts alone."""
    prompts = write_lines(folder / "prompts.jsonl", [{"prompt": record["prompt"]} for record in RECORDS])
    return {"name": "steady", "kind": "agreement", "file": str(prompts), "heldout": 0.5, **keys}


def agreeing_search(family: Family, folder: Path, search: dict[str, Any] | None = None, **keys: Any) -> dict[str, Any]:
    space = {"method": "task_arithmetic", "layers_per_group": 1, "parameters": {"weight": {"low": -2.0, "high": 3.0}}}
    document = search_config(family, 3, 4, space=space, tasks=[agreement(folder, **keys)])
    return document | {"search": document["search"] | (search or {})}


def task_of(folder: Path, **keys: Any) -> Any:
    section = parse(Path("tasks.yaml"), {"tasks": [agreement(folder, **keys)]}, TaskFile).tasks[0]
    return open_whole_task("tasks[0]", section, folder)


@given(
    st.integers(1, 5), st.integers(1, 4), st.integers(1, 6), st.integers(1, 3), st.integers(0, 2**31 - 1), st.booleans()
)  # fmt: skip
@settings(max_examples=50, deadline=None)
def test_agreement_is_the_share_of_neighbours_with_the_same_answer(
    population: int, dims: int, size: int, pairs: int, seed: int, has_second: bool
) -> None:
    """Answers as a function of genomes, that of each neighbour computed by itself."""
    rng = np.random.default_rng(seed)
    offsets = {"one": rng.normal(size=(2 * pairs, dims)).astype(np.float32)}
    if has_second:
        offsets["two"] = rng.normal(size=(2, dims)).astype(np.float32)
    beside, genomes = Neighbours(offsets), rng.normal(size=(population, dims)).astype(np.float32)

    def answers(rows: np.ndarray) -> np.ndarray:
        return np.floor(rows.sum(axis=1, keepdims=True) + np.arange(size) / size).astype(np.float32)

    asked = beside.beside(genomes)
    assert len(asked) == population * (1 + beside.count)
    scores = beside.agreement(TaskScores({name: {"agreement": answers(asked)} for name in offsets}), population)
    for name, steps in offsets.items():
        expected = [np.mean([answers((genome + step)[None])[0] == answers(genome[None])[0] for step in steps], axis=0)
                    for genome in genomes]  # fmt: skip
        np.testing.assert_allclose(scores.matrices[name]["agreement"], expected, rtol=1e-6)


def test_neighbours_stand_in_pairs_on_both_sides(tmp_path: Path) -> None:
    task = task_of(tmp_path, choices=CHOICES, neighbours=6, step=0.1)
    (offsets,) = neighbours_of([task, object()], 5, 7).offsets.values()
    assert offsets.shape == (6, 5) and np.allclose(np.abs(offsets), 0.1)
    np.testing.assert_array_equal(offsets[:3], -offsets[3:])
    np.testing.assert_allclose(offsets[0], 0.1, rtol=1e-6)
    np.testing.assert_array_equal(offsets, *neighbours_of([task], 5, 7).offsets.values())
    assert neighbours_of([object()], 5, 7).count == 0


def test_equal_answers_have_equal_numbers(tmp_path: Path) -> None:
    task = replace(task_of(tmp_path, pattern="w(\\d+)", **WRITTEN), examples=task_of(tmp_path).examples[:3])
    outputs = [["w1", " w2 and w31", "none"], ["w1 ", "w31", "w"], ["w2", "w31 ", "none here"]]
    numbers = task.answers(outputs, np.zeros((3, 0)))
    assert numbers.dtype == np.float32 and numbers.max() < 2**24
    np.testing.assert_array_equal(numbers == numbers[0], [[True, True, True], [True, True, True], [False, True, True]])


def test_the_answer_is_the_likeliest_choice(tmp_path: Path) -> None:
    task = task_of(tmp_path, choices=CHOICES)
    requests = task.requests(word_tokenizer(words()), 256)
    totals = np.random.default_rng(0).normal(size=(4, len(requests.scored))).astype(np.float32)
    expected = totals.reshape(4, len(RECORDS), len(CHOICES)).argmax(axis=2)
    np.testing.assert_array_equal(task.answers([], totals), expected)
    assert np.isnan(task.score(replace(requests.unanswered(4), totals=totals))["agreement"]).all()


@pytest.mark.parametrize("keys", sample([WRITTEN | {"step": 0.01}, {"choices": CHOICES, "step": 0.2}], 1))
def test_a_search_scores_what_its_neighbours_answer(keys: dict[str, Any], family: Family, tmp_path: Path) -> None:
    """Each neighbour's answers by themselves: written by an evaluator that knows no neighbours."""
    problem = problem_of(tmp_path / "config.yaml", agreeing_search(family, tmp_path, **keys))
    on = open_evaluators(problem, problem.prepare()).search
    alone, (task,) = replace(on, neighbours=Neighbours()), on.tasks
    genomes = np.random.default_rng(1).uniform(size=(3, problem.space.dims)).astype(np.float32)

    def answers(rows: np.ndarray) -> np.ndarray:
        scores = alone.score(rows)
        return np.asarray(task.answers(scores.outputs.get("steady", ()), scores.log_probabilities.get("steady")))

    (offsets,) = on.neighbours.offsets.values()
    expected = np.mean([answers(genomes + offset) == answers(genomes) for offset in offsets], axis=0)
    scores = on.score(genomes)
    np.testing.assert_array_equal(scores.matrices["steady"]["agreement"], expected)
    assert expected.min() < 1 and expected.max() > 0
    assert on.passes(2) == 3 * alone.passes(2)
    # Outputs are those of the candidates alone.
    assert all(len(texts) == 3 for texts in scores.outputs.values())


@thorough
def test_a_search_by_agreement_has_a_winner(family: Family, tmp_path: Path) -> None:
    """Base and parents have no neighbours, so they have no score; a labelled task stands beside it."""
    document = agreeing_search(family, tmp_path, **WRITTEN)
    labelled = {"name": "right", "kind": "likelihood", "file": str(family.tasks), "weight": 0}
    config = write_yaml(tmp_path / "config.yaml", document | {"tasks": [*document["tasks"], labelled]})
    run_here("search", config, "--out", tmp_path / "run")
    result = read_json(tmp_path / "run" / "result.json")
    by_role = {row["role"]: row["heldout_scores"].get("steady/agreement") for row in result["table"]}
    assert 0 <= by_role["winner"] <= 1 and np.isnan([by_role["base"], by_role["parent"]]).all()
    rows = read_lines(tmp_path / "run" / "history.jsonl")
    assert rows and all(0 <= fitness <= 1 for row in rows for fitness in row["fitness"])


def test_choices_are_searched_by_the_gradient_of_their_entropy_first(family: Family, tmp_path: Path) -> None:
    """Written answers have none."""
    gradient = {"strategy": "hybrid", "gradient": {"starts": 1}}
    config = write_yaml(tmp_path / "config.yaml", agreeing_search(family, tmp_path, gradient, choices=CHOICES))
    run_here("search", config, "--out", tmp_path / "run")
    with pytest.raises(InputError, match="steady"):
        problem_of(tmp_path / "config.yaml", agreeing_search(family, tmp_path, gradient, **WRITTEN))


def test_a_plan_counts_the_neighbours(family: Family, tmp_path: Path) -> None:
    plans = []
    for neighbours in (2, 8):
        document = agreeing_search(family, tmp_path, choices=CHOICES, neighbours=neighbours)
        problem = problem_of(tmp_path / "config.yaml", document)
        plans.append(make_plan(problem, problem.prepare()))
    assert plans[1].parts["the generations"].flops == pytest.approx(3 * plans[0].parts["the generations"].flops)


def test_models_alone_have_no_agreement(family: Family, tmp_path: Path) -> None:
    tasks = write_yaml(tmp_path / "tasks.yaml", {"tasks": [agreement(tmp_path, **WRITTEN) | {"heldout": 0.2}]})
    message = run_here("evaluate", family.base, "--tasks", tasks, status=2).stderr
    assert "steady: compares the candidates of a search; leave it out" in message


@pytest.mark.parametrize(
    ("keys", "search", "message"),
    [
        ({"choices": CHOICES, "pattern": "x"}, {}, "pattern"),
        ({"guard": True}, {}, "guard"),
        ({"neighbours": 3}, {}, "neighbours"),
        ({"step": 0.0}, {}, "step"),
        ({"pattern": "("}, {}, "pattern"),
        ({"choices": ["w5"]}, {}, "choices"),
        ({"prompt": "{nothing}"}, {}, "nothing"),
        (WRITTEN, {"controls": ["lora"]}, "adapters have no neighbours"),
    ],
)
def test_wrong_sections_are_refused(
    keys: dict[str, Any], search: dict[str, Any], message: str, family: Family, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        problem_of(tmp_path / "config.yaml", agreeing_search(family, tmp_path, search, **keys))
