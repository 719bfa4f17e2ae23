"""Tasks without labels: entropies of answers against transformers, their gradients against differences, and searches on
them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from helpers.commands import run_here
from helpers.decoders import differentiate_merges
from helpers.families import Family
from helpers.files import read_json, read_lines, write_json, write_lines, write_yaml
from helpers.models import load_torch, random_records, randomised, word_tokenizer, words
from helpers.sampling import sample
from helpers.searches import problem_of, search_config, task_section
from PIL import Image
from reference.torch_models import torch_logits, torch_logprobs
from test_embeddings import clips, document  # noqa: F401
from test_evaluator import Setting, behind_header
from test_gradients import assert_gradients_close, differences
from test_torch_backend import PREPROCESSOR, has_torchax

from evojax_merge.config.documents import parse
from evojax_merge.config.search_config import TaskFile
from evojax_merge.errors import InputError
from evojax_merge.models.bank import take_candidate
from evojax_merge.steps.selection import open_evaluators
from evojax_merge.tasks.entropy import EntropyTask
from evojax_merge.tasks.opening import open_whole_task

RECORDS = random_records(7, seed=3)
CHOICES = ["w5", "w6 w7", "w40"]


def task_of(folder: Path, records: list[dict[str, Any]] | None = None, **keys: Any) -> Any:
    """The task of a section, on all records."""
    unlabelled = [{key: record[key] for key in ("prompt", "choices")} for record in records or RECORDS]
    write_lines(folder / "prompts.jsonl", unlabelled)
    section = {"name": "sure", "kind": "entropy", "file": "prompts.jsonl", **keys}
    return open_whole_task("tasks[0]", parse(Path("tasks.yaml"), {"tasks": [section]}, TaskFile).tasks[0], folder)


def negative_entropies(logits: Any) -> np.ndarray:
    """float64[…]: minus the entropies of the distributions of logits [..., V]."""
    logs = torch.log_softmax(torch.as_tensor(logits).double(), -1)
    return (logs.exp() * logs).sum(-1).numpy()


def numbers(text: str) -> list[int]:
    return [int(word[1:]) for word in text.split()]


@pytest.mark.parametrize("positions", sample([1, 3, 1000], 1))
def test_the_entropy_of_the_next_token_is_that_of_transformers(positions: int, family: Family, tmp_path: Path) -> None:
    """Also behind a header that all prompts share, and of prompts that are shorter than the positions."""
    model, setting = load_torch(family.base), Setting(family, "task_arithmetic")
    for task in (task_of(tmp_path, positions=positions), behind_header(task_of(tmp_path, positions=positions), 40)):
        expected = []
        for example in task.examples:
            logits = torch_logits(model, np.array([numbers(example.prompt)]))[0, -positions:]
            expected.append(negative_entropies(logits).mean())
        recipes = replace_weights(setting, 0.0)
        scores = setting.evaluator([task]).score(setting.evaluator([task]).merges(setting.bank, setting.spec, recipes))
        np.testing.assert_allclose(scores.matrices["sure"]["negative_entropy"][0], expected, rtol=1e-4)


def replace_weights(setting: Setting, weight: float) -> Any:
    """Recipes whose weights are all the same; with 0 a candidate is the base."""
    import jax

    return jax.tree.map(lambda leaf: np.full_like(leaf, weight), setting.recipes)


@pytest.mark.parametrize("choices", sample(["choices", CHOICES], 1))
def test_the_entropy_of_choices_is_that_of_transformers(choices: Any, family: Family, tmp_path: Path) -> None:
    model, setting, expected = load_torch(family.base), Setting(family, "task_arithmetic"), []
    task = task_of(tmp_path, choices=choices)
    for record in RECORDS:
        listed = record["choices"] if choices == "choices" else choices
        prompt = numbers(record["prompt"])
        expected.append(negative_entropies([torch_logprobs(model, prompt, numbers(text)).sum() for text in listed]))
    evaluator = setting.evaluator([task])
    scores = evaluator.score(evaluator.merges(setting.bank, setting.spec, replace_weights(setting, 0.0)))
    np.testing.assert_allclose(scores.matrices["sure"]["negative_entropy"][0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("keys", sample([{}, {"positions": 3}, {"choices": CHOICES}], 1))
def test_gradients_equal_differences_of_scores(keys: dict[str, Any], family: Family, tmp_path: Path) -> None:
    setting = Setting(family, "task_arithmetic")
    evaluator = setting.evaluator([behind_header(task_of(tmp_path, RECORDS[:4], **keys), 40)])
    _, gradients = differentiate_merges(evaluator, setting.bank, setting.spec, setting.recipes)
    expected = differences(setting, evaluator, take_candidate(setting.recipes, 1))
    assert_gradients_close(take_candidate(gradients, 1), expected)


def test_a_choice_without_a_chance_harms_no_gradient(tmp_path: Path) -> None:
    task = task_of(tmp_path, RECORDS[:1], choices=CHOICES)
    requests = task.requests(word_tokenizer(words()), 256)
    totals = np.array([[-1.0, -np.inf, -1.0]], np.float32)
    responses = replace(requests.unanswered(1), totals=totals)
    np.testing.assert_allclose(task.score(responses)["negative_entropy"], [[-np.log(2)]], rtol=1e-6)
    np.testing.assert_allclose(task.score_gradient(responses), 0.0, atol=1e-6)


def test_the_gradient_of_choices_is_that_of_differences(tmp_path: Path) -> None:
    task, rng = task_of(tmp_path, choices="choices"), np.random.default_rng(1)
    requests = task.requests(word_tokenizer(words()), 256)
    totals = rng.normal(size=(2, len(requests.scored))).astype(np.float32)

    def score(values: np.ndarray) -> np.ndarray:
        return np.asarray(task.score(replace(requests.unanswered(2), totals=values))["negative_entropy"].sum(axis=1))

    gradient = task.score_gradient(replace(requests.unanswered(2), totals=totals))
    for row in (0, 5, len(requests.scored) - 1):
        step = np.zeros_like(totals)
        step[:, row] = 0.01
        slope = (score(totals + step) - score(totals - step)) / 0.02
        np.testing.assert_allclose(gradient[:, row], slope, atol=1e-3)


def test_shown_examples_have_targets_and_prompts_none(tmp_path: Path) -> None:
    write_lines(tmp_path / "shown.jsonl", [{"prompt": "w5", "target": "w6"}])
    task = task_of(tmp_path, num_fewshot=1, fewshot_source="shown.jsonl", choices=CHOICES, assistant_prefix="w9")
    rows = task.requests(word_tokenizer(words()), 256).scored
    first = [5, 9, 6, *numbers(RECORDS[0]["prompt"]), 9]
    assert [list(row.tokens) for row in rows[:3]] == [[*first, *numbers(choice)] for choice in CHOICES]
    assert task.target(0) is None and isinstance(task, EntropyTask)


def test_a_search_by_layer_and_gradient_becomes_surer(family: Family, tmp_path: Path) -> None:
    """AdaMerging's setting: task arithmetic, a weight for each parent and layer, and unlabelled prompts."""
    records = random_records(6, seed=3, even=True)
    write_lines(tmp_path / "prompts.jsonl", [{"prompt": record["prompt"]} for record in records])
    space = {"method": "task_arithmetic", "layers_per_group": 1, "parameters": {"weight": {"low": 0.0, "high": 1.0}}}
    tasks = [{"name": "sure", "kind": "entropy", "file": str(tmp_path / "prompts.jsonl"), "heldout": 0.5}]
    search = {"strategy": "gradient", "gradient": {"starts": 1}}
    document = search_config(family, 8, None, space=space, tasks=tasks, search=search)
    run_here("search", write_yaml(tmp_path / "config.yaml", document), "--out", tmp_path / "run")
    assert climbs(tmp_path / "run")
    table = read_json(tmp_path / "run" / "result.json")["table"]
    assert all(row["heldout_scores"]["sure/negative_entropy"] < 0 for row in table)


def climbs(run: Path) -> bool:
    """Return whether the best fitness of a run's last generation is above that of its first."""
    lines = read_lines(run / "history.jsonl")
    return bool(max(lines[-1]["fitness"]) > max(lines[0]["fitness"]))


# ---------------------------------------------------------------------------------------------------------------
# Networks of torch


@pytest.fixture(scope="module")
def classifiers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tiny vision transformers and images without labels. Read only."""
    folder, rng = tmp_path_factory.mktemp("classifiers"), np.random.default_rng(0)
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=16, patch_size=8,
        id2label={i: f"class{i}" for i in range(4)}, label2id={f"class{i}": i for i in range(4)},
    )  # fmt: skip
    for seed in (1, 2):
        module = randomised(transformers.ViTForImageClassification(config), seed)
        module.save_pretrained(folder / f"model{seed}")
        write_json(folder / f"model{seed}" / "preprocessor_config.json", PREPROCESSOR)
    (folder / "pictures").mkdir()
    for number in range(8):
        Image.fromarray(rng.integers(0, 255, (16, 16, 3)).astype(np.uint8)).save(folder / f"pictures/{number}.png")
    write_lines(folder / "pictures.jsonl", [{"image": f"pictures/{number}.png"} for number in range(8)])
    return folder


def network_search(folder: Path, **changes: Any) -> dict[str, Any]:
    task = {"name": "sure", "kind": "entropy", "file": str(folder / "pictures.jsonl"), "heldout": 0.5}
    return {
        "backend": "torch", "parents": [str(folder / f"model{k}") for k in (1, 2)], "tasks": [task],
        "space": {"method": "linear", "layers_per_group": 1}, "search": {"generations": 4, "population": 3},
    } | changes  # fmt: skip


def test_the_entropy_of_classes_is_that_of_transformers(classifiers: Path, tmp_path: Path) -> None:
    problem = problem_of(tmp_path / "config.yaml", network_search(classifiers))
    evaluators = open_evaluators(problem, problem.prepare())
    baselines = problem.space.baselines()[1]
    scores = evaluators.heldout.score(baselines).matrices["sure"]["negative_entropy"]
    problem.backend.export("", baselines[0], tmp_path / "out", "---\n---\n", lambda: None)
    model = transformers.ViTForImageClassification.from_pretrained(tmp_path / "out").eval()
    processor = transformers.AutoImageProcessor.from_pretrained(classifiers / "model1")
    task = problem.splits.heldout[0]
    images = [Image.open(task.examples[i].inputs["image"]) for i in task.indices]
    with torch.no_grad():
        logits = model(**processor(images=images, return_tensors="pt")).logits
    np.testing.assert_allclose(scores[0], negative_entropies(logits), rtol=1e-4)
    assert task.target(0) is None


@has_torchax
def test_classifiers_are_searched_by_the_gradient_of_their_entropy(classifiers: Path, tmp_path: Path) -> None:
    search = {"strategy": "gradient", "generations": 6, "gradient": {"starts": 1}}
    config = write_yaml(tmp_path / "config.yaml", network_search(classifiers, search=search))
    run_here("search", config, "--out", tmp_path / "run")
    assert climbs(tmp_path / "run")


def test_images_and_texts_are_compared_over_the_choices(clips: Path, tmp_path: Path) -> None:  # noqa: F811
    task = {"name": "sure", "kind": "entropy", "file": "images", "heldout": 0.5, "choices": ["w9 w5", "w9 w6"]}
    problem = problem_of(tmp_path / "config.yaml", document(clips, task))
    evaluators = open_evaluators(problem, problem.prepare())
    found = evaluators.heldout.score(problem.space.baselines()[1]).matrices["sure"]["negative_entropy"]
    assert np.isfinite(found).all() and (found <= 0).all() and (found >= -np.log(2) - 1e-6).all()


def test_a_decoder_of_torch_has_the_entropy_of_the_native_backend(family: Family, tmp_path: Path) -> None:
    task = {"name": "sure", "kind": "entropy", "file": str(family.tasks), "heldout": 0.5, "positions": 2}
    config = search_config(family, 1, 2, base=None, space={"method": "linear"}, tasks=[task])
    rows = []
    for backend in ("decoder", "torch"):
        problem = problem_of(tmp_path / "config.yaml", config | {"backend": backend})
        evaluators = open_evaluators(problem, problem.prepare())
        rows.append(evaluators.heldout.score(problem.space.baselines()[1]).matrices["sure"]["negative_entropy"])
    np.testing.assert_allclose(rows[1], rows[0], rtol=1e-4)


# ---------------------------------------------------------------------------------------------------------------
# Wrong input


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"choices": ["w5"]},
            "choices: expected a list of two or more texts, or the name of a field, found a list of 1",
        ),
        ({"choices": ["w5", "w5"]}, "choices: expected texts that differ, none of them empty"),
        ({"choices": CHOICES, "positions": 2}, "positions: has no meaning beside choices"),
        ({"choices": "options"}, r"prompts.jsonl:1: options: expected a list of two or more texts, found None"),
        ({"prompt": "w5 w6"}, "prompt: names no field of the records"),
        ({"prompt": "{question}"}, "has no field 'question'"),
        ({"positions": 0}, "positions: expected"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(keys: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        task_of(tmp_path, **keys)


def test_a_network_has_one_list_of_classes(classifiers: Path, tmp_path: Path) -> None:
    for keys, says in (({"choices": "labels"}, r"choices: labels"), ({"positions": 2}, "positions: 2")):
        task = network_search(classifiers)["tasks"][0] | keys
        with pytest.raises(InputError, match=rf"{says}; a record without prompt is for a network"):
            problem_of(tmp_path / "config.yaml", network_search(classifiers, tasks=[task]))


def test_networks_that_compare_images_with_texts_need_choices(clips: Path, tmp_path: Path) -> None:  # noqa: F811
    task = {"name": "sure", "kind": "entropy", "file": "images", "heldout": 0.5}
    with pytest.raises(InputError, match=r"choices: missing; CLIPModel compares images with texts: expected those of"):
        problem_of(tmp_path / "config.yaml", document(clips, task)).prepare()


def test_a_task_of_images_is_for_the_other_backend(classifiers: Path, family: Family, tmp_path: Path) -> None:
    tasks = [network_search(classifiers)["tasks"][0], task_section(family.tasks)]
    with pytest.raises(InputError, match="sure"):
        problem_of(tmp_path / "config.yaml", search_config(family, 1, 2, tasks=tasks)).prepare()
