"""Studies: the same search as the command's, loops by hand, functions as fitness, tables and what a prompt shows."""

import re
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from helpers.commands import run_here
from helpers.families import Family
from helpers.sampling import thorough
from helpers.trees import search_trees
from hostile import run_command, run_python

import evojax_merge as em
from evojax_merge.search.protocols import plain_merges_of
from evojax_merge.tasks.python_functions import digest

FILES = ("history.jsonl", "best/recipe.yaml", "best/model/model.safetensors")


def half(records: list[dict[str, Any]], totals: np.ndarray) -> np.ndarray:
    return totals / SCALE


SCALE = 2


def make(family: Family, tasks: Any = None, **changes: Any) -> em.Study:
    models = em.load_models(family.base, family.parents)
    space = em.MergeSpace(models, "ties", layers_per_group="all", parameters={"weight": {}, "density": {"low": 0.3}})
    tasks = tasks or [
        em.tasks.Likelihood(name="text", file=family.tasks, limit=5),
        em.tasks.MultipleChoice(name="choice", file=family.tasks, metric="margin", weight=0.3),
    ]
    options = {"strategy": em.strategies.cma_es(population=4), "seed": 3, "finalists": 2} | changes
    return em.Study(models, space, tasks, **options)


def python_task(family: Family, function: Callable[..., Any] = half) -> dict[str, Any]:
    return em.tasks.Function(function, name="mine", file=family.tasks, inputs="log_probabilities")


def test_one_task_is_a_list_of_one(family: Family) -> None:
    task = python_task(family)
    assert make(family, task).config == make(family, [task]).config


@pytest.fixture(scope="module")
def study(family: Family, tmp_path_factory: pytest.TempPathFactory) -> em.Study:
    """A study of two generations with a validation split."""
    study = make(family, out=tmp_path_factory.mktemp("study") / "run", validation=0.25, validate_every=1)
    numbers: list[tuple[int, int]] = []

    def watch(generation: em.Generation) -> None:
        numbers.append((generation.number, len(study.history)))

    run = study.run(1, on_generation=watch)
    assert run.finished and numbers == [(1, 1)]
    study.run(1, on_generation=watch)
    assert numbers == [(1, 1), (2, 2)]
    return study


@pytest.fixture(scope="module")
def by_hand(family: Family) -> em.Study:
    """A study of two generations that were told by hand."""
    study = make(family, validation=0.25)
    for _ in range(2):
        genomes = study.ask()
        assert np.array_equal(genomes, study.ask())
        study.tell(genomes, study.evaluate(genomes))
    return study


def test_a_study_is_the_search_of_its_config(study: em.Study, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(study.to_yaml())
    written = yaml.safe_load(config.read_text())
    assert written == study.config | {"search": study.config["search"] | {"generations": 2}}
    run_here("search", config, "--out", tmp_path / "run")
    for name in FILES:
        assert (study.out / name).read_bytes() == (tmp_path / "run" / name).read_bytes(), name


def test_a_loop_by_hand_is_the_run(study: em.Study, by_hand: em.Study) -> None:
    rows = [{key: value for key, value in row.items() if key != "validation"} for row in study.history]
    assert by_hand.history == rows
    best = max(by_hand.trials, key=lambda trial: trial.fitness)
    assert by_hand.best == best and by_hand.best.fitness == rows[-1]["best_so_far"]
    # What the run folder holds is where a loop goes on.
    again = make_again(study)
    assert np.array_equal(again.ask(), by_hand.ask())
    genomes = again.ask()
    again.tell(genomes, np.arange(4.0))
    assert [row["generation"] for row in again.history] == [1, 2, 3]
    with pytest.raises(em.InputError, match="told by hand"):
        again.run(1)


def make_again(study: em.Study) -> em.Study:
    tasks = study.config["tasks"]
    return em.Study(
        study.models, study.space, tasks, strategy=em.strategies.cma_es(population=4), seed=3, finalists=2,
        validation=0.25, validate_every=1, out=study.out, resume=True,
    )  # fmt: skip


def test_fitness_of_ones_own_and_failures(family: Family) -> None:
    study = make(family)
    genomes = study.ask()
    study.tell(genomes, [1.0, float("nan"), 3.0, 2.0])
    assert study.best.candidate == 2 and study.best.fitness == 3.0 and study.best.scores == {"fitness": 3.0}
    assert [trial.fitness for trial in study.trials] == [1.0, None, 3.0, 2.0]
    assert {trial.examples for trial in study.trials} == {None} and "examples=None" in repr(study.best)
    assert not np.array_equal(study.ask(), genomes)
    with pytest.raises(em.Failed, match="generation 2: all 4 candidates failed"):
        study.tell(study.ask(), np.full(4, np.nan))


@thorough
def test_a_study_resumes(family: Family, study: em.Study, tmp_path: Path) -> None:
    changes = {"out": tmp_path / "run", "validation": 0.25, "validate_every": 1}
    make(family, **changes).run(1)
    with pytest.raises(em.InputError, match="holds a run already"):
        make(family, **changes)
    resumed = make(family, resume=True, **changes)
    assert len(resumed.history) == 1
    resumed.run(1)
    for name in FILES:
        assert (study.out / name).read_bytes() == (tmp_path / "run" / name).read_bytes(), name
    assert len(make(family, overwrite=True, **changes).run(1).history) == 1


def test_a_run_that_was_refused_can_be_tried_again(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = make(family, out=tmp_path / "run")

    def refuse(*arguments: Any) -> None:
        raise em.InputError("models", "refused")

    with monkeypatch.context() as patch:
        patch.setattr("evojax_merge.core.search", refuse)
        with pytest.raises(em.InputError, match="refused"):
            study.run(1)
    assert study.run(1).finished and len(study.history) == 1


def test_the_best_is_the_winner(study: em.Study, tmp_path: Path) -> None:
    run = em.open_run(study.out)
    np.testing.assert_array_equal(study.best.genome, np.array(run.result["genome"], np.float32))
    out = study.best.export(tmp_path / "best")
    assert (out / "model.safetensors").read_bytes() == (run.model / "model.safetensors").read_bytes()
    assert study.best.recipe == run.recipe


def test_frames_have_a_row_for_each_candidate(study: em.Study) -> None:
    frame = study.to_frame()
    assert len(frame) == len(study.trials) == 8
    assert list(frame.columns[:6]) == ["generation", "candidate", "fitness", "examples", "text", "choice"]
    names = list(study.space.parameters(study.space.start))
    assert list(frame.columns[6:]) == names and "weight[layers 0-2 attention][parent1]" in names
    for trial, (_, row) in zip(study.trials, frame.iterrows(), strict=True):
        assert (trial.generation, trial.candidate, trial.fitness) == (row.generation, row.candidate, row.fitness)
        assert trial.scores == {"text": row["text"], "choice": row["choice"]}
        np.testing.assert_allclose([trial.parameters[name] for name in names], row[names].astype(float), rtol=1e-6)
    assert frame.equals(em.open_run(study.out).to_frame())
    # The recipe says the same numbers.
    weights = [study.trials[0].parameters[f"weight[layers 0-2 attention][parent{k}]"] for k in range(2)]
    numbers = [float(number) for number in re.findall(r"\d+\.\d+", yaml.safe_dump(study.trials[0].recipe))]
    assert np.isclose(np.array(weights)[:, None], numbers, rtol=1e-5).any(axis=1).all()


def test_frames_without_names_have_genes(family: Family, tmp_path: Path) -> None:
    config = {
        "parents": list(map(str, family.parents)), "data_flow": {"moves": 2},
        "tasks": [em.tasks.Likelihood(name="text", file=family.tasks)],
        "search": {"population": 4, "generations": 1, "strategy": "path_ga"},
    }  # fmt: skip
    run = em.evolve(config, out=tmp_path / "path")
    dims = len(run.history[0]["genomes"][0])
    assert list(run.to_frame().columns[-2:]) == [f"gene[{dims - 2}]", f"gene[{dims - 1}]"]
    parents = [{"w": np.full(3, value, np.float32)} for value in (1.0, 2.0)]
    search_trees(parents, lambda merged: -((merged["w"] - 1.5) ** 2).sum(), generations=1, out=tmp_path / "tree")
    assert "weight[w][parents[0]]" in em.open_run(tmp_path / "tree").to_frame().columns
    assert "method='" in repr(em.open_run(tmp_path / "tree"))


def test_frames_name_the_missing_package(study: em.Study, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(em.InputError, match="to_frame: needs the package pandas"):
        study.to_frame()


def test_a_plot_shows_the_history(study: em.Study, family: Family) -> None:
    chart = study.plot().to_dict()
    (points,) = chart["datasets"].values()
    assert {point["series"] for point in points} == {"best so far", "best", "mean", "validation of best"}
    means = [point["fitness"] for point in points if point["series"] == "mean"]
    assert means == [row["mean"] for row in study.history]
    with pytest.raises(em.InputError, match="no generation yet"):
        make(family).plot()


def unstyled(value: Any) -> str:
    """The HTML of an object in a notebook, without the alignment of cells."""
    return re.sub(r' style="[^"]*"', "", value._repr_html_())


def test_objects_say_what_they_hold(study: em.Study, family: Family, tmp_path: Path) -> None:
    run, evaluator = em.open_run(study.out), em.Evaluator(study.config)
    for value in (study, run, evaluator, study.space):
        assert (
            "method='ties'" in repr(value)
            and "parent1" in repr(value)
            and f"dimensions={study.space.dims}" in repr(value)
        )
        assert "\n" not in repr(value) and "<th>method</th><td>ties</td>" in unstyled(value)
    best = f"best_fitness={study.best.fitness:.6g}, best_fitness_on='search'"
    for value in (study, run):
        assert "generations=2" in repr(value) and best in repr(value)
    # Their metrics are unlike.
    assert "scale='parents'" in repr(study) and "scale: parents" in study.to_yaml()
    single = make(family, em.tasks.Likelihood(name="text", file=family.tasks))
    assert "scale" not in repr(single) + single.to_yaml()
    assert "base='base'" in repr(study.models) and "layers=3" in repr(study.models)
    assert "origin='candidate 3 of generation 2'" in repr(study.trials[-1]) and "split='search'" in repr(study.best)
    assert "<b>" not in em.Run(tmp_path / "<b>\x1b[31m")._repr_html_()
    assert "\x1b" not in em.Run(tmp_path / "<b>\x1b[31m")._repr_html_() + repr(em.Run(tmp_path / "<b>\x1b[31m"))


def test_the_origin_of_a_winner_that_was_in_no_generation(study: em.Study) -> None:
    uniform, _, parent = plain_merges_of(study.space._space)[0]
    named = {"the uniform merge": uniform, "the parent parent1": parent, "the strategy's proposal": uniform + 0.01}
    for origin, genome in named.items():
        for best in (study.best, em.open_run(study.out).best):
            trial = replace(best, generation=None, candidate=None, examples=None, genome=genome)
            assert trial.origin == origin and f"<td>{escape(origin)}</td>" in unstyled(trial)


def test_scores_are_short_in_a_prompt(by_hand: em.Study) -> None:
    scores = by_hand.evaluate(by_hand.ask())
    start = f"Scores(candidates=4, examples={scores.values.shape[1]}, tasks=['text', 'choice'], fitness=["
    assert repr(scores).startswith(start) and len(repr(scores)) < 160
    assert repr(scores).endswith(f"best_candidate={scores.fitness.argmax()})")


def test_notebooks_show_parameters_and_scores(study: em.Study, by_hand: em.Study, family: Family) -> None:
    run, evaluator = em.open_run(study.out), em.Evaluator(study.config)
    column, group = "<th>weight parent1</th>", "<td>layers 0-2 attention</td>"
    for value in (study, by_hand, run, evaluator, study.best, untouched(family)):
        assert column in unstyled(value) and group in unstyled(value), value
    weight = study.best.parameters["weight[layers 0-2 attention][parent1]"]
    winner = run.table[-1]["heldout_scores"]["text/log_probability"]
    for value in (study, run):
        shown = unstyled(value)
        assert f"<td>{weight:.3g}</td>" in shown and f"<td>{winner:.3g}</td>" in shown and " to " in shown
    assert f"<td>{by_hand.best.scores['text']:.3g}</td>" in unstyled(by_hand)
    printed = [[cell.strip() for cell in re.split("[┃│]", line)[1:-1]] for line in str(run.table).splitlines()]
    head, *rows = filter(None, printed)
    assert head[:3] == ["role", "name", "heldout_fitness"] and {"text/log_probability", "interval"} < set(head)
    assert [row[0] for row in rows] == [row["role"] for row in run.table] and f"{winner:.4f}" in rows[-1]
    # Few examples have no interval.
    assert re.fullmatch(r"–|-?\d+\.\d{4} to -?\d+\.\d{4}", rows[0][head.index("interval")])
    assert isinstance(run.table, list) and repr(run.table).startswith("[{'role'")
    assert "<td>margin</td>" in unstyled(evaluator)


def test_the_public_names() -> None:
    assert set(dir(em)) == set(em.__all__)
    assert em.tasks is sys.modules["evojax_merge.tasks"] and "ExactMatch" in dir(em.tasks)
    assert "cma_es" in dir(em.strategies)
    with pytest.raises(AttributeError, match="did you mean 'cma_es'"):
        em.strategies.cma_ess  # noqa: B018
    with pytest.raises(AttributeError, match="did you mean 'Likelihood'"):
        em.tasks.Likelyhood  # noqa: B018


# ---------------------------------------------------------------------------------------------------------------
# Functions


def test_a_function_is_a_fitness_wherever_a_file_is(family: Family, tmp_path: Path) -> None:
    source = "def half(records, totals):\n    return totals / 2\n"
    (tmp_path / "fitness.py").write_text(source)
    named = em.tasks.Function(f"{tmp_path / 'fitness.py'}:half", name="mine", file=family.tasks)
    named |= {"inputs": "log_probabilities"}
    given = python_task(family)
    assert em.evaluate(family.base, [given]) == em.evaluate(family.base, [named])
    studies = [make(family, [task], out=tmp_path / name) for task, name in ((given, "a"), (named, "b"))]
    runs = [study.run(1) for study in studies]
    assert runs[0].history == runs[1].history
    evaluators = [em.Evaluator(study.config) for study in studies] + [
        em.Evaluator(studies[1].config | {"tasks": [given]})
    ]
    fitness = [evaluator.scores(evaluator.start[None]).fitness for evaluator in evaluators]
    assert fitness[0] == fitness[1] == fitness[2]
    config = studies[0].config | {"tasks": [given], "search": {"population": 4, "generations": 1}}
    assert em.evolve(config, out=tmp_path / "c").finished
    assert "# Missing: python:NAME@DIGEST: functions and pytrees" in studies[0].to_yaml()
    assert "# Missing: search.generations: the number" in make(family).to_yaml()
    # Another process does not know the function, and says so.
    (tmp_path / "config.yaml").write_text(studies[0].to_yaml())
    for command in (
        ["search", tmp_path / "config.yaml"],
        ["evaluate", family.base, "--tasks", tmp_path / "a/config.yaml"],
    ):
        done = run_command(*command, folder=tmp_path, status=2)
        assert len(done.stderr.splitlines()) == 1
        assert "python:half@" in done.stderr and "has not defined it" in done.stderr


def test_a_wrong_number_of_scores_is_one_error_without_inner_frames(family: Family) -> None:
    task = python_task(family, lambda records, totals: totals[1:])
    study = make(family, task)
    with pytest.raises(em.Failed, match=r"returned float\d\d\[\d+\]; expected \d+ numbers, one for each") as caught:
        study.evaluate(study.ask())
    assert {frame.filename for frame in traceback.extract_tb(caught.value.__traceback__)} == {__file__}


def test_a_run_is_not_resumed_with_a_changed_function(family: Family, tmp_path: Path) -> None:
    make(family, [python_task(family)], out=tmp_path / "run").run(1)

    def half(records: list[dict[str, Any]], totals: np.ndarray) -> np.ndarray:
        return totals / 3

    with pytest.raises(em.InputError, match=r"tasks\.0\.function differs"):
        make(family, [python_task(family, half)], out=tmp_path / "run", resume=True)
    assert len(make(family, [python_task(family)], out=tmp_path / "run", resume=True).run(1).history) == 2


def test_digests_are_of_the_code(tmp_path: Path) -> None:
    def define(source: str) -> Callable[..., Any]:
        values: dict[str, Any] = {"__name__": "mine"}
        exec(source, values)
        function: Callable[..., Any] = values["f"]
        return function

    first = define("def f(a, b):\n    return [x + 1 for x in a]")
    assert digest(first) == digest(define("\n\ndef f(a, b):  # a comment\n    return [x + 1 for x in a]"))
    others = [
        "def f(a, b):\n    return [x + 2 for x in a]", "def f(a, b):\n    return [x - 1 for x in a]",
        "def f(a, b=1):\n    return [x + 1 for x in a]", "def f(a, b):\n    return [len(x) for x in a]",
        "N = 1\ndef f(a, b):\n    return [x + N for x in a]", "N = 2\ndef f(a, b):\n    return [x + N for x in a]",
        "def g(x):\n    return x\ndef f(a, b):\n    return g(a)",
        "def g(x):\n    return -x\ndef f(a, b):\n    return g(a)",
        "def h(k):\n    return lambda a, b: k\nf = h(1)", "def h(k):\n    return lambda a, b: k\nf = h([2])",
        "from functools import partial\nf = partial(max, 1)", "from functools import partial\nf = partial(max, 2)",
        "class C:\n    def __init__(self, k): self.k = k\n    def __call__(self, a, b): return self.k\nf = C(1)",
        "class C:\n    def __init__(self, k): self.k = k\n    def __call__(self, a, b): return self.k\nf = C(2)",
        *(f"{text}\nk = {k}\n{place}" for text in ("import jax.numpy as jnp\nclass K: pass", ) for place in (
            "def f(a, b, t=jnp.full(3, k)): return t",
            "def h(t):\n    return lambda a, b: t\nf = h({'a': jnp.full(2, k)})",
            "def h(t):\n    return lambda a, b: t.k\nt = K()\nt.k = k\nf = h(t)",
            "N = jnp.full(4, k)\ndef f(a, b): return N",
            "def h(s, t):\n    return lambda a, b: (s.k, t.k)\ns, t = K(), K()\ns.k, t.k = 0, k\nf = h(s, t)",
            "import numpy as np\ndef f(a, b, t=np.array(['x', k], object)): return t",
        ) for k in (1, 2)),
    ]  # fmt: skip
    digests = [digest(define(source)) for source in others]
    assert len({*digests, digest(first)}) == len(others) + 1
    code = (
        f"from evojax_merge.tasks.python_functions import digest\nv = {{'__name__': 'mine'}}\nexec({others[8]!r}, v)\n"
    )
    assert run_python(f"{code}print(digest(v['f']))", folder=tmp_path).stdout.strip() == digests[8]
    for source in (
        "n = 0\ndef f(a, b):\n    global n\n    n += 1\n    return a",
        "def h(n):\n    def f(a, b):\n        nonlocal n\n        n += 1\n        return a\n    return f\nf = h(0)",
        "class C:\n    n = 0\n    def __call__(self, a, b):\n        self.n += 1\n        return a\nf = C()",
    ):
        function = define(source)
        before = digest(function)
        function(1, 2)
        assert digest(function) == before, source


# ---------------------------------------------------------------------------------------------------------------
# Misuse


@cache
def untouched(family: Family) -> em.Study:
    """A study of which nothing has been asked, and on which no refused call leaves a trace."""
    return make(family)


WRONG: list[tuple[Callable[[Family, em.Study], Any], str]] = [
    (lambda family, study: em.load_models(3, ["a"]), "load_models: base: 3"),
    (lambda family, study: em.load_models(None, "a"), "load_models: parents: 'a'; expected a list"),
    (lambda family, study: em.load_models(None, []), "load_models: parents: is empty"),
    (
        lambda family, study: em.load_models(None, ["a"], backend="funtion"),
        "load_models: backend: unknown backend 'funtion' (did you mean 'function'?)",
    ),
    (lambda family, study: em.load_models(None, ["/nowhere"]), "load_models: parents[0]: "),
    (lambda family, study: em.MergeSpace(None, "ties"), "MergeSpace: models: None; expected a Models"),
    (lambda family, study: em.MergeSpace(study.models, "tie"), "MergeSpace: method: unknown method 'tie'"),
    (lambda family, study: em.MergeSpace(study.models, "ties", layers=1), "MergeSpace: layers: unknown key"),
    (
        lambda family, study: em.MergeSpace(study.models, "ties", layers_per_group=0),
        "MergeSpace: layers_per_group: expected",
    ),
    (
        lambda family, study: em.MergeSpace(em.load_models(None, family.parents), "ties"),
        "MergeSpace: base: missing; ties takes task vectors",
    ),
    (
        lambda family, study: em.Study(em.load_models(family.base, family.parents), study.space, study.config["tasks"]),
        "Study: space: is a space of other models",
    ),
    (lambda family, study: em.Study(study.models, study.space, []), "Study: tasks: "),
    (lambda family, study: em.Study(study.models, study.space, [3]), "Study: tasks[0]: 3; expected a mapping"),
    (lambda family, study: em.Study(study.models, study.space, [3]), "or a host_callback or a function"),
    (
        lambda family, study: em.Study(study.models, study.space, 3),
        "Study: tasks: 3; expected a task or a list of tasks, each of em.tasks or a function",
    ),
    (
        lambda family, study: em.Study(study.models, study.space, half),
        "Study: tasks[0]: is a function alone; for language models use em.tasks.Function(f, file=…)",
    ),
    (
        lambda family, study: make(family, [{"kind": "likely", "name": "text"}]),
        "Study: tasks[0].kind: there is no kind",
    ),
    (
        lambda family, study: make(family, [em.tasks.ExactMatch(name="text", file="a", metrics=1)]),
        "Study: tasks[0].metrics: unknown key (did you mean 'metric'?)",
    ),
    (lambda family, study: make(family, [python_task(family, lambda: 1)]), "inputs: log_probabilities calls it with"),
    (lambda family, study: make(family, finalist=2), "Study: search.finalist: unknown key"),
    (lambda family, study: make(family, generations=2), "Study: generations: is what `run` is called with"),
    (lambda family, study: make(family, population=2), "Study: population: is given by `strategy` as well"),
    (lambda family, study: make(family, strategy=3), "Study: strategy: 3; expected a text or a mapping"),
    (lambda family, study: make(family, strategy=em.strategies.cma_es(population=1)), "population: 1"),
    (lambda family, study: em.strategies.cma_es(pop=3), "strategies.cma_es: there is no option 'pop'"),
    (lambda family, study: em.strategies.cma_es(sigma="w"), "strategies.cma_es: sigma: expected"),
    (lambda family, study: em.strategies.cma_es(population="many"), "strategies.cma_es: population: expected"),
    (lambda family, study: make(family, strategy={"sigma": "w"}), "Study: search.sigma: expected"),
    (lambda family, study: make(family, validation=1.5), "Study: search.validation: expected"),
    (lambda family, study: make(family, seed=-1), "Study: seed: expected"),
    (lambda family, study: make(family, seed=True), "Study: seed: True"),
    (lambda family, study: make(family, resume=True), "Study: resume: there is no run folder; give `out`"),
    (lambda family, study: make(family, out=3), "Study: out: 3"),
    (lambda family, study: untouched(family).run(1), "Study.run: out: missing"),
    (lambda family, study: untouched(family).run(0), "Study.run: generations: 0"),
    (lambda family, study: untouched(family).run(2.0), "Study.run: generations: 2.0; expected a whole number"),
    (lambda family, study: untouched(family).best, "Study.best: there is no generation yet"),
    (lambda family, study: untouched(family).evaluate(None), "genomes: None"),
    (lambda family, study: untouched(family).evaluate(np.zeros((1, 2))), "genomes: shape [1, 2]"),
    (lambda family, study: untouched(family).evaluate(study.ask(), split="all"), "Study.evaluate: split: 'all'"),
    (
        lambda family, study: untouched(family).evaluate(study.ask(), split="validation"),
        "Study.evaluate: split: validation; the study keeps none back",
    ),
    (lambda family, study: untouched(family).tell(np.zeros((1, 2)), [1.0]), "genomes: shape [1, 2]"),
    (
        lambda family, study: untouched(family).tell(study.ask(), [1.0]),
        "scores: [1.0]; expected the Scores of 4 candidates",
    ),
    (lambda family, study: untouched(family).tell(study.ask(), "good"), "scores: 'good'"),
    (lambda family, study: untouched(family).tell(study.ask(), None), "scores: None"),
    (
        lambda family, study: untouched(family).tell(study.ask(), study.evaluate(study.ask()[:2])),
        "scores: are of 2 cand",
    ),
    (
        lambda family, study: make(family, strategy=em.strategies.gradient(population=1)).ask(),
        "Study.ask: the strategy gradient follows gradients",
    ),
    (lambda family, study: study.best.export(3), "Trial.export: out: 3"),
    (lambda family, study: study.space.parameters([1.0]), "genome: shape [1]"),
]


@pytest.mark.parametrize(("call", "named"), WRONG, ids=[named for _, named in WRONG])
def test_wrong_calls(call: Callable[..., Any], named: str, family: Family, by_hand: em.Study) -> None:
    with pytest.raises(em.InputError) as caught:
        call(family, by_hand)
    assert named in str(caught.value)
