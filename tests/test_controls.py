"""Controls of the held-out table: adapters that are trained as PEFT trains them, random candidates, and what is said of
them."""

import re
import shlex
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import yaml
from helpers.commands import assert_refused, output_of
from helpers.families import Family
from helpers.files import read_json, write_lines, write_yaml
from helpers.models import even_records, load_torch
from helpers.searches import problem_of, search_config, task_section
from helpers.trees import search_trees
from hostile import start_command
from safetensors.numpy import save_file
from transformers import AutoTokenizer

from evojax_merge.backends.backend import Adaptable
from evojax_merge.config.search_config import GradientConfig
from evojax_merge.evaluation.scores import PLAIN, TaskScores
from evojax_merge.models.adapted import LowRankLayout
from evojax_merge.models.architecture import architecture_of
from evojax_merge.problem import SearchProblem
from evojax_merge.report.comparison import Result, Row
from evojax_merge.report.intervals import Lead
from evojax_merge.search.loop import evolve
from evojax_merge.search.recording import Reporter, Storage
from evojax_merge.search.run_folder import RunFolder
from evojax_merge.steps import controls
from evojax_merge.steps.loading import silent_phase
from evojax_merge.steps.low_rank import Tuning, TuningData, _estimate, train
from evojax_merge.steps.selection import open_evaluators, select_best


@pytest.fixture(scope="module")
def sums(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Family:
    """The family with examples enough for several parts."""
    folder = tmp_path_factory.mktemp("sums")
    return replace(family, root=folder, tasks=write_lines(folder / "tasks.jsonl", even_records(64)))


def opened(family: Family, *names: str, **changes: Any) -> SearchProblem:
    search = {"controls": list(names)} | changes.pop("search", {})
    document = search_config(family, 2, 4, heldout=0.25, search=search, **changes)
    return problem_of(family.root / "search.yaml", document)


def adaptable(problem: SearchProblem, rank: int, scale: float = 2.0) -> tuple[Any, TuningData]:
    """The base, to be changed, and the data of a training."""
    on = open_evaluators(problem, problem.prepare())
    base = problem.facts.compared[0][1]
    model = problem.backend.adaptable(base, [on.deciding, on.search, on.heldout, *on.tuning], rank, scale)
    deciding, search, _, *parts = model.evaluators
    return model, TuningData(parts, deciding, search, PLAIN, PLAIN, problem.tunes_by_gradient)


# ---------------------------------------------------------------------------------------------------------------
# The training


def test_an_adapter_is_trained_as_peft_trains_it(sums: Family) -> None:
    problem, rate, seed = opened(sums, "lora"), 3e-3, 5
    model, data = adaptable(problem, rank=4)
    assert len(data.parts) == 3
    tuning = Tuning(rank=4, rates=(rate,), rounds=((1.0, 1),))
    tuned = train(model, data, tuning, passes=30, seed=seed)
    (curve,) = tuned.curves
    expected = _trained_by_peft(problem, model.layout, rate, seed, len(curve))
    assert len(curve) == int(30 / 4.5 * 3) and expected[-1] > expected[0] + 0.1
    np.testing.assert_allclose(curve[:, 0], expected, atol=1e-3)


def _trained_by_peft(problem: SearchProblem, layout: Any, rate: float, seed: int, steps: int) -> list[float]:
    """The mean log-probability per token on each step's part, by PEFT and torch's Adam from the same factors."""
    config = problem.backend.models.decoder
    names = {
        f"layers/{leaf.name}": leaf.tensor.removesuffix(".weight")
        for leaf in architecture_of(config).leaves if leaf.stack is not None
    }  # fmt: skip
    modules = sorted({names[name].rpartition(".")[2] for name in layout.shapes})
    settings = peft.LoraConfig(
        r=layout.rank, lora_alpha=layout.rank * layout.scale, target_modules=modules, task_type="CAUSAL_LM"
    )
    tuned = peft.get_peft_model(load_torch(problem.facts.compared[0][1]), settings)
    factors = dict(tuned.named_parameters())
    with torch.no_grad():
        for name, (a, b) in layout.split(layout.start(seed)).items():
            for layer in range(len(a)):
                place = f"base_model.model.{names[name].format(layer=layer)}"
                factors[f"{place}.lora_A.default.weight"].copy_(torch.tensor(a[layer]))
                factors[f"{place}.lora_B.default.weight"].copy_(torch.tensor(b[layer]))
    trained = [values for values in tuned.parameters() if values.requires_grad]
    assert sum(values.numel() for values in trained) == layout.dims
    optimizer = torch.optim.Adam(trained, lr=rate)
    tokenizer, context, parts = problem.backend.models.tokenizer, problem.backend.models.context, problem.splits.tuning
    curve = []
    for step in range(steps):
        if step % len(parts) == 0:
            order = np.random.default_rng([seed, step]).permutation(len(parts))
        (task,) = parts[order[step % len(parts)]]
        fitness = torch.stack(_scores(tuned, task, tokenizer, context)).mean()
        curve.append(float(fitness.detach()))
        for group in optimizer.param_groups:
            group["lr"] = rate * (1 + np.cos(np.pi * step / steps)) / 2
        optimizer.zero_grad()
        (-fitness).backward()
        optimizer.step()
    return curve


@dataclass(frozen=True)
class Linear:
    """A fitness that is linear in the change of the matrices `w`: the sum of its products with `slope`."""

    layout: LowRankLayout
    slope: np.ndarray

    tasks = (SimpleNamespace(name="t", metric="m", weight=1.0, size=1),)

    def evaluate(self, vectors: np.ndarray, progress: Any = None) -> TaskScores:
        a, b = self.layout.of_dims(vectors.shape[1]).split(vectors)["w"]
        values = self.layout.scale * np.einsum("ploi,loi->p", np.matmul(b, a, dtype=np.float64), self.slope)
        return TaskScores({"t": {"m": values[:, None]}})


def test_evolution_strategies_estimate_the_derivative() -> None:
    rng, layout = np.random.default_rng(0), LowRankLayout((("w", (3, 8, 6)),), rank=2, scale=2.0)
    vectors, slope = rng.standard_normal((2, layout.dims)).astype(np.float32), rng.standard_normal((3, 8, 6))
    model, part = Adaptable(layout, {"w": 0.1}, []), Linear(layout, slope)
    values, estimate = _estimate(model, part, vectors, Tuning(pairs=50_000), PLAIN, (0, 0), lambda done: None)
    a, b = layout.split(vectors)["w"]
    exact = layout.join({"w": (b.swapaxes(-1, -2) @ slope * 2, slope @ a.swapaxes(-1, -2) * 2)}, (2,))
    assert np.linalg.norm(estimate - exact) < 0.1 * np.linalg.norm(exact)
    np.testing.assert_allclose(values, part.evaluate(vectors).matrices["t"]["m"][:, 0], rtol=1e-3)


def _scores(model: Any, task: Any, tokenizer: Any, context: int = 1024) -> list[torch.Tensor]:
    """The mean log-probability per token of each example's target, by torch."""
    scores = []
    for row in task.requests(tokenizer, context).scored:
        tokens = torch.tensor([row.tokens])
        logits = model(tokens).logits[0].log_softmax(-1)
        targets = torch.arange(row.start, len(row.tokens))
        scores.append(logits[targets - 1, tokens[0, targets]].mean())
    return scores


def test_a_task_without_derivatives_is_trained_by_evolution_strategies(sums: Family) -> None:
    model, data = adaptable(opened(sums, "lora"), rank=2)
    tuned = train(model, replace(data, by_gradient=False), Tuning(rates=(1e-2,), rounds=((1.0, 1),)), 400, 0)
    assert tuned.fitness > tuned.curves[0][0, 0] + 0.02


def test_a_variant_that_diverges_ends_and_is_named(sums: Family) -> None:
    model, data = adaptable(opened(sums, "lora"), rank=2)
    tuned = train(model, data, Tuning(rates=(1e-3, 1e30)), 60, 0)
    assert tuned.diverged == (1e30,) and tuned.rate == 1e-3 and np.isfinite(tuned.fitness)


def test_a_change_of_a_pytree_is_trained_like_one_of_a_language_model() -> None:
    """Two layers of a network, of which another learned the targets."""
    rng = np.random.default_rng(0)
    base, wanted = ({"a": rng.normal(size=(8, 6)), "b": rng.normal(size=6), "c": rng.normal(size=(6, 5))} for _ in "12")
    inputs = rng.normal(size=(64, 8)).astype(np.float32)

    def answers(tree: Any, x: Any) -> Any:
        return jnp.tanh(x @ tree["a"] + tree["b"]) @ tree["c"]

    def closeness(tree: Any, examples: Any) -> Any:
        return -jnp.square(answers(tree, examples["x"]) - examples["y"]).mean(axis=1)

    parents = [jax.tree.map(lambda a, b, share=share: np.float32(a + share * b), base, wanted) for share in (0.1, 0.2)]
    result = search_trees(
        parents, closeness, base=jax.tree.map(np.float32, base), method="task_arithmetic", strategy="cma_es",
        examples={"x": inputs, "y": np.asarray(answers(wanted, inputs))}, heldout=0.25, validation=0.25, generations=30,
        population=8, controls=["lora", "random"],
    )  # fmt: skip
    fitness = {row["role"]: row["heldout_fitness"] for row in result.table}
    assert fitness["lora_base"] > fitness["base"] + 0.2 and fitness["lora_parent"] > fitness["base"] + 0.2, fitness


# ---------------------------------------------------------------------------------------------------------------
# The run


def finished(problem: SearchProblem, folder: RunFolder | None = None) -> Result:
    on = open_evaluators(problem, problem.prepare())
    return select_best(problem, on, evolve(problem, on, Storage(), Reporter()), folder=folder)


def test_a_killed_run_makes_no_control_twice(sums: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    problem, folder = opened(sums, "random", "lora"), RunFolder(tmp_path)
    first = finished(problem, folder)
    assert [row.role for row in first.rows] == [
        "base", "parent", "parent", "uniform", "random", "lora_base", "lora_parent", "winner",
    ]  # fmt: skip
    monkeypatch.setattr(controls, "train", None)
    again = finished(problem, folder)
    assert [row.fitness for row in again.rows] == [row.fitness for row in first.rows]
    assert again.verdicts() == first.verdicts()
    # A damaged file is made again.
    folder.controls.write_bytes(folder.controls.read_bytes()[:100])
    monkeypatch.undo()
    assert [row.fitness for row in finished(problem, folder).rows] == [row.fitness for row in first.rows]


FACTS = {"fitness": 0.5, "search": 0.5, "rate": 1e-3, "step": 2, "steps": 4, "diverged": [2e-2]}
SETTINGS = {"model": "/models/base", "passes": 4.0, "seed": 1, "by_gradient": True}


def damaged(change: Callable[[bytearray], object]) -> Callable[[RunFolder], object]:
    def of(folder: RunFolder) -> None:
        content = bytearray(folder.controls.read_bytes())
        change(content)
        folder.controls.write_bytes(content)

    return of


def kept_again(array: np.ndarray, **facts: Any) -> Callable[[RunFolder], object]:
    """Another file with a digest that is right."""
    return lambda folder: controls.KeptControls(folder).keep("lora_base", SETTINGS, array, FACTS | facts)


@pytest.mark.parametrize(
    "change",
    [
        damaged(lambda content: content.__setitem__(-3, content[-3] ^ 64)),
        damaged(lambda content: content.__setitem__(content.index(b"0.001"), ord("9"))),
        damaged(lambda content: content.clear()),
        damaged(lambda content: content.__setitem__(slice(0, 8), (2**60).to_bytes(8, "little"))),
        lambda folder: folder.controls.write_text("a thesis"),
        lambda folder: save_file({"lora_base": np.ones(5, np.float32)}, folder.controls, {"facts": "[" * 100_000}),
        lambda folder: save_file({"lora_base": np.ones(5, np.float32)}, folder.controls, {"facts": "[1]"}),
        kept_again(np.ones(4, np.float32)),
        kept_again(np.ones((1, 5), np.float32)),
        kept_again(np.ones(5)),
        kept_again(np.full(5, np.nan, np.float32)),
        kept_again(np.ones(5, np.float32), step="2"),
        kept_again(np.ones(5, np.float32), search=[0.5]),
        kept_again(np.ones(5, np.float32), diverged=5),
        kept_again(np.ones(5, np.float32), rate=1e308),
    ],
)
def test_controls_that_no_search_has_kept_are_made_again(change: Callable[[RunFolder], object], tmp_path: Path) -> None:
    folder, vector = RunFolder(tmp_path), np.arange(5, dtype=np.float32)
    kept_again(vector)(folder)
    again = controls.KeptControls.read(folder).get("lora_base", SETTINGS, 5)
    assert again is not None and np.array_equal(again[0], vector) and again[1] == FACTS | {"settings": SETTINGS}
    change(folder)
    assert controls.KeptControls.read(folder).get("lora_base", SETTINGS, 5) is None


def test_all_processes_take_the_random_control_that_the_first_one_has_kept(
    sums: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that reads no file draws no candidates, which the first one would not score."""
    problem = opened(sums, "random")
    kept = np.full(problem.space.dims, 0.25, np.float32)
    monkeypatch.setattr(controls, "exchange", lambda document, what: [{"genome": kept.tolist()}, document])
    monkeypatch.setattr(controls, "evolve", None)
    (control,) = controls.make_controls(
        problem, open_evaluators(problem, problem.prepare()), SimpleNamespace(generations=2), silent_phase, None
    )  # fmt: skip
    assert control.genome is not None and control.genome.dtype == np.float32 and np.array_equal(control.genome, kept)


def test_random_candidates_stand_beside_what_auto_chose(sums: Family) -> None:
    """Its choice, gradients on minibatches, has options that no random search has."""
    document = search_config(sums, 2, 4, heldout=0.25) | {"search": {"strategy": "auto", "controls": ["random"]}}
    problem = problem_of(sums.root / "search.yaml", document)
    problem = replace(problem, search=problem.search.model_copy(update={"generations": 2}))
    assert problem.strategy.name == "gradient" and problem.search.gradient != GradientConfig()
    assert "random" in {row.role for row in finished(problem).rows}


def test_a_finished_run_gets_its_controls_later(sums: Family, tmp_path: Path) -> None:
    config, run = write_yaml(tmp_path / "search.yaml", search_config(sums, 2, 4, heldout=0.25)), tmp_path / "run"
    output_of("search", config, "--out", run)
    before, more = read_json(run / "result.json"), ("--resume", "--set", "search.controls=[random]")
    assert "what is left of the search takes" in output_of("search", config, "--out", run, *more)
    after = read_json(run / "result.json")
    assert [row["role"] for row in after["table"]] == ["base", "parent", "parent", "uniform", "random", "winner"]
    assert after["table"][-1] == before["table"][-1]
    assert "nothing to search" in output_of("search", config, "--out", run, *more)


def test_a_run_that_is_stopped_in_a_control_says_how_to_write_its_winner(sums: Family, tmp_path: Path) -> None:
    search = {"controls": ["random", "lora"]}
    config = write_yaml(tmp_path / "search.yaml", search_config(sums, 2, 4, heldout=0.25, search=search))
    run = tmp_path / "run"
    process = start_command("search", config, "--out", run)
    # Adapters are trained once the random candidate is kept.
    while not (run / "controls.safetensors").exists():
        assert process.poll() is None, process.read("stderr")
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=120) == 130
    stopped, more, _ = process.read("stderr").splitlines()[-3:]
    assert (
        stopped.startswith("stopped; 2 generations are saved. Continue with: ")
        and not (run / "best" / "model").exists()
    )
    again, without = shlex.split(stopped.partition(" with: ")[2]), shlex.split(more.partition(", add ")[2])
    assert without == ["--set", "search.controls=[]"]
    output_of(*again[1:], *without)
    result = read_json(run / "result.json")
    assert {row["role"] for row in result["table"]} == {"base", "parent", "uniform", "winner"}
    # The command alone makes the controls; one is kept.
    output_of(*again[1:])
    after = read_json(run / "result.json")
    assert {"random", "lora_base", "lora_parent"} <= {row["role"] for row in after["table"]}
    assert after["table"][-1] == result["table"][-1]


def test_the_table_the_page_and_the_result_show_controls(sums: Family, tmp_path: Path) -> None:
    document = search_config(
        sums, 1, 4, heldout=0.25, search={"controls": ["lora", "random", "uniform"], "validation": 0.25}
    )
    config, run = write_yaml(tmp_path / "search.yaml", document), tmp_path / "run"
    output = " ".join(output_of("search", config, "--out", run).split())
    result = read_json(run / "result.json")
    assert "was trained on the 36 examples that the search had, for 4 passes" in output
    assert "was chosen on the validation split" in output or "no step of it" in output
    assert {"random", "lora_base", "lora_parent"} <= {row["role"] for row in result["table"]}
    assert {"lora_base", "lora_parent"} == result["controls_search_fitness"].keys()
    for place in (run / "report.html", run / "best" / "model" / "README.md"):
        assert "LoRA on base" in place.read_text()


def test_records_that_tasks_share_are_counted_once(sums: Family) -> None:
    def counted(*tasks: dict[str, Any]) -> str:
        return controls.examples_of(opened(sums, tasks=list(tasks)))

    text = task_section(sums.tasks, heldout=0.25)
    right = text | {"name": "right", "kind": "exact_match", "max_new_tokens": 3}
    other = text | {"name": "other", "file": str(write_lines(sums.root / "other.jsonl", even_records(16)))}
    assert counted(text) == "48 examples"
    assert counted(text, right) == "48 records (96 examples over 2 tasks)"
    assert counted(text, right | {"weight": 0}) == "48 examples"
    assert counted(text, other) == "60 examples"
    assert counted(text, right, other) == "60 records (108 examples over 3 tasks)"


def test_a_search_without_derivatives_says_so(sums: Family, tmp_path: Path) -> None:
    task = task_section(sums.tasks, kind="exact_match", metric="brevity", max_new_tokens=3, heldout=0.25)
    document = search_config(sums, 2, 4, heldout=0.25, tasks=[task], search={"controls": ["lora"]})
    config = write_yaml(tmp_path / "search.yaml", document)
    assert not problem_of(config, document).tunes_by_gradient
    output = " ".join(output_of("search", config, "--out", tmp_path / "run").split())
    before, _, after = output.partition("generation 1/2")
    why = "for the fitness has no derivative"
    assert f"adapters: trained by rank-1 evolution strategies, without gradients, {why}" in before
    assert f"was trained by rank-1 evolution strategies, {why}," in after


WINNER, LORA = Row("winner", "evolved", 0.5, {}), Row("lora_base", "LoRA on base", 0.5, {})


@pytest.mark.parametrize(
    ("lead", "fitted", "says"),
    [
        (Lead(0.01, -0.1, 0.1), 0.0, "Nothing shows that the search was worth more than the LoRA on base."),
        (Lead(-0.3, -0.4, -0.2), 0.0, "Nothing shows that the search was worth more than the LoRA on base."),
        (Lead(0.3, 0.2, 0.4), 0.9, "it learned these 12 examples better and others worse"),
        (Lead(0.3, 0.2, 0.4), 0.1, ""),
    ],
)
def test_a_control_as_good_as_the_winner_is_named(lead: Lead, fitted: float, says: str) -> None:
    report: Any = None
    rows = [replace(LORA, lead=lead), WINNER]
    result = Result(
        np.zeros(1), 0.6, ("uniform merge", 0.1), rows, report, examples="12 examples", fitted={"lora_base": fitted}
    )
    sentences = " ".join(result.verdicts())
    assert says in sentences
    assert ("Nothing shows" in sentences) == (lead.low <= 0) and ("learned these" in sentences) == (fitted > 0.6)


def test_controls_that_a_search_cannot_have(sums: Family, tmp_path: Path) -> None:
    def refused(says: str, **changes: Any) -> None:
        document = search_config(sums, **({"heldout": 0.25} | changes))
        assert_refused([says], "search", write_yaml(tmp_path / "search.yaml", document), "--out", tmp_path / "run")

    refused("controls: lora stands twice", search={"controls": ["lora", "lora"]})
    refused(
        "lora: an adapter is trained on a model on the device", search={"controls": ["lora"]},
        evaluation={"bank": "host"},
    )  # fmt: skip
    refused(
        "uniform: the candidates are no merges of all parents", search={"controls": ["uniform"]}, space=None, base=None,
        data_flow={},
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------
# Polish


def read_card(folder: Path) -> tuple[dict[str, Any], str]:
    _, header, text = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(header), text


def test_a_polished_winner_is_the_adapter_that_was_scored(
    sums: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    search = {"then": "polish", "validation": 0.25, "generations": 40, "population": 4}
    config = write_yaml(tmp_path / "search.yaml", search_config(sums, heldout=0.25, search=search))
    run, whole = tmp_path / "run", tmp_path / "polished"
    output = " ".join(output_of("search", config, "--out", run).split())
    assert "The polished winner was trained on the 36 examples" in output
    row = next(row for row in read_json(run / "result.json")["table"] if row["role"] == "polished")
    winner = next(row for row in read_json(run / "result.json")["table"] if row["role"] == "winner")
    assert row["heldout_fitness"] != winner["heldout_fitness"]
    # The adapter as PEFT reads it, and the model that export makes of it.
    output_of("export", Path("run"), whole, "--as", "polished")
    tuned = peft.PeftModel.from_pretrained(load_torch(run / "best" / "model"), run / "best" / "adapter")
    (task,), models = problem_of(config, yaml.safe_load(config.read_text())).splits.heldout, (tuned, load_torch(whole))
    tokenizer = AutoTokenizer.from_pretrained(run / "best" / "model")
    for model in models:
        assert np.mean([score.item() for score in _scores(model, task, tokenizer)]) == pytest.approx(
            row["heldout_fitness"], abs=1e-4
        )
    # The card is the winner's, with the polished winner's scores, and the recipe has whole paths.
    header, card = read_card(whole)
    assert header["model-index"][0]["results"][0]["metrics"][0]["value"] == pytest.approx(row["heldout_fitness"])
    assert re.search(rf"\| polished winner +\| +{row['heldout_fitness']:.4f} ", card)
    assert "**The polished winner: the winner, whose recipe follows" in card and "task_arithmetic" in card
    assert card.count("The polished winner was trained on the 36 examples") == 1
    recipe = yaml.safe_load((whole / "mergekit_config.yml").read_text())
    assert recipe["models"] == [{"model": f"{run / 'best' / 'model'}+{run / 'best' / 'adapter'}"}]
    # In another dtype it was not scored.
    output_of("export", Path("run"), tmp_path / "half", "--as", "polished", "--dtype", "float16")
    header, card = read_card(tmp_path / "half")
    assert "model-index" not in header and "Written in float16. It was searched, and scored, in float32" in card
    # A run that is done again trains nothing, and one without the key leaves no adapter.
    assert "nothing to search" in output_of("search", config, "--out", run, "--resume")


def test_a_stage_goes_on_with_the_polished_winner(sums: Family, tmp_path: Path) -> None:
    stage = {"space": {"method": "task_arithmetic"}, "search": {"generations": 20, "population": 4}}
    document = search_config(sums, heldout=0.25, space=None)
    document.pop("search")
    first = stage | {"search": {"then": "polish", **stage["search"]}}
    config = write_yaml(tmp_path / "search.yaml", document | {"stages": [first, stage]})
    output_of("search", config, "--out", tmp_path / "run")
    best = tmp_path / "run" / "stages" / "stage-1" / "best"
    assert (best / "adapter" / "adapter_model.safetensors").is_file()
    assert str(best / "adapter") in (tmp_path / "run" / "best" / "recipe.yaml").read_text()


def test_what_cannot_be_polished(tmp_path: Path, sums: Family) -> None:
    document = search_config(sums, heldout=0.25, search={"then": "polish"}, evaluation={"bank": "disk"})
    config = write_yaml(tmp_path / "search.yaml", document)
    assert_refused(["search.then: polish: an adapter is trained on a model on the device"], "search", config)
    config = write_yaml(tmp_path / "search.yaml", search_config(sums, 1, 2, heldout=0.25))
    output_of("search", config, "--out", tmp_path / "run")
    assert_refused(
        ["--as: polished: is the winner of"], "export", tmp_path / "run", tmp_path / "out", "--as", "polished"
    )
