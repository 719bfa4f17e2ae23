"""Mixtures of experts as a space: what is scored, what is exported, and what is refused."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import transformers
import yaml
from helpers.commands import assert_refused, run_here
from helpers.families import build_family
from helpers.files import read_json, read_lines, write_lines, write_yaml
from helpers.models import CONFIGS, even_records, tiny_config
from helpers.sampling import sample, thorough
from helpers.searches import open_problem, search_config, task_section
from hostile import run_python, start_command
from test_devices import MESH_PROGRAM

from evojax_merge.checkpoints.folder import read_header
from evojax_merge.mergekit.gates import router_rows
from evojax_merge.spaces.mixture import MixtureSpace
from evojax_merge.steps.selection import open_evaluators

CONFIGS["phi3"] = transformers.Phi3Config
PROMPTS = {"parent0": ["w4 w5 w6", "w7 w8"], "parent1": ["w20 w21 w22 w23", "w24"]}
NEGATIVE = {"parent1": ["w60 w61"]}
NEW = 4
TASKS = [
    task_section(heldout="heldout.jsonl"),
    {"name": "words", "kind": "exact_match", "file": "tasks.jsonl", "heldout": "heldout.jsonl", "weight": 0.0,
     "max_new_tokens": NEW, "pattern": "^(.+)$"},
]  # fmt: skip


def mixture_config(generations: int = 2, **changes: Any) -> dict[str, Any]:
    section = {"positive_prompts": PROMPTS, "negative_prompts": NEGATIVE} | changes.pop("mixture", {})
    return search_config(
        None, generations, 6, space=None, mixture=section, tasks=TASKS, seed=3, **{"search": {"finalists": 2}} | changes
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Llamas: a base and two fine-tunes."""
    folder = tmp_path_factory.mktemp("llamas")
    build_family(folder)
    write_lines(folder / "heldout.jsonl", even_records(8, seed=2))
    write_yaml(folder / "config.yaml", mixture_config())
    return folder


@pytest.fixture(scope="module")
def finished(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    run_here("search", root / "config.yaml", "--out", out)
    return out


def answers_alone(folder: Path, file: Path) -> dict[str, Any]:
    """transformers' answers, from a process without this package."""
    program = [sys.executable, Path(__file__).parent / "reference/text_scores.py", folder, file, str(NEW)]
    done = subprocess.run(program, capture_output=True, text=True, check=True)
    answers: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answers


def assert_exported_as_scored(run: Path, file: Path, atol: float = 1e-4) -> dict[str, Any]:
    """The winner's row of the held-out table, and its answers, are transformers' of the exported folder."""
    winner = read_json(run / "result.json")["table"][-1]
    alone = answers_alone(run / "best/model", file)
    assert winner["role"] == "winner"
    np.testing.assert_allclose(winner["heldout_scores"]["text/log_probability"], np.mean(alone["scores"]), atol=atol)
    rows = [row for row in read_lines(run / "heldout_answers.jsonl") if row["model"].startswith("evolved")]
    texts = [row["outputs"] for row in rows if row["task"] == "words"]
    assert texts and texts == [[text] if isinstance(texts[0], list) else text for text in alone["texts"]][: len(texts)]
    return alone


# ---------------------------------------------------------------------------------------------------------------
# What is scored is what is exported


def test_the_winner_is_a_mixtral_that_transformers_scores_equally(finished: Path, root: Path) -> None:
    alone = assert_exported_as_scored(finished, root / "heldout.jsonl")
    assert alone["model_type"] == "mixtral"
    roles = [row["role"] for row in read_json(finished / "result.json")["table"]]
    assert roles == ["base", "parent", "parent", "plain", "winner"]


def test_recipe_and_export_give_the_winner_bit_for_bit(finished: Path, tmp_path: Path) -> None:
    run_here("moe", finished / "best/recipe.yaml", tmp_path / "again")
    run_here("export", finished, tmp_path / "exported")
    winner = finished / "best/model"
    for folder in (tmp_path / "again", tmp_path / "exported"):
        assert (folder / "model.safetensors").read_bytes() == (winner / "model.safetensors").read_bytes()
        assert (folder / "config.json").read_bytes() == (winner / "config.json").read_bytes()
    assert (tmp_path / "exported/README.md").read_bytes() == (winner / "README.md").read_bytes()
    run_here("export", finished, tmp_path / "half", "--dtype", "bfloat16")
    assert str(read_header(tmp_path / "half/model.safetensors")["model.norm.weight"].dtype) == "bfloat16"


VARIANTS: dict[str, dict[str, Any]] = {
    "Qwen3, bfloat16, more places than models": {
        "kind": "qwen3", "export_dtype": "bfloat16", "mixture": {"slots": 4, "experts_per_token": 3},
    },
    "Mistral, fewer places than models, one expert a token": {
        "kind": "mistral", "base": None, "mixture": {"slots": 2, "experts_per_token": 1, "layers_per_group": 2,
                                                    "gate_input": "normed"},
    },
    "Phi-3, the base is an expert, random gates": {
        "kind": "phi3", "mixture": {"experts": ["parent1", "base", "parent0"], "gate_mode": "random",
                                     "layers_per_group": "all"},
    },
}  # fmt: skip


@thorough
@pytest.mark.parametrize("name", sample(VARIANTS, 1))
def test_other_mixtures_are_exported_as_they_were_scored(name: str, tmp_path: Path) -> None:
    changes = dict(VARIANTS[name])
    build_family(tmp_path, tiny_config(changes.pop("kind")))
    write_lines(tmp_path / "heldout.jsonl", even_records(8, seed=2))
    config = write_yaml(tmp_path / "config.yaml", mixture_config(1, **changes))
    run_here("search", config, "--out", tmp_path / "run")
    # A bfloat16 model is computed in float32 by both.
    assert_exported_as_scored(tmp_path / "run", tmp_path / "heldout.jsonl")
    document = yaml.safe_load((tmp_path / "run/best/recipe.yaml").read_text())
    slots = changes["mixture"].get("slots", 3)
    assert {len(layer["experts"]) for layer in document["layers"]} == {slots}
    assert read_json(tmp_path / "run/best/model/config.json").get("dtype") == changes.get("export_dtype", "float32")


def test_every_genome_is_scored_as_its_export(root: Path, tmp_path: Path) -> None:
    """Also with dense layers; and chunks of candidates that share a pass have the scores of each alone."""
    problem = open_problem(root / "config.yaml")
    on = open_evaluators(problem, problem.prepare())
    genomes = np.random.default_rng(0).uniform(-0.2, 1.2, (5, problem.space.dims)).astype(np.float32)
    mixtures = problem.space.decode(genomes)
    is_dense = (mixtures.experts == mixtures.experts[..., :1]).all(axis=-1)
    assert 0 < is_dense.sum() < is_dense.size
    scores = on.heldout.score(genomes)
    on.heldout.evaluator.evaluator.chunk = 3
    on.heldout.evaluator.evaluator.chunk_sizes.clear()
    together = on.heldout.score(genomes)
    matrix = scores.matrices["text"]["log_probability"]
    np.testing.assert_allclose(together.matrices["text"]["log_probability"], matrix, atol=1e-5)
    assert together.outputs == scores.outputs
    for genome, row in list(zip(genomes, matrix, strict=True))[: len(sample((1, 2), 1))]:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        problem.backend.export(problem.backend.describe(genome).recipe, genome, folder, "", lambda: None)
        np.testing.assert_allclose(row, answers_alone(folder, root / "heldout.jsonl")["scores"], atol=1e-4)


# ---------------------------------------------------------------------------------------------------------------
# What a genome means


def test_the_search_begins_with_the_gates_of_moe(root: Path, tmp_path: Path) -> None:
    """The start is mergekit-moe's mixture: its gates less what they have in common, which chooses no expert."""
    problem = open_problem(root / "config.yaml")
    heldout = open_evaluators(problem, problem.prepare()).heldout
    experts = [
        {"source_model": str(root / name), "positive_prompts": PROMPTS[name]}
        | ({"negative_prompts": NEGATIVE[name]} if name in NEGATIVE else {})
        for name in PROMPTS
    ]
    document = {"base_model": str(root / "base"), "dtype": "float32", "experts": experts}
    run_here("moe", write_yaml(tmp_path / "moe.yaml", document), tmp_path / "plain")
    scored = heldout.score(problem.space.start[None]).matrices["text"]["log_probability"][0]
    np.testing.assert_allclose(scored, answers_alone(tmp_path / "plain", root / "heldout.jsonl")["scores"], atol=1e-4)


def test_a_dense_model_is_one_of_the_candidates(root: Path) -> None:
    """Where all layers are dense, of the base's MLPs, the mixture is the base."""
    document = mixture_config(base=None, mixture={"experts_per_token": 2})
    problem = open_problem(write_yaml(root / "dense.yaml", document))
    heldout = open_evaluators(problem, problem.prepare()).heldout
    genomes = problem.space.seed_genomes("", "parents")
    scored = heldout.score(genomes).matrices["text"]["log_probability"]
    expected = answers_alone(root / "parent0", root / "heldout.jsonl")["scores"]
    np.testing.assert_allclose(scored[0], expected, atol=1e-4)
    assert np.abs(scored[1] - expected).max() > 1e-2


def test_routers_are_the_formula(root: Path) -> None:
    rng = np.random.default_rng(0)
    gates = rng.normal(size=(3, 4, 8)).astype(np.float32)
    experts, scale, bias = rng.integers(0, 4, (2, 3, 5)), rng.uniform(0.1, 9, (2, 3, 5)), rng.normal(size=(2, 3, 5))
    rows = router_rows(gates, experts, scale, bias)
    for place in np.ndindex(experts.shape):
        layer = gates[place[1]].astype(np.float64)
        mean = sum(layer) / 4
        expected = scale[place] * (layer[experts[place]] - mean) + bias[place] * mean / np.sqrt(mean @ mean)
        np.testing.assert_allclose(rows[place], expected, rtol=1e-5, atol=1e-6)


def test_genomes_reach_every_value() -> None:
    space = MixtureSpace(5, 2, 3, 4, ("scale", "bias", "experts", "dense"), (0.25, 8.0), 2.0)
    assert space.dims == 3 * 13 and space.groups == ["layers 0-1", "layers 2-3", "layer 4"]
    start = space.decode(space.start[None])
    assert (start.scale == 1).all() and (start.bias == 0).all() and (start.experts == [0, 1, 2, 0]).all()
    drawn = space.decode(np.random.default_rng(0).uniform(-0.05, 1.05, (2000, space.dims)))
    mixed = (drawn.experts != drawn.experts[..., :1]).any(axis=-1)
    assert 0.3 < mixed.mean() < 0.6
    assert (drawn.scale[~mixed] == 0).all() and (drawn.bias[~mixed] == 0).all()
    scale, bias = drawn.scale[mixed], drawn.bias[mixed]
    assert 0.25 <= scale.min() < 0.26 and 7.8 < scale.max() <= 8 and -2 <= bias.min() < -1.9 and 1.9 < bias.max() <= 2
    assert set(drawn.experts.ravel().tolist()) == {0, 1, 2}
    assert (drawn.experts[:, 0] == drawn.experts[:, 1]).all() and (drawn.scale[:, 2] == drawn.scale[:, 3]).all()
    parents = space.decode(space.seed_genomes("", "parents"))
    assert (parents.experts == np.arange(3)[:, None, None]).all()


# ---------------------------------------------------------------------------------------------------------------
# A run


def test_no_candidate_is_assembled(root: Path) -> None:
    """The devices hold the base and each expert's MLPs once, and a candidate is a few rows."""
    problem = open_problem(root / "config.yaml")
    heldout = open_evaluators(problem, problem.prepare()).heldout
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(heldout.evaluator.bank))
    tensors = {name: read_header(root / name / "model.safetensors") for name in ("base", *PROMPTS)}

    def nbytes(name: str, is_mlp: bool) -> int:
        return sum(4 * int(np.prod(t.shape)) for tensor, t in tensors[name].items() if (".mlp." in tensor) == is_mlp)

    assert held == nbytes("base", False) + sum(nbytes(name, True) for name in PROMPTS)
    assert held == problem.backend.candidates.loaded_bytes() == problem.backend.planner().sizes.held
    genomes = np.zeros((7, problem.space.dims), np.float32)
    (population,) = heldout.evaluator.populations(
        heldout.evaluator.evaluator, heldout.evaluator.bank, problem.space.decode(genomes)
    )
    assert {name: leaf.shape for name, leaf in population.candidates.items()} == {
        "router": (7, 3, 2, 48), "slots": (7, 3, 2),
    }  # fmt: skip
    assert population.model_shape() is None


def contents(run: Path) -> dict[str, bytes]:
    names = ("history.jsonl", "result.json", "config.yaml", "best/recipe.yaml", "best/model/model.safetensors")
    return {name: (run / name).read_bytes() for name in names}


@thorough
def test_killed_and_resumed_is_as_never_stopped(root: Path, tmp_path: Path) -> None:
    config = write_yaml(root / "likelihood.yaml", mixture_config(5) | {"tasks": TASKS[:1]})
    run_here("search", config, "--out", tmp_path / "whole")
    out = tmp_path / "killed"
    process = start_command("search", config, "--out", out)
    history = out / "history.jsonl"
    while not history.exists() or history.read_bytes().count(b"\n") < 2:
        assert process.poll() is None, process.read("stderr")
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / "result.json").exists()
    run_here("export", out, tmp_path / "so far", "--best-so-far")
    assert read_json(tmp_path / "so far/config.json")["model_type"] == "mixtral"
    run_here("search", config, "--out", out, "--resume")
    assert contents(out) == contents(tmp_path / "whole")


def test_plans(root: Path, tmp_path: Path) -> None:
    for target in ("h100", "v5e-8"):
        run_here("plan", root / "config.yaml", "--target", target, "--json", tmp_path / f"{target}.json")
        (plan,) = read_json(tmp_path / f"{target}.json")
        assert plan["fits"]


def test_devices_share_candidates_and_models(root: Path, tmp_path: Path) -> None:
    """A mesh of devices gives the scores of one; the MLPs are cut along the axis `model`."""
    meshes, out = [(1, 1), (2, 2), (1, 2)], tmp_path / "scores.npz"
    config = root / "config.yaml"
    run_python(MESH_PROGRAM, config, json.dumps(meshes), json.dumps([1]), out)
    with np.load(out) as arrays:
        for name in (name for name in arrays if name.startswith(("2x2", "1x2"))):
            expected = arrays["1x1/1" + name[5:]]
            if expected.dtype.kind == "f":
                np.testing.assert_allclose(arrays[name], expected, atol=1e-4)
            else:
                assert (arrays[name] == expected).mean() > 0.9


# ---------------------------------------------------------------------------------------------------------------
# Bad input

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "host": ({"evaluation": {"bank": "host"}}, "evaluation.bank: host; the weights that mixtures share are on the"),
    "disk": ({"evaluation": {"bank": "disk"}}, "evaluation.bank: disk; the weights that mixtures share are on the"),
    "tokenizer": ({"tokenizer_source": "base"}, "tokenizer_source: a mixture has the base's tokens"),
    "expert": ({"mixture": {"experts": ["parent0", "parent3"]}}, "mixture: experts: 'parent3' is none of the parents"),
    "twice": ({"mixture": {"experts": ["parent0", "parent0"]}}, "mixture: experts: 'parent0' stands twice"),
    "prompts of nobody": ({"mixture": {"positive_prompts": PROMPTS | {"parnt1": ["w4"]}}},
                          "mixture: positive_prompts: 'parnt1' is none of the experts (did you mean 'parent1'?)"),
    "no prompts": ({"mixture": {"positive_prompts": {"parent0": ["w4"]}}},
                   "mixture: positive_prompts: 'parent1' has none"),
    "too many a token": ({"mixture": {"experts_per_token": 3}}, "experts_per_token: 3, of 2 experts in a layer"),
    "bounds": ({"mixture": {"scale_low": 1.0, "scale_high": 1.0}}, "expected bounds around 1"),
    "seeds": ({"search": {"seeds": ["uniform"]}}, "seeds: uniform: a mixture is no merge of weights"),
    "gradients": ({"search": {"strategy": "gradient"}}, "search.strategy: its candidates have no gradients"),
    "two kinds": ({"space": {"method": "linear"}}, "expected exactly one of the keys space, data_flow, pool, mixture"),
    "a stage": ({"mixture": None, "search": ..., "stages": [{"mixture": {}}]}, "stages[0]"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_searched_is_refused(name: str, root: Path, tmp_path: Path) -> None:
    changes, says = REFUSED[name]
    changes = dict(changes)
    mixture = changes.pop("mixture", {})
    document = mixture_config(mixture=mixture or {}) | changes
    if mixture is None:
        del document["mixture"]
    document = {key: value for key, value in document.items() if value is not ...}
    config = write_yaml(root / f"refused {name}.yaml", document)
    assert_refused([says], "search", config, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_no_export_can_be_is_refused(finished: Path, tmp_path: Path) -> None:
    for options in (("--as", "adapter", "--rank", 2), ("--dtype", "float8_e4m3")):
        assert_refused(["a mixture is exported as a folder"], "export", finished, tmp_path / "out", *options)
    assert_refused(["a GGUF file: a mixture is exported"], "export", finished, tmp_path / "out.gguf")


LAYERS: dict[str, tuple[Any, str]] = {
    "too few": (lambda layers: layers[:2], "layers: 2, and the models have 3"),
    "no such expert": (lambda layers: [layers[0], layers[1] | {"experts": [0, 2]}, layers[2]],
                       "layers.1.experts: 2; expected numbers from 0 to 1"),
    "unlike": (lambda layers: [*layers[:2], layers[2] | {"scale": [1.0]}], "layers.2.scale: 1 of them; expected 2"),
    "unknown key": (lambda layers: [layers[0] | {"scales": [1.0, 1.0]}, *layers[1:]], "scales"),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
def test_layers_of_a_recipe_that_do_not_fit_are_refused(name: str, finished: Path, tmp_path: Path) -> None:
    change, says = LAYERS[name]
    document = yaml.safe_load((finished / "best/recipe.yaml").read_text())
    document["layers"] = change(document["layers"])
    assert_refused([says], "moe", write_yaml(tmp_path / "moe.yaml", document), tmp_path / "out")
