"""The validation split: drawn, never searched on, what the winner is chosen on, and looked at while a search runs."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from helpers.files import read_json, read_lines, write_lines, write_yaml
from helpers.models import even_records
from helpers.sampling import sample, thorough
from helpers.searches import open_problem, search_config, search_in, task_section
from test_racing import Hill, Plain, SurrogateData, everyone, numbers, text_task

import evojax_merge as em
from evojax_merge.commands import search as search_command
from evojax_merge.config.search_config import SearchConfig
from evojax_merge.errors import InputError
from evojax_merge.evaluation.scores import fitness
from evojax_merge.problem import read_config
from evojax_merge.search.checkpoints import Checkpoints
from evojax_merge.search.recording import Reporter
from evojax_merge.search.run_folder import RunFolder, open_run
from evojax_merge.search.validation import (
    CLEAR_ERRORS,
    OVERFIT_PATIENCE,
    Check,
    Trend,
    init_peak,
    validate,
    validation_split,
)
from evojax_merge.steps.selection import open_evaluators
from evojax_merge.tasks.splits import Splits

# ---------------------------------------------------------------------------------------------------------------
# The split


def test_each_task_keeps_its_share_back():
    tasks = [text_task("a", 20), text_task("b", 10, 0.5), text_task("c", 20, 3.0), text_task("shown", 7, 0.0)]
    searched, validation = validation_split("search.validation", tasks, 0.3, seed=5)
    assert [task.size for task in validation] == [6, 3, 6, 7] and [task.size for task in searched] == [14, 7, 14, 7]
    for task, one, other in zip(tasks[:3], searched, validation, strict=False):
        assert sorted(numbers(one) + numbers(other)) == numbers(task)
    # Tasks of one file keep the same examples back, or one would be searched on what the other validates on.
    assert numbers(validation[0]) == numbers(validation[2])
    assert validation_split("search.validation", tasks, 0.3, seed=5) == (searched, validation)
    assert validation_split("search.validation", tasks, 0.3, seed=6) != (searched, validation)
    assert validation_split("search.validation", tasks, 0.0, seed=5) == (tasks, [])


@pytest.mark.parametrize(("share", "side"), [(0.02, "validate"), (0.96, "search")])
def test_a_share_that_leaves_one_side_empty_is_refused(share, side):
    with pytest.raises(InputError) as caught:
        validation_split("search.validation", [text_task("a", 30), text_task("b", 10)], share, seed=0)
    assert f"of the 10 examples that b has to search on leaves none to {side} on" in str(caught.value)


# ---------------------------------------------------------------------------------------------------------------
# Looking at it while a search runs

TOPS = np.random.default_rng(0).normal(0, 0.5, (64, 2))
START = np.array([2.0, -1.5])


class Told(Reporter):
    def __init__(self) -> None:
        self.warnings: list[str] = []
        self.validation: list[float | None] = []

    def warn(self, text: str) -> None:
        self.warnings.append(text)

    def finished(self, generation) -> None:
        self.validation.append(generation.validation)


def search(folder: Path, generations: int, *, top: np.ndarray, resume: bool = False, **settings):
    """The history's bytes, and what was told; the validation split's hill has its top at `top`."""
    shard, validation = Hill([text_task("hills", 64)], TOPS), Hill([text_task("hills", 64)], TOPS + top)
    config = SearchConfig(population=8, generations=generations, sigma=0.5, **settings)
    document = {"inputs": {}, "search": config.model_dump(mode="json")}
    run, told = open_run(folder, document, resume=resume, overwrite=False), Told()
    archive = search_in(run.path, config, 1, Plain(), [shard], validation, told)
    return archive, run.history.read_bytes(), told


def test_every_nth_row_says_what_the_best_is_worth(tmp_path):
    settings = {"validation": 0.2, "validate_every": 3}
    archive, history, told = search(tmp_path / "run", 8, top=np.zeros(2), **settings)
    rows = [json.loads(line) for line in history.splitlines()]
    assert [row["generation"] for row in rows if "validation" in row] == [3, 6]
    # Here both splits score alike.
    assert [row["validation"]["best_so_far"] for row in rows[2::3]] == [row["best_so_far"] for row in rows[2::3]]
    assert all(len(row["validation"]["finalists"]) == len(archive.proposed) for row in rows[2::3])
    assert told.validation == [row.get("validation", {}).get("best_so_far") for row in rows] and not told.warnings
    # It changes nothing else.
    _, plain, _ = search(tmp_path / "plain", 8, top=np.zeros(2))
    for row in rows:
        row.pop("validation", None)
    assert rows == [json.loads(line) for line in plain.splitlines()]
    timing = read_lines(tmp_path / "run/timing.jsonl")
    assert [row["generation"] for row in timing if "validation_seconds" in row] == [3, 6]


def test_search_and_validation_that_part_are_told_once(tmp_path):
    """On the validation split the start is best: every step of the search away from it is a loss."""
    settings = {"validation": 0.2, "validate_every": 1}
    _, whole, told = search(tmp_path / "whole", 20, top=START, **settings)
    (line,) = told.warnings
    rows = [json.loads(line) for line in whole.splitlines()]
    since = int(line.partition("since generation ")[2].partition(":")[0])
    row = rows[since - 1]
    assert f"rose from {row['best_so_far']:.4f} to " in line
    assert f"fell from {row['validation']['best_so_far']:.4f} to " in line
    # Killed and continued, before and after the warning: the same bytes, and the warning once.
    for cut in (since, since + 8):
        _, _, before = search(tmp_path / f"parts{cut}", cut, top=START, **settings)
        _, parts, after = search(tmp_path / f"parts{cut}", 20, top=START, resume=True, **settings)
        assert parts == whole and before.warnings + after.warnings == [line]


def test_a_trend_counts_clear_falls_at_rises_of_the_search():
    def overfitting_since(*looks: tuple[float, float], error: float | None = 0.4) -> int | None:
        trend = Trend()
        for generation, (search, validation) in enumerate(looks, start=1):
            trend = trend.after(Check(generation, search, validation, error))
        return trend.overfitting_since

    assert (OVERFIT_PATIENCE, CLEAR_ERRORS) == (3, 2)
    assert overfitting_since((1, 8), (2, 9), (3, 8), (4, 7), (5, 8)) == 2
    assert overfitting_since((1, 9), (2, 8), (3, 7)) is None
    # The same candidate as before says nothing new.
    assert overfitting_since((1, 9), (2, 8), (2, 8), (3, 7), (3, 7)) is None
    assert overfitting_since((1, 9), (2, 8), (2, 8), (3, 7), (3, 7), (4, 6)) == 1
    # A new height begins again, and so does what is within noise; without two examples all is.
    assert overfitting_since((1, 9), (2, 8), (3, 7), (4, 9.1), (5, 8), (6, 7), (7, 6)) == 4
    assert overfitting_since((1, 9), (2, 8), (3, 7), (4, 8.3), (5, 8), (6, 7)) is None
    assert overfitting_since((1, 9), (2, 8), (3, 7), (4, 6), error=0.5) is None
    assert overfitting_since((1, 9), (2, 8), (3, 7), (4, 6), error=None) is None


def test_the_standard_error_is_that_of_paired_differences():
    task, other = text_task("a", 6, 3.0), text_task("b", 4, 1.0)
    truth = {task.name: np.random.default_rng(0).normal(size=(3, 6)).astype(np.float32)}
    truth[other.name] = np.random.default_rng(1).normal(size=(3, 4)).astype(np.float32)
    known, nobody = SurrogateData([task, other], truth), np.zeros((0, 1), np.float32)
    first, peak = validate(known, everyone(3)[:1], everyone(3)[1:], init_peak(known))
    means = 0.75 * truth["a"].mean(axis=1) + 0.25 * truth["b"].mean(axis=1)
    assert [first["best_so_far"], *first["finalists"]] == pytest.approx(means) and first["standard_error"] is None
    second, _ = validate(known, everyone(3)[1:2], nobody, peak)
    differences = [truth[name][1].astype(float) - truth[name][0] for name in ("a", "b")]
    variances = [weight**2 * d.var(ddof=1) / len(d) for weight, d in zip((0.75, 0.25), differences, strict=True)]
    assert second["standard_error"] == pytest.approx(np.sqrt(sum(variances)))
    unknown, same = validate(known, nobody, np.full((1, 1), np.nan, np.float32), peak)
    assert unknown == {"best_so_far": None, "standard_error": None, "finalists": [None]} and same is peak


# ---------------------------------------------------------------------------------------------------------------
# With models


@pytest.fixture(scope="module")
def config(family, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("validation")
    write_lines(folder / "tasks.jsonl", even_records(20))
    document = search_config(
        family, 4, 6, search={"validation": 0.4, "validate_every": 2}, seed=3,
        space={"method": "task_arithmetic", "layers_per_group": "all", "parameters": {"weight": {"high": 1.5}}},
        tasks=[task_section(heldout=0.25), task_section(name="shown", kind="multiple_choice", heldout=0.25, weight=0)],
    )  # fmt: skip
    return write_yaml(folder / "config.yaml", document)


def run_search(config: Path, out: Path, *overrides: str, resume: bool = False) -> None:
    search_command.search(config, out, resume=resume, overwrite=False, seed=None, overrides=list(overrides))


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    run_search(config, out)
    return out


def files(out: Path) -> dict[str, bytes]:
    names = ["history.jsonl", "result.json", "best/recipe.yaml", "best/model/model.safetensors", "best/model/README.md"]
    return {name: (out / name).read_bytes() for name in names}


def test_the_winner_is_the_best_finalist_on_the_validation_split(config, finished):
    problem = open_problem(config)
    splits = problem.splits
    assert [[task.size for task in split] for split in (splits.search, splits.validation, splits.heldout)] == [
        [9, 15], [6, 15], [5, 5],
    ]  # fmt: skip
    on = open_evaluators(problem, problem.prepare())
    assert [task.name for task in on.validation.tasks] == ["text"]
    arrays = Checkpoints(RunFolder(finished)).restore(print).arrays
    document = read_json(finished / "result.json")
    winner = np.array(document["genome"], np.float32)
    (uniform,) = problem.space.baselines()[1]
    finalists = np.concatenate([arrays["genomes"], problem.space.start[None]])
    values = fitness(on.validation.tasks, on.validation.score(finalists))
    mine, theirs = fitness(on.validation.tasks, on.validation.score(np.stack([winner, uniform])))
    assert mine >= values.max() - 1e-6
    assert document["chosen_on"] == "validation"
    assert list(document["validation_fitness"].values()) == pytest.approx([mine, theirs], abs=1e-6)
    searched = fitness(on.search.tasks, on.search.score(np.stack([winner, uniform])))
    assert list(document["search_fitness"].values()) == pytest.approx(searched, abs=1e-6)
    rows = RunFolder(finished).read_history()
    assert {n for row in rows for n in row["examples"]} == {9}
    assert [row["generation"] for row in rows if "validation" in row] == [2, 4]
    # The same, in words.
    card = (finished / "best/model/README.md").read_text()
    assert "The winner was chosen on the validation split, on which no generation was scored: there it" in card
    shown = f"{mine:.4f} (log-probability per token), the uniform merge {theirs:.4f}; on the search split "
    assert f" scored {shown}{searched[0]:.4f}" in card
    assert "weight 1, 9 search, 6 validation and 5 held-out examples" in card
    assert "weight 0, 15 search and 5 held-out examples" in card


@pytest.mark.parametrize("space", sample(["merges", "paths"], 1))
@thorough
def test_what_chooses_the_winner_has_a_dtype_of_its_own(config, space, tmp_path, capsys):
    """Generations in bfloat16, finalists and the table in float32: as whoever evaluates the exported winner does."""
    document = yaml.safe_load(config.read_text())
    document["tasks"] = document["tasks"][:1]
    document["search"] = {"generations": 1, "population": 4, "finalists": 2}
    document["evaluation"] = {"compute_dtype": "bfloat16", "final_compute_dtype": "float32"}
    if space == "paths":
        del document["space"]
        document["data_flow"] = {"form": "moves"}
    path = config.with_name(f"{space}.yaml")
    write_yaml(path, document)
    run_search(path, tmp_path / "run")
    said = " ".join(capsys.readouterr().out.split())
    assert "(computed in float32, the generations in bfloat16)." in said
    result = read_json(tmp_path / "run/result.json")
    assert result["compute_dtype"] == "float32"
    winner = tmp_path / "run/best/model"

    def heldout(models: list[Path], evaluation: dict[str, str]) -> list[float]:
        write_yaml(path, document | {"evaluation": evaluation})
        return [row["fitness"] for row in em.evaluate(models, path, split="heldout")]

    models = [*map(Path, [document["base"], *document["parents"]]), winner]
    known = {row["name"]: row["heldout_fitness"] for row in result["table"]}
    known["model"] = next(row["heldout_fitness"] for row in result["table"] if row["role"] == "winner")
    exact, rounded = heldout(models, {"compute_dtype": "float32"}), heldout([winner], {"compute_dtype": "bfloat16"})
    assert [known[model.name] for model in models] == pytest.approx(exact, abs=1e-6)
    assert heldout([winner], document["evaluation"]) == pytest.approx(exact[-1:], abs=1e-9)
    assert abs(rounded[0] - exact[-1]) > 1e-5
    # Generations were scored in the other dtype.
    (row,) = RunFolder(tmp_path / "run").read_history()
    write_yaml(path, document)
    problem = open_problem(path)
    full = problem.prepare().search
    on = open_evaluators(problem, Splits([full], full, None, full))
    searched, final = on.shards[0], on.search
    genomes = np.array(row["genomes"], np.float32)
    in_bfloat16, in_float32 = (fitness(one.tasks, one.score(genomes)) for one in (searched, final))
    assert row["fitness"] == pytest.approx(in_bfloat16, abs=1e-6)
    assert np.abs(in_bfloat16 - in_float32).max() > 1e-5


def test_the_report_says_which_split_and_how_sure(config, tmp_path, capsys):
    run_search(config, tmp_path / "run", "search.generations=1")
    said = " ".join(capsys.readouterr().out.split())
    assert "The winner was chosen on the validation split" in said and "validation" in said
    document = read_json(tmp_path / "run/result.json")
    # One of them says on how many of the tasks.
    assert said.count("On held-out data the winner is") - 1 == len(document["better_than"]) == 3
    for row in document["better_than"].values():
        if row["interval"] is None:
            assert "(log-probability per token): too few examples to say which is better" in said
            continue
        low, high = row["interval"]
        assert low <= row["winner_heldout_fitness"] - row["heldout_fitness"] <= high
        assert row["within_noise"] == (low <= 0 <= high)
        # The winner may be a parent as it is.
        assert f"95% interval {low:.4f} to {high:.4f}" in said or low == high
    run_search(config, tmp_path / "plain", "search={generations: 1, population: 6}")
    assert "The winner was chosen on the search split" in " ".join(capsys.readouterr().out.split())


def test_the_search_never_sees_the_validation_split(config, finished, tmp_path):
    """Other targets there (of the same lengths, for the same batches) change its own column of the history alone."""
    problem = open_problem(config)
    kept = {example.line for example in problem.splits.validation[0].examples}
    records = even_records(20)
    for line in kept:
        records[line - 1] = records[line - 1] | {"target": " ".join(["w7"] * len(records[line - 1]["target"].split()))}
    write_lines(tmp_path / "other.jsonl", records)
    run_search(config, tmp_path / "run", f"tasks.0.file={tmp_path / 'other.jsonl'}")
    mine, theirs = (RunFolder(out).read_history() for out in (tmp_path / "run", finished))
    assert [row.pop("validation", None) for row in mine] != [row.pop("validation", None) for row in theirs]
    assert mine == theirs


def test_a_run_that_was_stopped_is_finished_without_searching(config, finished, tmp_path, capsys):
    stop = "search.stop={evaluations: 14}"
    run_search(config, tmp_path / "run", stop)
    document = read_json(tmp_path / "run/result.json")
    assert document["stopped_by"] == "evaluations" and document["generations"] == 2
    whole = (finished / "history.jsonl").read_bytes().splitlines()
    assert (tmp_path / "run/history.jsonl").read_bytes().splitlines() == whole[:2]
    before = files(tmp_path / "run")
    capsys.readouterr()
    run_search(config, tmp_path / "run", stop, resume=True)
    assert "2 generations are saved: nothing to search (search.stop.evaluations" in capsys.readouterr().out
    assert files(tmp_path / "run") == before
    run_search(config, tmp_path / "run", resume=True)
    assert files(tmp_path / "run") == {
        name: content.replace(finished.name.encode(), b"run") for name, content in files(finished).items()
    }


def test_splits_of_an_own_loop(config):
    evaluator = em.Evaluator(config, split="validation")
    assert evaluator.scores(evaluator.start[None]).values.shape == (1, 6)
    with pytest.raises(em.InputError, match=r"split: validation; .* has no validation split"):
        em.Evaluator(config, overrides=["search={}"], split="validation")


@thorough
def test_stages_validate_on_the_same_examples(config, tmp_path):
    document = yaml.safe_load(config.read_text())
    search = document.pop("search")
    space = document.pop("space")
    document["stages"] = [{"space": space, "search": search}, {"data_flow": {"moves": 1}, "search": dict(search)}]
    path = config.with_name("stages.yaml")
    write_yaml(path, document)
    short = [f"stages.{i}.search.generations=1" for i in range(2)]
    run_search(path, tmp_path / "run", *short)
    for result in ("stages/stage-1/result.json", "result.json"):
        assert read_json(tmp_path / "run" / result)["chosen_on"] == "validation"
    with pytest.raises(InputError, match=r"stages\[1\]\.search\.validation: 0\.5, and 0\.4 in stages\[0\]"):
        read_config(path, ["stages.1.search.validation=0.5"], None)


def test_examples_on_both_sides_are_told(config, tmp_path, capsys):
    records = even_records(10)
    write_lines(tmp_path / "twice.jsonl", records + records)
    run_search(config, tmp_path / "run", f"tasks.0.file={tmp_path / 'twice.jsonl'}", "search.generations=1")
    assert "of the 6 validation examples are among those that are searched on" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("search.validation=0.01", "search.validation: 0.01 of the 15 examples that text has to search on leaves none"),
        ("search.validation=1", "search.validation: expected a share from 0 to below 1, found 1"),
        ("search.validation=0", "search: validate_every: there is no validation split; give `validation` a share"),
        ("search.seeds=[parents, parents]", "search: seeds: parents stands twice; expected each once"),
        ("search.stop.evaluations=5", "search: stop.evaluations: 5 are fewer than the 6 candidates"),
        ("search.stop.evaluation=50", "search.stop.evaluation: unknown key (did you mean 'evaluations'?)"),
        ("search.stop.stagnation=-1", "search.stop.stagnation: expected a whole number from 1 to 1,000,000, found -1"),
        ("search.stop=10", "search.stop: expected a mapping (of evaluations, seconds, target, stagnation), found 10"),
    ],
)
def test_what_cannot_be_is_refused(override, says, config):
    with pytest.raises(InputError) as caught:
        open_problem(config, override)
    assert f"config.yaml: {says}" in str(caught.value) and "\n" not in str(caught.value)


def test_defaults_are_left_out_of_what_is_kept(config):
    search = read_config(config, ["search={}"], None).search
    assert not {"validation", "validate_every", "stop"} & search.model_dump().keys()
    stopped = read_config(config, ["search={stop: {target: 1}}"], None).search
    assert stopped.model_dump()["stop"] == {"target": 1.0}
