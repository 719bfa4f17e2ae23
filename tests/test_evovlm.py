"""The table-top EvoVLM: its questions, the merge that its experts allow, and what is refused."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from helpers.commands import command
from helpers.files import read_json, read_lines, write_yaml
from helpers.sampling import sample, thorough
from PIL import Image
from reference.vision_scores import load_seeing
from transformers import AutoModelForCausalLM

from evojax_merge import zoo
from evojax_merge.errors import InputError
from evojax_merge.zoo import evovlm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from bench.shared import evovlm_training

SHORT = evovlm_training.Plan(1, 1, 1, 1, 1, 1)
RGB = {"red": (255, 0, 0), "blue": (0, 0, 255), "black": (0, 0, 0), "yellow": (255, 255, 0)}


def test_pictures_have_the_color_that_their_questions_tell() -> None:
    pictures = [picture for picture in evovlm.read_pictures("test") if picture.color in RGB]
    for picture in sample(pictures, 20):
        pixels = np.asarray(Image.open(io.BytesIO(picture.content)).convert("RGB")).reshape(-1, 3)
        assert (pixels == RGB[picture.color]).all(axis=1).sum() > 10
    assert len(pictures) > 300


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evovlm")
    evovlm.unpack_family(folder, 3, (20, 100))
    return folder


def records(folder: Path, file: str) -> list[dict[str, str]]:
    return read_lines(folder / file)


def test_questions_are_about_pictures_that_nothing_trains_on(folder: Path) -> None:
    pictures = {picture.content: picture for picture in evovlm.read_pictures("test")}
    both = [*records(folder, "search.jsonl"), *records(folder, "heldout.jsonl")]
    assert len({record["image"] for record in both}) == 120
    for record in both:
        picture = pictures[(folder / record["image"]).read_bytes()]
        assert evovlm.COLORS[picture.color] in record["answer"] and picture.color in record["english_answer"]
        assert evovlm.SHAPES[picture.shape] in record["answer"] and picture.shape in record["english_answer"]
    assert not set(pictures) & {picture.content for picture in evovlm.read_pictures("train")}


def test_half_of_one_expert_and_half_of_the_other_answer_in_japanese(folder: Path) -> None:
    """Neither expert does, nor the mean of both."""
    vision, processor = load_seeing(folder / "vision")
    stored = {key: value.clone() for key, value in vision.state_dict().items()}
    base, japanese = (AutoModelForCausalLM.from_pretrained(folder / name).state_dict() for name in ("base", "japanese"))
    asked = sample(records(folder, "heldout.jsonl"), 60)
    texts = [f"<image> {record['question']} {record['answer']} </s>" for record in asked]
    images = [Image.open(folder / record["image"]).convert("RGB") for record in asked]
    inputs = processor(text=texts, images=images, return_tensors="pt", padding=True, padding_side="right")
    inputs.pop("token_type_ids", None)
    written = [processor.tokenizer(f"{record['answer']} </s>")["input_ids"] for record in asked]

    def right(seeing: list[float], speaking: list[float]) -> float:
        """The share of right answers; weights of the two experts: in the lower half, and in the upper one."""
        for key, value in base.items():
            name = key.replace("model.", "model.language_model.", 1)
            upper = "embed" not in key and not any(
                f"layers.{layer}." in key for layer in range(evovlm_training.LOWER_LAYERS)
            )
            rows = slice(len(value))
            moved = stored[name].clone()
            moved[rows] = (
                value + seeing[upper] * (stored[name][rows] - value) + speaking[upper] * (japanese[key] - value)
            )
            vision.get_parameter(name).data.copy_(moved)
        with torch.no_grad():
            predicted = vision(**inputs).logits.argmax(-1)
        ends = inputs["attention_mask"].sum(1)
        return float(
            np.mean(
                [
                    row[end - len(answer) - 1 : end - 1].tolist() == answer
                    for row, end, answer in zip(predicted, ends, written, strict=True)
                ]
            )
        )

    assert right([1, 0], [0, 1]) > 0.75
    for seeing, speaking in (([1, 1], [0, 0]), ([0, 0], [1, 1]), ([0.5, 0.5], [0.5, 0.5])):
        assert right(seeing, speaking) < 0.15


@thorough
def test_a_search_exports_a_model_that_transformers_scores_alike(folder: Path, tmp_path: Path) -> None:
    """A gradient's winner answers in Japanese, and the folder, in a process without this program, has its score."""
    document = yaml.safe_load((Path(__file__).parents[1] / "configs/evovlm_tabletop.yaml").read_text())
    document |= {"base": str(folder / "base"), "parents": [str(folder / "vision"), str(folder / "japanese")]}
    document |= {"tokenizer_source": str(folder / "vision")}
    document["search"] = {
        "strategy": "gradient", "generations": 12, "population": 1, "gradient": {"learning_rate": 0.2}
    }  # fmt: skip
    for task in document["tasks"]:
        task |= {"file": str(folder / "search.jsonl"), "heldout": str(folder / "heldout.jsonl"), "limit": 40}
    assert command("search", write_yaml(tmp_path / "search.yaml", document), "--out", tmp_path / "run") == 0
    rows = read_json(tmp_path / "run/result.json")["table"]
    scores = {row["role"]: row["heldout_scores"] for row in rows}
    assert scores["winner"]["japanese/accuracy"] > 0.6 > 0.1 > scores["uniform"]["japanese/accuracy"]
    prompts = [
        {"image": str(folder / record["image"]), "prompt": f"<image> {record['question']}",
         "target": f"{record['answer']} </s>"}
        for record in records(folder, "heldout.jsonl")
    ]  # fmt: skip
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    script = Path(__file__).parent / "reference/vision_scores.py"
    printed = subprocess.run(
        [sys.executable, script, tmp_path / "run/best/model", tmp_path / "prompts.jsonl"],
        check=True, capture_output=True, text=True, cwd=tmp_path, env={"PATH": os.environ["PATH"]},
    )  # fmt: skip
    assert float(printed.stdout) == pytest.approx(scores["winner"]["answers/log_probability"], abs=1e-4)


@thorough
def test_the_models_are_trained_as_they_are_read(tmp_path: Path) -> None:
    evovlm_training.train_models(tmp_path, SHORT)
    model, _ = load_seeing(tmp_path / "vision")
    japanese, base = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("japanese", "base")
    )
    moved = {key for key, value in base.items() if not torch.equal(value, japanese[key])}
    assert "model.embed_tokens.weight" in moved and "lm_head.weight" in moved
    embedding = model.get_input_embeddings().weight[:-1]
    assert torch.equal(embedding, base["model.embed_tokens.weight"])


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(InputError, match="did you mean 'zoo:evovlm/vision'"):
        zoo.resolve_reference("zoo:evovlm/visoin")


def test_the_pictures_need_a_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "easy_vqa", None)
    with pytest.raises(InputError, match=r"needs the package easy-vqa: pip install 'evojax-merge\[evovlm\]'"):
        evovlm.read_pictures("test")
