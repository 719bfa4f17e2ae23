"""Images in tasks: what vision-language models score and write about them is what transformers does."""

import base64
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import torch
import yaml
from helpers.commands import command, run_here
from helpers.files import read_json, read_lines, write_lines, write_yaml
from helpers.models import save, words
from helpers.sampling import sample
from helpers.searches import search_config, seeing_search, task_section
from reference.vision_models import (
    PLACEHOLDERS,
    SEEING,
    load_seeing,
    records_score,
    save_seeing,
    seeing_logprobs,
    seeing_model,
    seeing_text,
    write_images,
)
from transformers import AutoModelForCausalLM

from evojax_merge.backends.decoder import vision
from evojax_merge.checkpoints.tokens import load_tokenizer
from evojax_merge.config.search_config import TaskFile
from evojax_merge.errors import InputError
from evojax_merge.evaluation.scores import TaskScores
from evojax_merge.steps import stored_models
from evojax_merge.steps.stored_models import open_tasks, score_models
from evojax_merge.tasks.opening import open_task, resolved_config

# Each prompt's images by their numbers: one, two of unlike sizes, none, and one that came before.
PROMPTS = (
    ("<image> w5 w6 w7", (0,)),
    ("w9 <image> w8 <image> w5", (1, 2)),
    ("w4 w5 w6", ()),
    ("<image> w5 w6 w7", (1,)),
    ("w11 <image> w5", (3,)),
    ("<image> w30 w6", (0,)),
)  # fmt: skip
SHARED = tuple(f"w4 <image> {'w5 w6 w7 ' * 9}w{10 + i}" for i in range(4))
NEW = 6


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of features for each test; compiled programs stay where they are."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(vision, "cache_folder", lambda: folder)


def write_family(folder: Path, kind: str) -> Path:
    """A base and two parents, of which the second has a vision side of its own, images, and task files."""
    model = seeing_model(kind)
    for seed, (name, noise) in enumerate((("base", 0.0), ("one", 0.0), ("two", 0.05))):
        save_seeing(model, folder / name, seed, noise)
    write_tasks(folder, PLACEHOLDERS.get(kind, "<image>"))
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_family(tmp_path_factory.mktemp("vision"), "llava")


def write_tasks(folder: Path, placeholder: str) -> None:
    files = write_images(folder)
    texts, choices = [], []
    for number, (prompt, images) in enumerate(PROMPTS):
        names: Any = [files[i].name for i in images]
        fields = {"prompt": prompt.replace("<image>", placeholder), "target": f"w{20 + number} w{33 - number}"}
        fields |= {} if not names else {"image": names[0]} if len(names) == 1 else {"images": names}
        texts.append(fields)
        choices.append(fields | {"choices": [f"w{number + 4}", "w40 w41"], "answer": 0})
    write_lines(folder / "tasks.jsonl", texts)
    write_lines(folder / "choices.jsonl", choices)
    # Questions about one image, behind a beginning that is worth prefilling once.
    shared = [prompt.replace("<image>", placeholder) for prompt in SHARED]
    records = [{"prompt": prompt, "target": f"w{20 + i}", "image": "0.png"} for i, prompt in enumerate(shared)]
    write_lines(folder / "shared.jsonl", records)


def score(folder: Path, *tasks: dict[str, Any]) -> tuple[TaskScores, list[str]]:
    """The scores of one model, and the lines of the log."""
    scored: list[TaskScores] = []
    lines: list[str] = []
    file = TaskFile(tasks=[{"name": f"task{i}", **task} for i, task in enumerate(tasks)])  # type: ignore[list-item]
    task_set = open_tasks("tasks.yaml", file, folder.parent)
    # The scores are the last argument of what writes the rows of answers.
    score_models([str(folder)], task_set, lines.append, lines.append, lambda _, rows: scored.append(rows.args[-1]))
    return scored[0], lines


def images_of(root: Path, numbers: tuple[int, ...]) -> list[Path]:
    return [root / f"{number}.png" for number in numbers]


def check_scores(folder: Path, tasks: list[dict[str, Any]], placeholder: str) -> None:
    """The scores of a likelihood, of choices and of texts are those of transformers, the second time as well."""
    scores, lines = score(folder, *tasks)
    assert any("images: 4 (" in line and "4 encoded by the vision tower, 0 read" in line for line in lines)
    model, processor = load_seeing(folder)
    for number, (prompt, numbers) in enumerate(PROMPTS):
        prompt, images = prompt.replace("<image>", placeholder), images_of(folder.parent, numbers)
        expected = seeing_logprobs(model, processor, prompt, images, f"w{20 + number} w{33 - number}")
        assert scores.matrices["task0"]["log_probability"][0, number] == pytest.approx(expected.mean(), abs=1e-4)
        sums = [seeing_logprobs(model, processor, prompt, images, c).sum() for c in (f"w{number + 4}", "w40 w41")]
        assert scores.matrices["task1"]["margin"][0, number] == pytest.approx(sums[0] - sums[1], abs=2e-4)
        assert scores.outputs["task2"][0][number] == seeing_text(model, processor, prompt, images, NEW)
    again, lines = score(folder, *tasks)
    assert any("0 encoded by the vision tower, 4 read" in line for line in lines)
    for task, matrices in scores.matrices.items():
        for metric, matrix in matrices.items():
            np.testing.assert_array_equal(again.matrices[task][metric], matrix)


TASKS: list[dict[str, Any]] = [
    {"kind": "likelihood", "file": "tasks.jsonl"},
    {"kind": "multiple_choice", "file": "choices.jsonl", "metric": "margin"},
    {"kind": "generation", "file": "tasks.jsonl", "metric": "exact_match", "max_new_tokens": NEW},
]


@pytest.mark.parametrize("kind", sample(SEEING, 2))
def test_scores_and_texts_are_transformers(kind: str, tmp_path: Path) -> None:
    if kind == "smolvlm":
        pytest.importorskip("num2words")
    save_seeing(seeing_model(kind), tmp_path / "model", 0, 0.05)
    placeholder = PLACEHOLDERS.get(kind, "<image>")
    write_tasks(tmp_path, placeholder)
    check_scores(tmp_path / "model", TASKS, placeholder)


def test_every_family_that_sees_is_in_the_table() -> None:
    assert {settings.get("model_type", kind) for kind, (settings, _) in SEEING.items()} == set(vision.SEEING)


def test_a_beginning_with_an_image_is_shared(root: Path) -> None:
    tasks = [{"kind": "likelihood", "file": "shared.jsonl"},
             {"kind": "generation", "file": "shared.jsonl", "max_new_tokens": NEW}]  # fmt: skip
    scores, _ = score(root / "one", *tasks)
    model, processor = load_seeing(root / "one")
    for number, prompt in enumerate(SHARED):
        expected = seeing_logprobs(model, processor, prompt, [root / "0.png"], f"w{20 + number}")
        assert scores.matrices["task0"]["log_probability"][0, number] == pytest.approx(expected.mean(), abs=1e-4)
        assert scores.outputs["task1"][0][number] == seeing_text(model, processor, prompt, [root / "0.png"], NEW)


SPACES: dict[str, dict[str, Any]] = {
    "merges": {"space": {"method": "dare_ties", "layers_per_group": 2}, "evaluation": {"chunk": 4}},
    "paths": {"data_flow": {"moves": 2, "window": 1}},
    "gradient": {"space": {"method": "task_arithmetic"}},
    "pool": {"pool": {"methods": ["slerp"], "size": 4}},
}


def heldout_score(folder: Path, root: Path) -> float:
    """The score of a folder on `tasks.jsonl` by transformers."""
    return records_score(folder, root / "tasks.jsonl")


# In Gemma 3 the positions of an image attend to later ones.
KINDS = {"paths": "gemma3"}


@pytest.mark.parametrize("space", sample(SPACES, 1))
def test_a_search_exports_what_it_scored(
    root: Path, space: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if space in KINDS:
        root = write_family(tmp_path, KINDS[space])
    document = seeing_search(root, space, SPACES[space])
    assert command("search", write_yaml(tmp_path / "search.yaml", document), "--out", tmp_path / "run") == 0
    # The base's vision side is the first parent's and the candidates'; the other parent has its own.
    positions, out = {"paths": 16}.get(space, 36), " ".join(capsys.readouterr().out.split())
    assert f"images: 4 ({positions} positions), 8 encoded by the vision tower, 0 read" in out
    table = read_json(tmp_path / "run/result.json")["table"]
    folders = {"winner": tmp_path / "run/best/model", "base": root / "base"}
    for row in table:
        folder = folders.get(row["role"], root / row["name"].split("/")[-1])
        if row["role"] not in ("winner", "base", "parent"):
            continue
        (scored,) = row["heldout_scores"].values()
        assert scored == pytest.approx(heldout_score(folder, root), abs=1e-4), row
    # The page shows the images on which winner and parent differ.
    answers = read_lines(tmp_path / "run/heldout_answers.jsonl")
    ours, theirs = answers[: len(answers) // 2], answers[len(answers) // 2 :]
    differing = [row for row, other in zip(ours, theirs, strict=True) if row["score"] != other["score"]]
    seen = [row for row in differing if PLACEHOLDERS.get(KINDS.get(space, ""), "<image>") in row["prompt"]]
    assert seen == [row for row in answers if "thumbnail" in row]
    # The winner of a pool may be a parent.
    assert seen or space == "pool"
    page = (tmp_path / "run/report.html").read_text(encoding="utf-8")
    assert all(row["thumbnail"] in page for row in seen)


def refusal(root: Path, records: list[dict[str, Any]], model: str = "one", **task: Any) -> str:
    write_lines(root / "bad.jsonl", records)
    with pytest.raises(InputError) as caught:
        score(root / model, {"kind": "likelihood", "file": "bad.jsonl", **task})
    return str(caught.value)


def test_what_is_refused(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = {"prompt": "<image> w5", "target": "w6", "image": "0.png"}
    assert "bad.jsonl:2: image: none.png: no such file" in refusal(root, [good, good | {"image": "none.png"}])
    (root / "broken.png").write_bytes((root / "0.png").read_bytes()[:200])
    assert "bad.jsonl:1: image: broken.png: cannot be read as an image" in refusal(
        root, [good | {"image": "broken.png"}]
    )
    (root / "text.png").write_text("no image")
    assert "bad.jsonl:1: image: text.png: cannot be read" in refusal(root, [good | {"image": "text.png"}])
    assert "its prompt has 1 place for 2 images" in refusal(root, [good | {"image": ["0.png", "1.png"]}])
    assert "its prompt has 0 places for 1 image" in refusal(root, [good | {"prompt": "w5"}])
    assert "its prompt has 1 place for 0 images" in refusal(root, [{"prompt": "<image> w5", "target": "w6"}])
    without = {"prompt": "w5", "target": "<image>"}
    assert "holds '<image>', the token of an image, and no image" in refusal(root, [without])
    assert "has 10 positions of images, and the processor leaves 9" in refusal(root, [good | {"target": "<image>"}])
    assert "on the net" in refusal(root, [good | {"image": "https://example.org/a.png"}])
    assert "not valid base64" in refusal(root, [good | {"image": "data:image/png;base64,=="}])
    assert "expected an image" in refusal(root, [good | {"image": 3}])
    monkeypatch.setattr("evojax_merge.tasks.images.MAX_PIXELS", 100)
    assert "12 × 12 pixels; expected 100 at most" in refusal(root, [good])
    monkeypatch.undo()


def test_an_image_inside_of_a_record(root: Path, tmp_path: Path) -> None:
    """A data URI, and a column of parquet with contents or paths, are the image that a file is."""
    content, record = (root / "1.png").read_bytes(), {"prompt": "<image> w5", "target": "w6"}
    uri = f"data:image/png;base64,{base64.b64encode(content).decode()}"
    write_lines(root / "inside.jsonl", [record | {"image": image} for image in (uri, "1.png", "./1.png")])
    column = [{"bytes": content, "path": None}, {"bytes": None, "path": "1.png"}]
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist([record | {"image": image} for image in column]), tmp_path / "inside.parquet"
    )
    parquet = {"kind": "likelihood", "file": str(tmp_path / "inside.parquet"), "images": str(root)}
    scores, lines = score(root / "one", {"kind": "likelihood", "file": "inside.jsonl"}, parquet)
    values = [value for name in ("task0", "task1") for value in scores.matrices[name]["log_probability"][0]]
    assert len(set(values)) == 1 and any("images: 1 (9 positions)" in line for line in lines)


def cache_data_set(folder: Path, name: str, splits: dict[str, list[dict[str, Any]]]) -> Path:
    """A data set in the hub's cache, as its client keeps one that was fetched before."""
    folder = folder / f"datasets--{name.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("1" * 40)
    data = folder / "snapshots" / ("1" * 40) / "data"
    data.mkdir(parents=True)
    for split, records in splits.items():
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), data / f"{split}-00000-of-00001.parquet")
    return data


def test_data_sets_of_questions_about_images_by_their_names(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The columns are those of the Japanese sets that EvoVLM-JP was measured on: several questions about an image, of
    which the first counts, and one."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    files = images_of(root, (0, 1, 2))
    images = [{"bytes": file.read_bytes(), "path": file.name} for file in files]
    questions = [["w5 w6", "w7"], ["w8"], ["w9 w10"]]
    several = [
        {"image_id": i, "image": image, "qas": [{"qa_id": i, "question": q, "answer": f"w{20 + i} w21"} for q in asked]}
        for i, (image, asked) in enumerate(zip(images, questions, strict=True))
    ]
    one = [{"image": image, "question": q[0], "answer": "w22"} for image, q in zip(images, questions, strict=True)]
    data = cache_data_set(tmp_path, "SakanaAI/JA-VG-VQA-500", {"train": several, "test": several[:2]})
    cache_data_set(tmp_path, "SakanaAI/JA-VLM-Bench-In-the-Wild", {"test": one})
    shared = {"kind": "generation", "metric": "rouge_l", "language": "ja", "max_new_tokens": NEW}
    tasks: list[dict[str, Any]] = [
        shared | {"file": "hub:SakanaAI/JA-VG-VQA-500:train", "heldout": "hub:SakanaAI/JA-VG-VQA-500:test",
                  "prompt": "<image> {qas[0][question]}", "target": "{qas[0][answer]}"},
        shared | {"file": "hub:SakanaAI/JA-VLM-Bench-In-the-Wild", "prompt": "<image> {question}",
                  "target": "{answer}"},
    ]  # fmt: skip
    scores, lines = score(root / "one", *tasks)
    assert any("images: 3 (" in line for line in lines)
    model, processor = load_seeing(root / "one")
    written = [
        seeing_text(model, processor, f"<image> {asked[0]}", [file], NEW)
        for asked, file in zip(questions, files, strict=True)
    ]
    # The held-out examples of the first are another split.
    assert scores.outputs == {"task0": [written[:2]], "task1": [written]}
    config = TaskFile(tasks=[{"name": "task0", **tasks[0]}]).tasks[0]  # type: ignore[list-item]
    search, heldout = open_task("tasks", config, root, 0)
    assert search.files == (data / "train-00000-of-00001.parquet",)
    name = f"hub:SakanaAI/JA-VG-VQA-500@{'1' * 40}"
    pinned = {"file": f"{name}:train", "heldout": f"{name}:test"}
    assert resolved_config(config, search, heldout).items() >= pinned.items()
    with pytest.raises(InputError, match=r"row 0: the record has no field 'answer', which tasks.*target names"):
        score(root / "one", tasks[0] | {"target": "{answer}"})
    with pytest.raises(InputError, match="hub:SakanaAI/JA-VG-VQA-500: has more than one split; say which of"):
        score(root / "one", tasks[0] | {"file": "hub:SakanaAI/JA-VG-VQA-500", "heldout": 0.5})


def test_models_that_see_no_images(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = {"prompt": "<image> w5", "target": "w6", "image": "0.png"}
    monkeypatch.setattr(vision, "SEEING", ("qwen2_5_vl",))
    assert "has an image; texts alone are scored with llava models" in refusal(root, [record])
    monkeypatch.undo()
    text = AutoModelForCausalLM.from_config(seeing_model("llava").config.text_config)
    write_images(tmp_path)
    save(text, tmp_path / "text")
    assert "has an image, and the models see none" in refusal(tmp_path, [record], "text")
    # A field that a template names is a text.
    write_lines(tmp_path / "named.jsonl", [{"image": "w5 w6", "target": "w7"}])
    score(tmp_path / "text", {"kind": "likelihood", "file": "named.jsonl", "prompt": "w4 {image}"})


def test_a_missing_package_is_named(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = {"prompt": "<image> w5", "target": "w6", "image": "0.png"}

    def load(folder: Path) -> Any:
        tokenizer = load_tokenizer(folder)
        monkeypatch.setitem(sys.modules, "torch", None)
        return tokenizer

    monkeypatch.setattr(stored_models, "load_tokenizer", load)
    assert "images need the package torch; pip install 'evojax-merge[vision]'" in refusal(root, [record])
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "PIL", None)
    assert "needs the package pillow; pip install 'evojax-merge[vision]'" in refusal(root, [record])


def test_a_chat_has_its_images_where_its_template_puts_them(root: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(root / "one", folder)
    (folder / "chat_template.jinja").write_text(
        "{% for message in messages %}{{ 'w4 ' if message['role'] == 'user' else 'w8 ' }}"
        "{% for part in message['content'] %}{{ '<image> ' if part['type'] == 'image' else part['text'] + ' ' }}"
        "{% endfor %}{% endfor %}{{ 'w9 ' if add_generation_prompt else '' }}"
    )
    write_images(tmp_path)
    records: list[dict[str, Any]] = [
        {"prompt": "w5", "target": "w6", "image": "3.png"},
        {"prompt": "w5 w7", "target": "w10", "image": "0.png"},
        {"prompt": "w11 <image> w12 <image>", "target": "w13", "images": ["1.png", "2.png"]},
    ]
    write_lines(tmp_path / "chat.jsonl", records)
    chat = {"kind": "likelihood", "file": "chat.jsonl", "apply_chat_template": True}
    scores, _ = score(folder, chat | {"num_fewshot": 1})
    model, processor = load_seeing(folder)
    shown = "w4 <image> w5 w8 w6 w4 "
    texts = (f"{shown}<image> w5 w7 w9", f"{shown}w11 <image> w12 <image> w9")
    for number, (text, images) in enumerate(zip(texts, ((3, 0), (3, 1, 2)), strict=True)):
        expected = seeing_logprobs(model, processor, text, images_of(tmp_path, images), records[number + 1]["target"])
        assert scores.matrices["task0"]["log_probability"][0, number] == pytest.approx(expected.mean(), abs=1e-4)


def test_features_of_another_tower_are_not_taken(root: Path, tmp_path: Path) -> None:
    write_lines(root / "single.jsonl", [{"prompt": "<image> w5", "target": "w6", "image": "0.png"}])
    task = {"kind": "likelihood", "file": "single.jsonl"}
    first, lines = score(root / "one", task)
    assert "1 encoded" in " ".join(lines)
    # The base has the same tower, the other parent another one.
    assert "0 encoded" in " ".join(score(root / "base", task)[1])
    (own,) = (vision.cache_folder() / "features").rglob("*.safetensors")
    assert "1 encoded" in " ".join(score(root / "two", task)[1])
    # A file of another tower's features is written again, and so is a damaged one.
    (other,) = {*(vision.cache_folder() / "features").rglob("*.safetensors")} - {own}
    own.write_bytes(other.read_bytes())
    other.write_bytes(other.read_bytes()[:50])
    assert "1 encoded" in " ".join(score(root / "two", task)[1])
    again, lines = score(root / "one", task)
    assert "1 encoded" in " ".join(lines)
    np.testing.assert_array_equal(*(scores.matrices["task0"]["log_probability"] for scores in (first, again)))


def test_a_text_model_merges_into_the_decoder(root: Path, tmp_path: Path) -> None:
    """The text model lacks the token of images, whose rows are those of the model that sees."""
    tokens = [token for token in words() if token != "w60"]
    for name, seed in (("text", 1), ("japanese", 2)):
        torch.manual_seed(seed)
        config = seeing_model("llava").config.text_config
        config.vocab_size = len(tokens)
        save(AutoModelForCausalLM.from_config(config).float(), tmp_path / name, tokens)
    document = search_config(
        None, 1, base=str(tmp_path / "text"), parents=[str(root / "one"), str(tmp_path / "japanese")],
        tokenizer_source=str(root / "one"), space={"method": "ties"},
        tasks=[task_section(root / "shared.jsonl", heldout=str(root / "tasks.jsonl"))],
    )  # fmt: skip
    write_yaml(tmp_path / "search.yaml", document)
    assert command("plan", tmp_path / "search.yaml") == 0
    assert command("search", tmp_path / "search.yaml", "--out", tmp_path / "run") == 0
    table = read_json(tmp_path / "run/result.json")["table"]
    (scored,) = next(row for row in table if row["role"] == "winner")["heldout_scores"].values()
    assert scored == pytest.approx(heldout_score(tmp_path / "run/best/model", root), abs=1e-4)


def test_the_recipe_of_evovlm_is_planned(tmp_path: Path) -> None:
    """On tiny models of its parents' architectures, with questions of the columns that its data set has."""
    model = seeing_model("llava_next")
    save_seeing(model, tmp_path / "vision", 0, 0.0)
    text = model.config.text_config
    text.vocab_size = len(words())
    for seed, name in enumerate(("base", "japanese")):
        torch.manual_seed(seed)
        save(AutoModelForCausalLM.from_config(text).float(), tmp_path / name, words())
    (image, *_) = write_images(tmp_path)
    record = {"image": image.name, "qas": [{"question": "w5 w6", "answer": "w7"}]}
    write_lines(tmp_path / "questions.jsonl", [record] * 10)
    document = yaml.safe_load((Path(__file__).parents[1] / "configs/evovlm.yaml").read_text())
    vision_parent, japanese = document["parents"]
    local = {document["base"]: "base", vision_parent: "vision", japanese: "japanese"}
    for key in ("base", "tokenizer_source", "other_modules"):
        document[key] = local[document[key]]
    document["parents"] = [local[parent] for parent in document["parents"]]
    # By characters: MeCab is a package of its own.
    document["tasks"][0] |= {"file": "questions.jsonl", "metric": "rouge_l"}
    out = " ".join(run_here("plan", write_yaml(tmp_path / "evovlm.yaml", document)).stdout.split())
    assert "fits: " in out and "the run of 60 generations" in out
