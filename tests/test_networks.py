"""Networks with batch norms that are measured anew, modules of the user's own, and networks that `evaluate` scores."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import yaml
from helpers.commands import run_here
from helpers.files import read_json, read_lines, write_json
from helpers.models import randomised
from helpers.sampling import sample
from helpers.searches import problem_of
from safetensors.torch import load_file, load_model, save_file, save_model

import evojax_merge as em
from evojax_merge.backends.torch.backend import on_cores
from evojax_merge.backends.torch.folders import open_module
from evojax_merge.backends.torch.network import Network
from evojax_merge.backends.torch.opening import layer_groups
from evojax_merge.errors import InputError
from evojax_merge.evaluation.devices import ONE_DEVICE
from evojax_merge.mergekit.write import group_filters
from evojax_merge.steps.controls import why_no_gradient
from evojax_merge.steps.planning import make_plan
from evojax_merge.steps.selection import open_evaluators
from evojax_merge.system import console as console_module

CLASSES, SIDE = 3, 8
OWN = """
import torch


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.features = torch.nn.Conv2d(1, 4, 3, padding=1)
        self.norm = torch.nn.BatchNorm2d(4)
        self.head = torch.nn.Linear(4, 3)

    def forward(self, pixels):
        return self.head(torch.relu(self.norm(self.features(pixels))).mean((2, 3)))


def make():
    return Net()


def nothing():
    return 1
"""


@pytest.fixture(scope="module")
def nets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """State dicts of a module of the user's own, its file, and arrays. Read only."""
    folder = tmp_path_factory.mktemp("nets")
    (folder / "net.py").write_text(OWN)
    for seed in (1, 2):
        save_file(randomised(made(folder / "net.py"), seed, 0.3).state_dict(), str(folder / f"net{seed}.safetensors"))
    rng = np.random.default_rng(0)
    pixels = rng.normal(1.0, 2.0, (12, 1, SIDE, SIDE)).astype(np.float32)
    np.savez(folder / "arrays.npz", pixels=pixels, label=np.arange(12) % CLASSES)
    return folder


def made(file: Path) -> Any:
    """The module that a file makes."""
    namespace: dict[str, Any] = {}
    exec(file.read_text(), namespace)
    return namespace["make"]()


def document(folder: Path, **changes: Any) -> dict[str, Any]:
    task = {"name": "classes", "kind": "classification", "file": str(folder / "arrays.npz"), "heldout": 0.5,
            "metric": "log_probability"}  # fmt: skip
    return {
        "backend": f"{folder / 'net.py'}:make", "parents": [str(folder / f"net{seed}.safetensors") for seed in (1, 2)],
        "space": {"method": "linear"}, "tasks": [task], "search": {"generations": 2, "population": 3},
    } | changes  # fmt: skip


def log_probability(module: Any, pixels: np.ndarray, labels: np.ndarray) -> float:
    with torch.no_grad():
        scores = module(torch.tensor(pixels)).log_softmax(-1)
    return float(scores.gather(1, torch.tensor(labels)[:, None]).mean())


def test_a_module_of_the_users_own_is_searched_and_exported(nets: Path, tmp_path: Path) -> None:
    config = write_json(tmp_path / "config.yaml", document(nets))
    run_here("search", config, "--out", tmp_path / "run")
    winner = read_json(tmp_path / "run" / "result.json")["table"][-1]
    model = made(nets / "net.py")
    load_model(model, tmp_path / "run" / "best" / "model" / "model.safetensors")
    chosen = np.array(problem_of(config, document(nets)).splits.heldout[0].indices)
    arrays = np.load(nets / "arrays.npz")
    score = log_probability(model.eval(), arrays["pixels"][chosen], arrays["label"][chosen])
    assert winner["heldout_scores"]["classes/log_probability"] == pytest.approx(score, abs=1e-5)


def test_the_module_of_the_guide_has_batch_norms_that_are_measured_anew(tmp_path: Path) -> None:
    page = (Path(__file__).parents[1] / "docs" / "guides" / "any-network.md").read_text(encoding="utf-8")
    code, config = re.findall(r"```(?:python|yaml)\n(.*?)```", page[page.index("## Modules of your own") :], re.DOTALL)
    (tmp_path / "my_network.py").write_text(code)
    (tmp_path / "search.yaml").write_text(config + "search: {generations: 2, population: 3}\n")
    for number, name in enumerate(("first", "second")):
        save_model(randomised(made(tmp_path / "my_network.py"), number, 0.3), str(tmp_path / f"{name}.safetensors"))
    pixels = np.random.default_rng(0).normal(1.0, 2.0, (12, 1, SIDE, SIDE)).astype(np.float32)
    labels = np.arange(12) % CLASSES
    np.savez(tmp_path / "images.npz", input=pixels, label=labels)
    run_here("search", tmp_path / "search.yaml", "--out", tmp_path / "run")
    winner = read_json(tmp_path / "run" / "result.json")["table"][-1]
    run_here("export", tmp_path / "run", tmp_path / "out")
    model = made(tmp_path / "my_network.py")
    load_model(model, tmp_path / "out" / "model.safetensors")
    convolution, norm = model.eval()[:2]
    problem = problem_of(tmp_path / "search.yaml", yaml.safe_load((tmp_path / "search.yaml").read_text()))
    searched, heldout = (np.array(tasks[0].indices) for tasks in (problem.splits.search, problem.splits.heldout))
    with torch.no_grad():
        features = convolution(torch.tensor(pixels[searched]))
        right = (model(torch.tensor(pixels[heldout])).argmax(-1).numpy() == labels[heldout]).mean()
    torch.testing.assert_close(norm.running_mean, features.mean((0, 2, 3)))
    torch.testing.assert_close(norm.running_var, features.var((0, 2, 3)))
    assert winner["heldout_scores"]["classes/accuracy"] == pytest.approx(right)


SCORES = """
import numpy as np
import torch


def by_outputs(records, outputs):
    assert len(outputs) == len(records) and outputs.shape[1:] == (3,)
    return [output[record["label"]] for record, output in zip(records, outputs)]


def by_module(records, module):
    pixels = torch.tensor(np.stack([record["pixels"] for record in records]))
    with torch.no_grad():
        outputs = module(pixels).numpy()
    return by_outputs(records, outputs)


def wrong(records, outputs):
    return outputs
"""


def test_functions_of_the_users_own_score_outputs_and_modules(nets: Path, tmp_path: Path) -> None:
    (tmp_path / "scores.py").write_text(SCORES)
    task = {"kind": "network", "file": str(nets / "arrays.npz"), "heldout": 0.5}
    tasks = [task | {"name": "outputs", "function": "scores.py:by_outputs"},
             task | {"name": "module", "function": "scores.py:by_module", "gets": "module"}]  # fmt: skip
    problem = problem_of(tmp_path / "config.yaml", document(nets, tasks=tasks))
    evaluators, (_, baselines) = open_evaluators(problem, problem.prepare()), problem.space.baselines()
    scores = evaluators.heldout.score(baselines).matrices
    model, arrays = made(nets / "net.py").eval(), np.load(nets / "arrays.npz")
    problem.backend.export("", baselines[0], tmp_path / "out", "---\n---\n", lambda: None)
    load_model(model, tmp_path / "out" / "model.safetensors")
    chosen = np.array(problem.splits.heldout[0].indices)
    with torch.no_grad():
        expected = model(torch.tensor(arrays["pixels"][chosen])).numpy()[range(6), arrays["label"][chosen]]
    for name in ("outputs", "module"):
        np.testing.assert_allclose(scores[name]["score"][0], expected, rtol=1e-5)
    wrong = [task | {"name": "wrong", "function": "scores.py:wrong"}]
    problem = problem_of(tmp_path / "config.yaml", document(nets, tasks=wrong))
    evaluators = open_evaluators(problem, problem.prepare())
    with pytest.raises(Exception, match=r"returned float32\[6, 3\]; expected 6 numbers, one for each record"):
        evaluators.heldout.score(baselines)


def test_the_time_of_a_function_that_is_called_is_measured(nets: Path, tmp_path: Path) -> None:
    """A function that sleeps: the plan has its seconds, for the generations and for the choice of the winner."""
    (tmp_path / "slow.py").write_text(
        "import time\ndef slow(records, module):\n    time.sleep(len(records) / 20)\n    return [1.0] * len(records)\n"
    )
    task = {"name": "slow", "kind": "network", "file": str(nets / "arrays.npz"), "heldout": 0.5,
            "function": "slow.py:slow", "gets": "module"}  # fmt: skip
    problem = problem_of(tmp_path / "config.yaml", document(nets, tasks=[task]))
    plan = make_plan(problem, problem.prepare())
    workers = problem.backend.programs(1, ONE_DEVICE).workers
    assert 0.05 * 6 / workers <= plan.candidate.seconds < 2 * 0.05 * 6
    assert plan.candidate.bound == "the functions that are called, as measured here"
    # What the network computes is in no program of JAX, and not counted.
    assert "FLOP to merge a candidate; " in plan.summary()[1]
    problem = problem_of(tmp_path / "config.yaml", document(nets))
    assert "FLOP for a candidate on all search examples" in make_plan(problem, problem.prepare()).summary()[1]
    assert plan.run_seconds == pytest.approx(plan.run.seconds) and plan.run.seconds > 6 * plan.candidate.seconds
    (time,) = (line for line in plan.lines() if line.startswith("the run takes "))
    assert "(measured here on some examples: JAX does not trace it): the generations " in time
    (note,) = (line for line in plan.notes if line.startswith("slow: "))
    assert re.fullmatch(r"slow: JAX does not trace it; measured here: .* s for a candidate on 6 of the examples", note)


def test_networks_are_evaluated(tmp_path: Path) -> None:
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=SIDE, patch_size=4,
        num_channels=1, num_labels=CLASSES,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    pixels = rng.normal(size=(6, 1, SIDE, SIDE)).astype(np.float32)
    np.savez(tmp_path / "arrays.npz", pixel_values=pixels, label=np.arange(6) % CLASSES)
    tasks = tmp_path / "tasks.yaml"
    section = {"name": "classes", "kind": "classification", "file": "arrays.npz"}
    write_json(tasks, {"tasks": [section]})
    model = randomised(transformers.ViTForImageClassification(config), 1, 0.3)
    model.save_pretrained(tmp_path / "model")
    run_here(
        "evaluate", tmp_path / "model", "--tasks", tasks, "--json", tmp_path / "scores.json", "--samples",
        tmp_path / "samples.jsonl",
    )  # fmt: skip
    with torch.no_grad():
        predicted = model(torch.tensor(pixels)).logits.argmax(-1).numpy()
    right = (predicted == np.arange(6) % CLASSES).astype(float)
    (row,) = read_json(tmp_path / "scores.json")
    assert row["scores"] == {"classes/accuracy": pytest.approx(right.mean())}
    samples = read_lines(tmp_path / "samples.jsonl")
    assert [sample["score"] for sample in samples] == right.tolist()
    # Labels without names are numbers.
    assert [sample["outputs"] for sample in samples] == [[str(label)] for label in predicted]
    assert [sample["target"] for sample in samples] == [str(n % CLASSES) for n in range(6)]


def test_modules_of_the_users_own_are_evaluated(nets: Path, tmp_path: Path) -> None:
    """Files, runs and winners, by a run's config and by a file of tasks that names the backend."""
    config, run, out = tmp_path / "config.yaml", tmp_path / "run", tmp_path / "scores.json"
    run_here("search", write_json(config, document(nets, evaluation={"recalibrate": True})), "--out", run)
    table = read_json(run / "result.json")["table"]
    expected = [table[number]["heldout_scores"]["classes/log_probability"] for number in (-1, -1, 0)]
    models = (run, run / "best" / "model", nets / "net1.safetensors")
    run_here("evaluate", *models, "--tasks", run / "config.yaml", "--split", "heldout", "--json", out)
    scores = [row["scores"]["classes/log_probability"] for row in read_json(out)]
    assert scores == pytest.approx(expected, abs=1e-5)
    # The recipe does not have the batch norms that were measured, and says so; an export measures them again.
    assert (run / "best" / "recipe.yaml").read_text().startswith("# Batch norms were measured anew on the search's")
    assert "```\n\nBatch norms were measured anew" in (run / "best" / "model" / "README.md").read_text()
    written = em.open_run(run).best.export(tmp_path / "again")
    assert (written / "model.safetensors").read_bytes() == (run / "best/model/model.safetensors").read_bytes()
    alone = {"tasks": document(nets)["tasks"], "backend": "net.py:make"}
    (tmp_path / "net.py").write_text(OWN)
    write_json(tmp_path / "tasks.yaml", alone)
    run_here("evaluate", *models, "--tasks", tmp_path / "tasks.yaml", "--json", out)
    model, arrays = made(nets / "net.py").eval(), np.load(nets / "arrays.npz")
    for row, file in zip(read_json(out), (models[1] / "model.safetensors",) * 2 + models[2:], strict=True):
        load_model(model, file)
        score = log_probability(model, arrays["pixels"], arrays["label"])
        assert row["scores"]["classes/log_probability"] == pytest.approx(score, abs=1e-5)
    write_json(tmp_path / "tasks.yaml", {"tasks": alone["tasks"]})
    refused = run_here("evaluate", run, "--tasks", tmp_path / "tasks.yaml", status=2)
    assert "own modules need backend: FILE.py:NAME" in refused.stderr


SEQUENTIAL = """
import torch


def make():
    deeper = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    layers = [torch.nn.Linear(4, 4) for _ in range(10)]
    return torch.nn.Sequential(*layers, deeper, torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 3))
"""


@pytest.mark.parametrize(
    ("method", "together", "groups"),
    sample(
        [
            ("slerp", 1, (*map(str, range(10)), "10.0", "10.1", "11", "12")),
            ("linear", 3, ("0-2", "3-5", "6-8", "9-11", "10.0-2", "12-14")),
            ("task_arithmetic", "all", ("top level", "10")),
        ],
        1,
    ),
)
def test_a_sequential_is_grouped_by_its_modules_and_its_recipe_gives_the_winner(
    method: str, together: int | str, groups: tuple[str, ...], tmp_path: Path
) -> None:
    own, files = tmp_path / "own.py", [str(tmp_path / f"own{seed}.safetensors") for seed in (1, 2, 3)]
    own.write_text(SEQUENTIAL)
    for seed, file in enumerate(files):
        save_model(randomised(made(own), seed, 0.3), file)
    rng, labels = np.random.default_rng(0), np.arange(12) % CLASSES
    np.savez(tmp_path / "arrays.npz", input=rng.normal(size=(12, 4)).astype(np.float32), label=labels)
    changes: dict[str, Any] = {"backend": f"{own}:make", "parents": files[:2]}
    changes |= {"space": {"method": method, "layers_per_group": together}}
    changes |= {"base": files[2]} if method == "task_arithmetic" else {}
    changes["search"] = {"strategy": "cma_es", "generations": 2, "population": 3}
    problem = problem_of(tmp_path / "config.yaml", document(tmp_path, **changes))
    assert set(problem.space.groups) == set(groups)
    run = tmp_path / "run"
    run_here("search", write_json(tmp_path / "config.yaml", document(tmp_path, **changes)), "--out", run)
    merged = run_here("merge", run / "best" / "recipe.yaml", tmp_path / "again")
    written, again = (folder / "model.safetensors" for folder in (run / "best" / "model", tmp_path / "again"))
    assert written.read_bytes() == again.read_bytes()
    assert "ignored" not in merged.stdout + merged.stderr


def test_a_recipe_of_a_random_method_draws_the_masks_of_the_search(nets: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"base": str(nets / "net1.safetensors"), "seed": 3}
    space = {"method": "dare_linear", "fixed": {"density": 0.5}}
    for seed in (3, 4):
        save_file(randomised(made(nets / "net.py"), seed, 0.3).state_dict(), str(tmp_path / f"net{seed}.safetensors"))
    changes["parents"] = [str(tmp_path / f"net{seed}.safetensors") for seed in (3, 4)]
    run = tmp_path / "run"
    run_here("search", write_json(tmp_path / "config.yaml", document(nets, space=space, **changes)), "--out", run)
    run_here("merge", run / "best" / "recipe.yaml", tmp_path / "again")
    written, again = (
        load_file(folder / "model.safetensors") for folder in (run / "best" / "model", tmp_path / "again")
    )
    for name, tensor in written.items():
        np.testing.assert_allclose(again[name], tensor, atol=1e-6, err_msg=name)


def test_the_groups_of_a_sentence_transformer_are_those_of_its_deeper_lists() -> None:
    names = ["0.auto_model.embeddings.word.weight", "0.auto_model.encoder.layer.3.dense.weight", "2.linear.weight"]
    assert [layer_groups(2)(name) for name in names] == ["0-1", "0.auto_model.encoder.layer.2-3", "2-3"]


def test_filters_of_groups_mean_every_tensor_even_where_names_are_parts_of_others() -> None:
    names = ["0.weight", "1.0.weight", "1.1.weight", "10.weight", "pre_head.weight", "head.weight", "0.0.weight"]
    for groups in ([0, 1, 1, 2, 3, 4, 1], [0, 1, 0, 1, 0, 1, 0], [0] * 7):
        filters = group_filters(names, groups)
        assert [next(group for text, group in filters if text in name) for name in names] == groups


@pytest.mark.parametrize("name", ["image", "text", "audio"])
def test_an_array_may_have_any_name(name: str, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        "import torch\n\n\nclass Net(torch.nn.Linear):\n"
        f"    def forward(self, {name}):\n        return super().forward({name})\n\n\n"
        "def make():\n    return Net(4, 3)\n"
    )
    for seed in (1, 2):
        save_model(randomised(made(tmp_path / "own.py"), seed, 0.3), str(tmp_path / f"own{seed}.safetensors"))
    rows, labels = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32), np.arange(8) % CLASSES
    np.savez(tmp_path / "arrays.npz", label=labels, **{name: rows})
    task = {"name": "classes", "kind": "classification", "file": "arrays.npz", "metric": "log_probability"}
    parents = ["own1.safetensors", "own2.safetensors"]
    problem = problem_of(
        tmp_path / "config.yaml", document(tmp_path, backend="own.py:make", parents=parents, tasks=[task])
    )
    (prepared,) = problem.prepare().search
    np.testing.assert_array_equal(prepared.rows[0]["inputs"][name], rows[np.array(problem.splits.search[0].indices)])


def test_candidates_that_are_called_share_the_cores() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        seen = on_cores(lambda genome: (genome, torch.get_num_threads()), [1, 2], workers=2)
        assert seen == [(1, 2), (2, 2)]
        assert on_cores(lambda genome: genome + 1, [1, 2, 3], workers=1) == [2, 3, 4]
        with pytest.raises(ZeroDivisionError):
            on_cores(lambda genome: 1 / genome, [1, 0], workers=2)
    finally:
        torch.set_num_threads(threads)


def test_state_dicts_that_do_not_fit_are_named(nets: Path, tmp_path: Path) -> None:
    state = made(nets / "net.py").state_dict()
    save_file(
        {name: tensor for name, tensor in state.items() if name != "head.bias"}, str(tmp_path / "less.safetensors")
    )
    save_file(state | {"more": torch.ones(1)}, str(tmp_path / "more.safetensors"))
    save_file(state | {"head.bias": torch.ones(2)}, str(tmp_path / "other.safetensors"))
    for file, prefix in (("parallel", "module."), ("compiled", "_orig_mod."), ("both", "module._orig_mod.")):
        prefixed = {f"{prefix}{name}": tensor for name, tensor in state.items()}
        save_file(prefixed, str(tmp_path / f"{file}.safetensors"))
    torch.save(state, tmp_path / "net.pt")
    (tmp_path / "pickled").mkdir()
    torch.save(state, tmp_path / "pickled" / "pytorch_model.bin")
    cases = {
        "less.safetensors": r"less.safetensors: lacks head.bias; expected the state dict of .*net.py:make's module",
        "more.safetensors": r"more.safetensors: has, and the module has not, more;",
        "other.safetensors": r"other.safetensors: does not fit .*size mismatch for head.bias",
        "parallel.safetensors": r"parallel.safetensors: lacks .*; its names begin with 'module\.', which DataParallel",
        "compiled.safetensors": r"compiled.safetensors: lacks .*; its names begin with '_orig_mod\.', which",
        "both.safetensors": r"both.safetensors: lacks .*; its names begin with 'module\._orig_mod\.', which",
        "net.pt": r"net.pt: expected a .safetensors file of a state dict: reading a pickled one would run its code",
        "pickled": r"pickled: pytorch_model.bin: is pickled, and reading it would run its code; expected safetensors",
    }
    for name, message in cases.items():
        parents = [str(nets / "net1.safetensors"), str(tmp_path / name)]
        with pytest.raises(InputError, match=message):
            problem_of(tmp_path / "config.yaml", document(nets, parents=parents))


@pytest.mark.parametrize(("stored", "named"), [("bfloat16", "float32"), ("float32", "bfloat16"), ("float32", None)])
def test_a_network_has_the_dtype_of_its_files(stored: str, named: str | None, tmp_path: Path) -> None:
    """A merge of the winner's recipe reads the files: the search has to score the same numbers."""
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=SIDE, patch_size=4
    )
    model = transformers.ViTForImageClassification(config).to(getattr(torch, stored))
    model.save_pretrained(tmp_path)
    settings = read_json(tmp_path / "config.json") | {"dtype": named}
    write_json(tmp_path / "config.json", {key: value for key, value in settings.items() if value is not None})
    weights = open_module(tmp_path).state_dict()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(weights[name], tensor, rtol=0, atol=0)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod."])
def test_folders_of_wrapped_models_are_named(prefix: str, tmp_path: Path) -> None:
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=SIDE, patch_size=4
    )
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    save_file({f"{prefix}{name}": tensor for name, tensor in state.items()}, tmp_path / "model.safetensors",
              {"format": "pt"})  # fmt: skip
    with pytest.raises(InputError, match=rf"lacks \d+ tensors of ViT.*; its names begin with '{re.escape(prefix)}'"):
        open_module(tmp_path)


@pytest.mark.parametrize(
    ("backend", "message"),
    [
        ("net.py:mak", r"backend: net.py has no 'mak' \(did you mean 'make'\?\)"),
        ("net.py:", r"backend: net.py has no '' \(known: Net, make, nothing\)"),
        ("net:mak", r"backend: net has no 'mak' \(did you mean 'make'\?\)"),
        ("nets.py:make", r"backend: nets.py: no such file"),
        ("needs.py:Net", r"backend: needs.py:Net is called without arguments \(missing a required argument: 'width'"),
        ("wrong.py:make", r"backend: wrong.py cannot be imported \(line 1: ZeroDivisionError"),
        (":make", r"backend:  cannot be imported \(ValueError"),
    ],
)
def test_names_of_backends_that_are_not_there(backend: str, message: str, nets: Path, tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(OWN)
    (tmp_path / "needs.py").write_text("class Net:\n    def __init__(self, width):\n        pass\n")
    (tmp_path / "wrong.py").write_text("1 / 0\n")
    with pytest.raises(InputError, match=message):
        problem_of(tmp_path / "config.yaml", document(nets, backend=backend))


def test_what_a_module_cannot_do_is_named(nets: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"backend: .*net.py:nothing returned 1; expected a torch.nn.Module"):
        problem_of(tmp_path / "config.yaml", document(nets, backend=f"{nets / 'net.py'}:nothing"))
    arrays = np.load(nets / "arrays.npz")
    np.savez(tmp_path / "arrays.npz", pixels=arrays["pixels"], label=arrays["label"] + 1)
    task = {"name": "classes", "kind": "classification", "file": str(tmp_path / "arrays.npz")}
    with pytest.raises(InputError, match=r"tasks\[0\]: classes: label 3; Net has 3 labels"):
        problem_of(tmp_path / "config.yaml", document(nets, tasks=[task])).prepare()


def test_no_batch_norm_is_measured_where_there_is_none(tmp_path: Path) -> None:
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=SIDE, patch_size=4
    )
    for seed in (1, 2):
        randomised(transformers.ViTForImageClassification(config), seed, 0.3).save_pretrained(tmp_path / f"model{seed}")
    task = {"name": "classes", "kind": "classification", "file": "arrays.npz"}
    search = {
        "backend": "torch", "parents": ["model1", "model2"], "space": {"method": "linear"}, "tasks": [task],
        "evaluation": {"recalibrate": True},
    }  # fmt: skip
    np.savez(tmp_path / "arrays.npz", pixel_values=np.zeros((4, 3, SIDE, SIDE), np.float32), label=np.zeros(4, int))
    with pytest.raises(InputError, match=r"evaluation.recalibrate: ViTForImageClassification has no batch norm"):
        problem_of(tmp_path / "config.yaml", search)
    with pytest.raises(InputError, match=r"evaluation.recalibrate: language models have no batch norms"):
        problem_of(tmp_path / "config.yaml", search | {"backend": "decoder"})


def test_auto_follows_no_gradient_where_batch_norms_are_measured(nets: Path, tmp_path: Path) -> None:
    changes = {"evaluation": {"recalibrate": True}, "search": {"strategy": "auto", "generations": 2}}
    problem = problem_of(tmp_path / "config.yaml", document(nets, **changes))
    assert problem.strategy.name == "cma_es"
    assert problem.prepare().search[0].size == 6


@pytest.mark.parametrize("why", ["", "JAX does not trace the model"])
def test_adapters_keep_the_batch_norms_of_their_model(
    why: str, nets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if why:
        monkeypatch.setattr("evojax_merge.backends.torch.network.torchax_environment", lambda: (None, "is missing"))
    search = {"generations": 2, "population": 3, "strategy": "cma_es", "controls": ["lora"]}
    changes = {"evaluation": {"recalibrate": True}, "search": search}
    problem = problem_of(tmp_path / "config.yaml", document(nets, **changes))
    on = open_evaluators(problem, problem.prepare())
    assert why_no_gradient(problem, on) == why
    # JAX prints what it compiles; arrays in it would take longer than an evaluation.
    assert "array(" not in repr(problem.backend.merge)
    monkeypatch.delattr(Network, "measured")
    change = problem.backend.adaptable(problem.parents[1], [on.heldout, *on.tuning], 2, 1.0)
    unchanged = change.layout.start(0)[None]
    scores = [one.evaluate(unchanged).matrices["classes"]["log_probability"][0] for one in change.evaluators]
    model, arrays = made(nets / "net.py"), np.load(nets / "arrays.npz")
    load_model(model, nets / "net2.safetensors")
    for row, tasks in zip(scores, (problem.splits.heldout, *problem.splits.tuning), strict=True):
        chosen = np.array(tasks[0].indices)
        score = log_probability(model.eval(), arrays["pixels"][chosen], arrays["label"][chosen])
        assert row.mean() == pytest.approx(score, abs=1e-5)


def test_python_opens_networks_without_a_line(
    nets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console_module, "_PRINTED", set())
    config = document(nets)
    models = em.load_models(None, config["parents"], backend=config["backend"])
    space = em.MergeSpace(models, "linear")
    study = em.Study(models, space, config["tasks"], out=tmp_path / "run", strategy="cma_es", population=3)
    study.run(2)
    assert em.open_run(tmp_path / "run").best.recipe["merge_method"] == "linear"
    assert capsys.readouterr().out == ""


def test_uniform_scores_are_those_of_one_candidate_at_a_time(nets: Path, tmp_path: Path) -> None:
    problem = problem_of(tmp_path / "config.yaml", document(nets, evaluation={"recalibrate": True}))
    evaluators = open_evaluators(problem, problem.prepare())
    genomes = np.random.default_rng(0).normal(size=(3, problem.space.dims)).astype(np.float32)
    together = evaluators.heldout.score(genomes).matrices["classes"]["log_probability"]
    alone = [evaluators.heldout.score(genome[None]).matrices["classes"]["log_probability"][0] for genome in genomes]
    np.testing.assert_allclose(together, alone, rtol=1e-6)
