"""Networks that transformers opens are searched as language models are: classifiers of images and texts, and others."""

import base64
import io
import json
import re
import stat
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
import transformers
import yaml
from helpers.commands import linear_merge, output_of, refusal, run_here
from helpers.families import Family
from helpers.files import read_json, read_lines, write_json, write_lines, write_yaml
from helpers.models import randomised, save, whisper_config
from helpers.searches import problem_of, search_config, task_section
from PIL import Image
from safetensors.numpy import load_file
from scipy.io import wavfile
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

import evojax_merge as em
from evojax_merge.backends.torch import network as networks
from evojax_merge.backends.torch.backend import on_cores
from evojax_merge.errors import InputError
from evojax_merge.evaluation.costs import cost_of
from evojax_merge.report.answers import read_answers
from evojax_merge.report.parameters import read_parameters
from evojax_merge.report.run_data import read_run
from evojax_merge.steps.selection import open_evaluators

has_torchax = pytest.mark.skipif(networks.torchax_environment()[0] is None, reason="torchax is not installed")
SIZE, CLASSES, IMAGES = 16, 4, 12
PREPROCESSOR = {
    "image_processor_type": "ViTImageProcessor", "do_resize": True, "size": {"height": SIZE, "width": SIZE},
    "do_normalize": True, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "do_rescale": True,
}  # fmt: skip


def draw_images(folder: Path) -> list[dict[str, Any]]:
    """Images of four classes, each bright in another quarter; writes them, and a file of their labels."""
    rng = np.random.default_rng(0)
    records = []
    for label in range(CLASSES):
        for number in range(IMAGES):
            pixels = rng.integers(0, 160, (2 * SIZE, 2 * SIZE, 3))
            row, column = divmod(label, 2)
            pixels[row * SIZE : (row + 1) * SIZE, column * SIZE : (column + 1) * SIZE] += 60
            name = f"images/class{label}/{number:02}.png"
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name)
            records.append({"image": name, "label": label})
    (folder / "images.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return records


def train(module: Any, inputs: dict[str, Any], labels: Any, steps: int) -> Any:
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    for _ in range(steps):
        module(**inputs, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return module.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two image classifiers of one base, each trained on two of the four classes, and the images. Read only."""
    folder = tmp_path_factory.mktemp("vision")
    records = draw_images(folder)
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=SIZE, patch_size=8,
        id2label={i: f"class{i}" for i in range(CLASSES)}, label2id={f"class{i}": i for i in range(CLASSES)},
    )  # fmt: skip
    base = ViTForImageClassification(config).train()
    base.save_pretrained(folder / "base")
    write_json(folder / "base" / "preprocessor_config.json", PREPROCESSOR)
    processor = AutoImageProcessor.from_pretrained(folder / "base")
    images = [Image.open(folder / record["image"]) for record in records]
    pixels, labels = processor(images, return_tensors="pt")["pixel_values"], torch.tensor([r["label"] for r in records])
    for name, classes in (("left", (0, 1)), ("right", (2, 3))):
        module = ViTForImageClassification.from_pretrained(folder / "base").train()
        chosen = torch.isin(labels, torch.tensor(classes))
        train(module, {"pixel_values": pixels[chosen]}, labels[chosen], 20).save_pretrained(folder / name)
        write_json(folder / name / "preprocessor_config.json", PREPROCESSOR)
    return folder


GROUPS = ("vit.embeddings", "vit.layers.0", "vit.layers.1", "vit.layernorm", "classifier")


def document(folder: Path, **changes: Any) -> dict[str, Any]:
    task = {"name": "quarter", "kind": "classification", "file": str(folder / "images.jsonl"), "heldout": 0.5}
    return {
        "backend": "torch", "base": str(folder / "base"), "parents": [str(folder / "left"), str(folder / "right")],
        "space": {"method": "task_arithmetic", "parameters": {"weight": {"low": 0.0, "high": 1.5}}},
        "tasks": [task],
        "search": {"generations": 3, "population": 4}, "seed": 1,
    } | changes  # fmt: skip


def config_file(folder: Path, out: Path, **changes: Any) -> Path:
    return write_yaml(out / "config.yaml", document(folder, **changes))


def labels_by_transformers(model: Path, images: Sequence[Path]) -> np.ndarray:
    """int[N]: the likeliest labels, by transformers alone."""
    module = AutoModelForImageClassification.from_pretrained(model).eval()
    pixels = AutoImageProcessor.from_pretrained(model)([Image.open(image) for image in images], return_tensors="pt")
    with torch.no_grad():
        return module(**pixels).logits.argmax(-1).numpy()


def test_image_classifiers_are_planned_searched_resumed_and_exported(folder: Path, tmp_path: Path) -> None:
    controls = {"search": {"generations": 3, "population": 4, "controls": ["greedy"]}}
    config, run, whole = config_file(folder, tmp_path, **controls), tmp_path / "run", tmp_path / "whole"
    plan = output_of("plan", config)
    assert "fits" in plan and plan.count("ViTForImageClassification: ") == 1
    output = output_of("search", config, "--out", whole)
    assert output.count("ViTForImageClassification: ") == 1
    run_here("search", config, "--out", run, "--set", "search.generations=2")
    # A run of an earlier version, without the names of its groups, goes on.
    begun = yaml.safe_load((run / "config.yaml").read_text())
    assert begun.pop("groups") == list(GROUPS)
    write_yaml(run / "config.yaml", begun)
    run_here("search", config, "--out", run, "--resume")
    assert (run / "history.jsonl").read_bytes() == (whole / "history.jsonl").read_bytes()
    result = read_json(run / "result.json")
    assert [row["role"] for row in result["table"]] == ["base", "parent", "parent", "uniform", "greedy", "winner"]

    # Every model of the table has the scores that transformers alone gives it, and so has the exported winner.
    problem = problem_of(config, document(folder))
    task = problem.splits.heldout[0]
    images = [task.examples[i].inputs["image"] for i in task.indices]
    targets = np.array([task.examples[i].target for i in task.indices])
    models = {0: folder / "base", 1: folder / "left", 2: folder / "right", 5: run / "best" / "model"}
    for number, model in models.items():
        accuracy = (labels_by_transformers(model, images) == targets).mean()
        assert result["table"][number]["heldout_scores"]["quarter/accuracy"] == pytest.approx(accuracy, abs=1e-6)

    answers = read_lines(run / "heldout_answers.jsonl")
    assert [answer["image"] for answer in answers] == [str(image) for image in images] * 2
    # The page shows the images on which winner and parent differ.
    ours, theirs = answers[: len(images)], answers[len(images) :]
    differing = [row for row, other in zip(ours, theirs, strict=True) if row["score"] != other["score"]]
    assert differing == [row for row in answers if "thumbnail" in row]
    page = (run / "report.html").read_text(encoding="utf-8")
    for row in differing:
        kind, data = row["thumbnail"].split(",")
        small = Image.open(io.BytesIO(base64.b64decode(data)))
        assert kind == "data:image/jpeg;base64" and max(small.size) <= 96 and row["thumbnail"] in page
    scored = output_of("evaluate", folder / "left", folder / "right", "--tasks", config)
    assert scored.count("opening the models by PyTorch") == scored.count("ViTForImageClassification: ") == 1

    exported = tmp_path / "exported"
    run_here("export", run, exported)
    assert {file.name for file in exported.iterdir()} >= {
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    }
    assert "library_name: transformers" in (exported / "README.md").read_text()
    # Whatever library wrote a file, others may read it as they may the rest.
    assert {stat.S_IMODE(file.stat().st_mode) for file in exported.iterdir()} == {0o644}
    assert (exported / "model.safetensors").read_bytes() == (run / "best/model/model.safetensors").read_bytes()
    (recipe,) = yaml.safe_load_all((run / "best" / "recipe.yaml").read_text())
    assert recipe["merge_method"] == "task_arithmetic"
    run_here("merge", run / "best" / "recipe.yaml", tmp_path / "again")
    winner, again = (load_file(out / "model.safetensors") for out in (run / "best/model", tmp_path / "again"))
    assert winner.keys() == again.keys()
    assert all((winner[name] == again[name]).all() for name in winner)
    assert problem.backend.merge.space.groups == GROUPS
    _the_page_speaks_in_names(run, answers, images, targets)


def test_a_recipe_names_tensors_as_their_files_do(folder: Path, tmp_path: Path) -> None:
    """transformers gives a ViT's modules other names in memory than in files."""
    backend = problem_of(config_file(folder, tmp_path), document(folder)).backend
    genome = np.random.default_rng(0).uniform(0.1, 0.9, backend.merge.space.dims).astype(np.float32)
    recipe = backend.describe(genome).recipe
    backend.export(recipe, genome, tmp_path / "winner", "", lambda: None)
    (tmp_path / "recipe.yaml").write_text(recipe)
    run_here("merge", tmp_path / "recipe.yaml", tmp_path / "again")
    winner, again = (load_file(tmp_path / name / "model.safetensors") for name in ("winner", "again"))
    assert winner.keys() == again.keys()
    for name, tensor in winner.items():
        np.testing.assert_allclose(again[name], tensor, atol=1e-6, err_msg=name)


def _the_page_speaks_in_names(
    run: Path, answers: list[dict[str, Any]], images: list[Path], targets: np.ndarray
) -> None:
    """Parameters have the names of the API, labels and predictions those of the models, and scores their unit."""
    page, opened = (run / "report.html").read_text(encoding="utf-8"), em.open_run(run)
    parents = Path(yaml.safe_load((run / "config.yaml").read_text())["parents"][0]).parent
    shown = dict.fromkeys(row["model"] for row in answers)
    for name, model in zip(shown, (run / "best" / "model", parents / answers[-1]["model"]), strict=True):
        rows = [row for row in answers if row["model"] == name]
        assert [row["target"] for row in rows] == [f"class{label}" for label in targets]
        assert [row["outputs"] for row in rows] == [
            [f"class{label}"] for label in labels_by_transformers(model, images)
        ]
    differing = [pair for task in read_answers(read_run(run)) or () for pair in task.shown]
    assert differing and all(pair.texts is not None and "class" in pair.texts[0] for pair in differing)
    assert page.count("Right answer: class") == len(differing)
    assert all(pair.short_name == "/".join(Path(pair.example).parts[-2:]) for pair in differing)
    assert "quarter/accuracy (share right)" in page and "(share right)" in " ".join(opened.result["verdicts"])
    # The names are there before the winner is, and where the models are gone.
    names = [f"weight[{group}][{parent}]" for group in GROUPS for parent in ("left", "right")]
    for changed in ({}, {"parents": ["/gone/left", "/gone/right"]}):
        document = yaml.safe_load((run / "config.yaml").read_text())
        write_yaml(run / "config.yaml", document | changed)
        data = read_run(run, working=False)
        parameters = read_parameters(data if changed else replace(data, result=None))
        assert parameters is not None and parameters.named and "gene[" not in page
        (map_,) = parameters.frames.maps
        assert [f"weight[{row}][{column}]" for row in map_.rows for column in map_.columns] == names
        assert list(opened.best.parameters) == names


# ---------------------------------------------------------------------------------------------------------------
# Networks of other kinds

TEXTS = [{"text": f"w{5 + i} w{6 + i} w{7 + i % 3}", "label": i % 3, "target": f"w{9 + i} w{4 + i % 5}"}
         for i in range(12)]  # fmt: skip
SMALL: dict[str, Any] = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 64,
    "max_position_embeddings": 32, "pad_token_id": 0,
}  # fmt: skip
# By kind of network: its class, its config, and a task on it.
OTHERS: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "text classifier": (
        "BertForSequenceClassification", lambda: transformers.BertConfig(**SMALL, num_labels=3),
        {"kind": "classification", "file": "texts.jsonl", "metric": "log_probability"},
    ),
    "regression": (
        "BertForSequenceClassification", lambda: transformers.BertConfig(**SMALL, num_labels=1),
        {"kind": "regression", "file": "texts.jsonl"},
    ),
    "encoder-decoder": (
        "T5ForConditionalGeneration", lambda: transformers.T5Config(
            vocab_size=64, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0,
            pad_token_id=0, eos_token_id=2,
        ),
        {"kind": "text_to_text", "file": "texts.jsonl"},
    ),
    "batch norm": (
        "ResNetForImageClassification", lambda: transformers.ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic", num_labels=3,
        ),
        {"kind": "classification", "file": "arrays.npz", "metric": "log_probability"},
    ),
    "convolutions": (
        "ConvNextForImageClassification", lambda: transformers.ConvNextConfig(
            hidden_sizes=[8, 12], depths=[1, 1], num_stages=2, patch_size=2, num_labels=3,
        ),
        {"kind": "classification", "file": "arrays.npz", "metric": "log_probability"},
    ),
}  # fmt: skip


def family_of(kind: str, folder: Path) -> dict[str, Any]:
    """Two networks of a kind, and the config of a search over them."""
    name, config, task = OTHERS[kind]
    model = getattr(transformers, name)(config()).eval()
    tokens = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(4, 64))]
    for number in (1, 2):
        save(randomised(model, number), folder / f"model{number}", tokens)
    write_lines(folder / "texts.jsonl", TEXTS)
    rng = np.random.default_rng(3)
    pixels = rng.normal(size=(12, 3, SIZE, SIZE)).astype(np.float32)
    np.savez(folder / "arrays.npz", pixel_values=pixels, label=np.arange(12) % 3)
    return {
        "backend": "torch", "parents": [str(folder / f"model{k}") for k in (1, 2)],
        "space": {"method": "linear", "layers_per_group": "all"},
        "tasks": [{"name": "task", "heldout": 0.25} | task | {"file": str(folder / task["file"])}],
        "search": {"generations": 2, "population": 3},
    }  # fmt: skip


@pytest.mark.parametrize("kind", OTHERS)
def test_a_merge_has_the_scores_of_the_exported_model(kind: str, tmp_path: Path) -> None:
    problem = problem_of(tmp_path / "config.yaml", family_of(kind, tmp_path))
    prepared, (_, baselines) = problem.prepare(), problem.space.baselines()
    # A network that JAX traces has the outputs that torch gives on the first examples, or it is called instead.
    assert prepared.heldout[0].traced == (networks.torchax_environment()[0] is not None)
    evaluators = open_evaluators(problem, prepared)
    scores = evaluators.heldout.score(baselines).matrices["task"]
    backend = problem.backend
    backend.export("", baselines[0], tmp_path / "out", "---\n---\n", lambda: None)
    # The mean of the parents, tensor by tensor, as transformers reads it.
    name = OTHERS[kind][0]
    out, *parents = (
        getattr(transformers, name).from_pretrained(tmp_path / model).eval() for model in ("out", "model1", "model2")
    )
    states = [parent.state_dict() for parent in parents]
    for key, tensor in out.state_dict().items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor, (states[0][key] + states[1][key]) / 2)
    # The same task on the exported model alone.
    rows = prepared.heldout[0].rows[0]
    inputs = {key: torch.tensor(value).long() if value.dtype == np.int32 else torch.tensor(value)
              for key, value in rows["inputs"].items()}  # fmt: skip
    with torch.no_grad():
        logits = out(**inputs).logits
    target = torch.tensor(rows["target"]).long()
    (metric,) = scores
    if metric == "negative_squared_error":
        expected = -((logits - torch.tensor(rows["target"])) ** 2).mean(-1)
    else:
        chosen = logits.log_softmax(-1).gather(-1, target.clamp(min=0)[..., None])[..., 0]
        counts = (target >= 0).reshape(len(target), -1)
        expected = torch.where(counts, chosen.reshape(counts.shape), 0.0).sum(-1) / counts.sum(-1)
    np.testing.assert_allclose(scores[metric][0], expected.numpy(), rtol=1e-4, atol=1e-5)


def test_texts_that_an_encoder_decoder_writes_are_compared(tmp_path: Path) -> None:
    config = family_of("encoder-decoder", tmp_path)
    model = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / "model1").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "model1")
    texts = [record["text"] for record in TEXTS]
    with torch.no_grad():
        tokens = model.generate(**tokenizer(texts, padding=True, return_tensors="pt"), max_new_tokens=3)
    written = tokenizer.batch_decode(tokens, skip_special_tokens=True)
    # Every other target is what the first parent writes, if it writes anything.
    records = [
        {"text": text, "target": answer if i % 2 and answer else "w4 w4 w4"}
        for i, (text, answer) in enumerate(zip(texts, written, strict=True))
    ]
    write_lines(tmp_path / "written.jsonl", records)
    task = {"name": "task", "kind": "text_to_text", "file": "written.jsonl", "metric": "exact_match", "heldout": 0.5,
            "max_new_tokens": 3}  # fmt: skip
    problem = problem_of(tmp_path / "config.yaml", config | {"tasks": [task]})
    prepared = problem.prepare()
    evaluators = open_evaluators(problem, prepared)
    scores = problem.backend.score_stored(tmp_path / "model1", evaluators.heldout, lambda done: None)
    expected = [records[i]["target"] == written[i] for i in prepared.heldout[0].indices]
    assert scores.matrices["task"]["exact_match"][0].tolist() == expected
    assert True in expected and False in expected


def test_recordings_are_transcribed(tmp_path: Path) -> None:
    pytest.importorskip("jiwer")
    config = whisper_config()
    tokens = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(4, 64))]
    for number in (1, 2):
        model = randomised(transformers.WhisperForConditionalGeneration(config).eval(), number)
        save(model, tmp_path / f"model{number}", tokens)
        transformers.WhisperFeatureExtractor(feature_size=8, chunk_length=1).save_pretrained(
            tmp_path / f"model{number}"
        )
    rng = np.random.default_rng(0)
    for number in range(4):
        wavfile.write(tmp_path / f"{number}.wav", 16_000, rng.integers(-9000, 9000, 8000).astype(np.int16))
    write_lines(tmp_path / "speech.jsonl", [{"audio": f"{i}.wav", "text": f"w{5 + i} w9"} for i in range(4)])
    task = {"kind": "transcription", "file": "speech.jsonl", "heldout": 0.5}
    wrong_words = {"name": "words", "metric": "negative_word_error_rate", "max_new_tokens": 4}
    problem = problem_of(
        tmp_path / "config.yaml",
        {"backend": "torch", "parents": ["model1", "model2"], "space": {"method": "linear"},
         "tasks": [task | {"name": "sure"}, task | wrong_words]},
    )  # fmt: skip
    prepared = problem.prepare()
    scores = open_evaluators(problem, prepared).heldout.score(problem.space.baselines()[1]).matrices
    assert np.isfinite(scores["sure"]["log_probability"]).all()
    assert (scores["words"]["negative_word_error_rate"] <= 0).all()


@has_torchax
def test_candidates_of_a_convolutional_network_run_apart(tmp_path: Path) -> None:
    """On a CPU each has a run of one program by itself; several threads share them, and gradients go the same way."""
    search = {"strategy": "gradient", "generations": 2}
    problem = problem_of(tmp_path / "config.yaml", family_of("batch norm", tmp_path) | {"search": search})
    prepared = problem.prepare()
    evaluator = open_evaluators(problem, prepared).search.evaluator
    genomes = np.random.default_rng(0).normal(size=(5, problem.space.dims)).astype(np.float32)
    alone = np.concatenate([evaluator.evaluate(genome[None]).matrices["task"]["log_probability"] for genome in genomes])
    programs = evaluator.programs
    programs.workers, programs.together = 2, partial(on_cores, workers=2)
    together = evaluator.evaluate(genomes).matrices["task"]["log_probability"]
    assert programs.runs_apart(evaluator.tasks[0], None)
    np.testing.assert_array_equal(together, alone)
    scores, gradients = evaluator.value_and_gradient(genomes)
    np.testing.assert_allclose(scores.matrices["task"]["log_probability"], alone, rtol=1e-5)
    assert gradients.shape == genomes.shape and np.isfinite(gradients).all()


@has_torchax
def test_gradients_are_followed_through_a_network(folder: Path, tmp_path: Path) -> None:
    search = {"generations": 3, "strategy": "hybrid", "population": 4, "gradient": {"minibatches": 2, "generations": 2}}
    run_here("search", config_file(folder, tmp_path, search=search), "--out", tmp_path / "run")
    lines = (tmp_path / "run" / "history.jsonl").read_text().splitlines()
    assert len(lines) == 3


def test_a_decoder_has_the_scores_of_the_native_backend(
    family: Family, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = task_section(family.tasks, name="words", heldout=0.5)
    config = search_config(family, 1, 2, base=None, space={"method": "linear"}, tasks=[task])
    rows = []
    for backend in ("decoder", "torch"):
        problem = problem_of(tmp_path / "config.yaml", config | {"backend": backend})
        evaluators = open_evaluators(problem, problem.prepare())
        rows.append(evaluators.heldout.score(problem.space.baselines()[1]).matrices["words"]["log_probability"])
    np.testing.assert_allclose(rows[1], rows[0], rtol=1e-4)
    assert "is native as well: backend: decoder merges it layer by layer" in " ".join(capsys.readouterr().out.split())


def test_a_convolution_is_planned_as_a_product() -> None:
    image, filters = np.ones((2, 3, 8, 8), np.float32), np.ones((4, 3, 3, 3), np.float32)
    traced = jax.make_jaxpr(lambda x, y: jax.lax.conv(x, y, (1, 1), "VALID"))(image, filters)
    assert cost_of(traced).flops == 2 * (2 * 4 * 6 * 6) * (3 * 3 * 3)


# ---------------------------------------------------------------------------------------------------------------
# Data


def test_a_folder_of_images_by_class_is_the_same_task(folder: Path, tmp_path: Path) -> None:
    tasks = []
    for file in ("images.jsonl", "images"):
        task = {"name": "quarter", "kind": "classification", "file": str(folder / file)}
        problem = problem_of(tmp_path / "config.yaml", document(folder, tasks=[task]))
        tasks.append(problem.prepare().search[0])
    first, second = (task.rows[0] for task in tasks)
    assert set(first) == set(second) == {"inputs", "target"}
    np.testing.assert_array_equal(first["target"], second["target"])
    np.testing.assert_array_equal(first["inputs"]["pixel_values"], second["inputs"]["pixel_values"])


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"image": "broken.png", "label": 0}, r"data.jsonl:2: broken.png: cannot be read as an image"),
        ({"image": "missing.png", "label": 0}, r"data.jsonl:2: image: missing.png: no such file"),
        ({"image": "one.png", "label": 4}, r"data.jsonl:2: label 4 is none of the 4 of .*config.json; expected a"),
        ({"image": "one.png", "label": "klass1"}, r"data.jsonl:2: label 'klass1' .* \(did you mean 'class1'\?\)"),
        ({"image": "one.png"}, r"data.jsonl:2: has no field 'label', the target \(it has image\)"),
        ({"label": 1}, r"data.jsonl:2: has no input; expected the field 'image' or 'text'"),
        ({"text": "w5", "label": 1}, r"data.jsonl:2: has no image; expected one, as in the first example"),
    ],
)  # fmt: skip
def test_an_example_that_cannot_be_read_is_named(
    folder: Path, record: dict[str, Any], message: str, tmp_path: Path
) -> None:
    (tmp_path / "one.png").write_bytes((folder / "images/class0/00.png").read_bytes())
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    data = write_lines(tmp_path / "data.jsonl", [{"image": "one.png", "label": "class0"}, record])
    task = {"name": "quarter", "kind": "classification", "file": str(data), "heldout": 0.5}
    with pytest.raises(InputError, match=message):
        problem_of(tmp_path / "config.yaml", document(folder, tasks=[task])).prepare()


# ---------------------------------------------------------------------------------------------------------------
# Wrong models and configs


def copied(source: Path, target: Path, **changes: Any) -> Path:
    """A copy of a model with changes of its config."""
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    config = read_json(target / "config.json")
    write_json(target / "config.json", config | changes)
    return target


def test_models_that_do_not_fit_are_named(folder: Path, tmp_path: Path) -> None:
    wider = ViTForImageClassification(ViTForImageClassification.from_pretrained(folder / "base").config)
    wider.classifier = torch.nn.Linear(16, 5)
    wider.config.num_labels = 5
    wider.save_pretrained(tmp_path / "wider")
    headless = transformers.ViTModel(wider.config)
    headless.save_pretrained(tmp_path / "headless")
    copied(tmp_path / "headless", tmp_path / "lacking", architectures=["ViTForImageClassification"])
    names = {i: f"class{i}" for i in range(CLASSES)}
    copied(folder / "left", tmp_path / "turned", id2label={i: names[CLASSES - 1 - i] for i in names})
    larger = ViTConfig.from_pretrained(folder / "base", hidden_size=24)
    ViTForImageClassification(larger).save_pretrained(tmp_path / "larger")
    copied(folder / "left", tmp_path / "unknown", architectures=["OwnNetwork"])
    cases = [
        ("wider", r"parents\[1\]: has 5 labels, but base has 4; expected the labels of base, in the same order"),
        ("larger", r"parents\[1\]: leaf '.*' has shape \(1, 1, 24\), but \(1, 1, 16\) in base"),
        ("turned", r"parents\[1\]: label 'class3' is number 0, but 3 in base; expected the labels of base"),
        ("headless", r"parents\[1\]: is a ViTModel, but base is a ViTForImageClassification"),
        ("lacking", r"lacks 2 tensors of ViTForImageClassification, such as classifier"),
        ("unknown", r"config.json: architectures: 'OwnNetwork'; transformers .* has no such class"),
    ]
    for name, message in cases:
        parents = [str(folder / "left"), str(tmp_path / name)]
        with pytest.raises(InputError, match=message):
            problem_of(tmp_path / "config.yaml", document(folder, parents=parents))
    line = refusal(*linear_merge(tmp_path, folder / "left", tmp_path / "turned"))
    assert f"id2label: label 'class3' is number 0, but 3 in {folder / 'left'}" in line


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"export_dtype": "float32"}, r"export_dtype: is for language models; backend: torch searches a space"),
        ({"space": {"method": "linear", "smooth": True}}, r"space: smooth: is for language models"),
        (
            {"space": {"method": "ties", "components": ["attention", "mlp", "norm"]}},
            r"space.components: is for diffusers folders",
        ),
        ({"tasks": [{"name": "a", "lm_eval": "arc_easy"}]}, r"tasks\[0\]: .*"),
        ({"tasks": [{"name": "a", "kind": "regression", "file": "images"}]}, r"images: is a folder, which holds"),
    ],
)  # fmt: skip
def test_a_config_that_networks_cannot_have_is_refused(
    folder: Path, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    for task in changes.get("tasks", []):
        if "file" in task:
            task["file"] = str(folder / "images")
    with pytest.raises(InputError, match=message):
        problem_of(tmp_path / "config.yaml", document(folder, **changes))


def test_a_network_is_pointed_to_its_backend_where_language_models_are_expected(folder: Path, tmp_path: Path) -> None:
    hint = "a search with backend: torch opens a ViTForImageClassification"
    shown = " ".join(output_of("inspect", folder / "base", folder / "left").split())
    assert not any(row in shown for row in ("vocabulary", "tokenizer", "chat template", "language head"))
    assert "a ViTForImageClassification of transformers, and no language model that is searched" in shown
    assert "a search takes it with backend: torch, kind: classification." in shown
    task = {"name": "sums", "kind": "likelihood", "file": str(tmp_path / "sums.jsonl")}
    (tmp_path / "sums.jsonl").write_text('{"prompt": "1 + 1 =", "target": " 2"}\n' * 4)
    config = config_file(folder, tmp_path, backend="decoder", tasks=[task])
    error = run_here("search", config, "--out", tmp_path / "run", status=2).stderr
    assert f"config.json: {hint}; model_type is 'vit'; expected one of " in error


def test_a_network_that_answers_at_random_is_refused(folder: Path, tmp_path: Path) -> None:
    problem = problem_of(tmp_path / "config.yaml", document(folder))
    problem.backend.network.module.vit.embeddings.dropout = torch.nn.Dropout(0.5).train()
    with pytest.raises(InputError, match=r"tasks\[0\]: quarter: ViTForImageClassification answers the same"):
        problem.prepare()


def test_without_torchax_gradients_are_refused_and_torch_is_asked_for(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(networks, "torchax_environment", lambda: (None, "torchax is not installed"))
    search = {"strategy": "gradient", "generations": 2}
    task = {"name": "sure", "kind": "classification", "file": str(folder / "images.jsonl"), "metric": "log_probability"}
    problem = problem_of(tmp_path / "config.yaml", document(folder, search=search, tasks=[task]))
    with pytest.raises(InputError, match=r"tasks\[0\]: sure: ViTForImageClassification has no gradient, .*is not"):
        problem.prepare()
    by_itself = problem_of(tmp_path / "config.yaml", document(folder, search={"strategy": "auto"}, tasks=[task]))
    assert by_itself.strategy.name == "cma_es"
    output = capsys.readouterr().out.replace("\n", " ")
    assert "called with one candidate at a time (sure), because JAX does not trace it (torchax is not in" in output
    monkeypatch.setattr("evojax_merge.backends.torch.opening.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"backend: torch: needs PyTorch; pip install 'evojax-merge\[torch\]'"):
        problem_of(tmp_path / "config.yaml", document(folder))


def test_a_torchax_that_does_not_fit_torch_is_named_with_the_versions_that_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchax", None)
    networks.torchax_environment.cache_clear()
    try:
        environment, reason = networks.torchax_environment()
    finally:
        networks.torchax_environment.cache_clear()
    assert environment is None and "\n" not in reason
    versions = rf"torchax \S+ does not import with torch {re.escape(torch.__version__)}"
    assert re.fullmatch(rf"{versions} \(.*\); torchax 0\.0\.14\S+ and later do", reason)
