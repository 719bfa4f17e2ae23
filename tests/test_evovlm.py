"""The zoo's model that sees and its text models: what they are trained on, their files, and the configs over them."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from helpers import save, thorough, words, write_lines
from hostile import run_command
from PIL import Image
from reference.vision_models import save_seeing, seeing_model, write_images
from reference.vision_scores import load_seeing, seeing_logprobs
from transformers import AutoModelForCausalLM

from evojax_merge import zoo
from evojax_merge.checkpoints.config_file import decoder_config
from evojax_merge.errors import InputError
from evojax_merge.models.decoder import logits
from evojax_merge.models.layers import padded_layout
from evojax_merge.zoo import evovlm
from evojax_merge.zoo.tiny_llama import fresh_model
from evojax_merge.zoo.tiny_llava import SeeingModel, fresh_vision, save_seeing_weights, seeing_forward

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
SHORT = evovlm.Plan(base_steps=1, vision_steps=1, japanese_steps=1, search_questions=6, heldout_questions=10)


def words_of(row: np.ndarray) -> list[str]:
    return [evovlm.VOCABULARY[token] for token in row if token != evovlm.IDS["<pad>"]]


def test_every_text_is_answered_by_what_it_shows() -> None:
    answers = {evovlm.plain_answer(color, evovlm.JAPANESE): color for color in (*evovlm.COLORS, "")}
    rows = evovlm.text_batch(np.random.default_rng(0), 400, (evovlm.JAPANESE,), evovlm.JAPANESE)
    met = set()
    for row in rows:
        words = words_of(row)
        shown = set(words[: evovlm.PLACES]) - {evovlm.BACKGROUND}
        end = words.index("か")
        color = answers[" ".join(words[end + 1 : -1])]
        met.add(color)
        names = {name for names in (evovlm.COLORS, evovlm.SHAPES) for pair in names.items() for name in pair}
        assert words[-1] == "</s>" and "<unk>" not in words and shown <= names
        assert shown & {*evovlm.COLORS, *evovlm.COLORS.values()} == (shown & {color, evovlm.COLORS.get(color, "")})
        assert bool(color) == (len(shown) == 2)
    assert met == {*evovlm.COLORS, ""}


def test_pictures_have_the_color_that_their_questions_tell() -> None:
    rgb = {"red": (255, 0, 0), "blue": (0, 0, 255), "black": (0, 0, 0), "yellow": (255, 255, 0)}
    pictures = evovlm.read_pictures("test")
    checked = 0
    for picture in pictures[:60]:
        if picture.color in rgb:
            pixels = np.asarray(Image.open(io.BytesIO(picture.content)).convert("RGB")).reshape(-1, 3)
            assert (pixels == rgb[picture.color]).all(axis=1).sum() > 10
            checked += 1
        assert set(picture.questions) <= set(evovlm.QUESTIONS)
    assert len(pictures) > 600 and checked > 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of a family but for the weights, which are those before the training."""
    folder = tmp_path_factory.mktemp("evovlm")
    evovlm.save_questions(folder, 3, SHORT)
    evovlm.save_small_files(folder)
    return folder


def test_questions_are_in_japanese_about_pictures_that_nothing_trains_on(folder: Path) -> None:
    pictures = {picture.content: picture for picture in evovlm.read_pictures("test")}
    met = set()
    for file, count in (("search.jsonl", 6), ("heldout.jsonl", 10)):
        records = [json.loads(line) for line in (folder / file).read_text(encoding="utf-8").splitlines()]
        assert len(records) == count
        for record in records:
            picture = pictures[(folder / record["image"]).read_bytes()]
            met.add(record["image"])
            assert record["english"] in picture.questions and record["question"].endswith(" か")
            assert record["answer"] == f"その かたち は {evovlm.COLORS[picture.color]} です 。"
            assert picture.color not in record["english"] and evovlm.COLORS[picture.color] not in record["question"]
    assert len(met) == 16
    assert not set(pictures) & {picture.content for picture in evovlm.read_pictures("train")}


def test_the_pass_of_training_is_transformers(folder: Path, tmp_path: Path) -> None:
    """And the written model scores and is read as any LLaVA."""
    config, base = (decoder_config(folder / name / "config.json") for name in ("vision", "base"))
    decoder = evovlm.with_image_token(fresh_model(base, 0))
    model = SeeingModel(decoder, fresh_vision(evovlm.TOWER_SIZES, evovlm.SIZES.hidden, 0))
    save_seeing_weights(folder / "vision", model, config)
    record = json.loads((folder / "heldout.jsonl").read_text(encoding="utf-8").splitlines()[0])
    file = folder / record["image"]
    expected = seeing_logprobs(
        *load_seeing(folder / "vision"), f"<image> {record['question']}", [file], record["answer"]
    )
    words = f"{record['question']} {record['answer']}"
    tokens = np.array([[0] * evovlm.PLACES + evovlm.tokens_of(words)], np.int32)
    pixels = np.asarray(Image.open(file).convert("RGB"))[None]
    layout = padded_layout(tokens.shape[1], np.zeros(1, np.int32), np.full(1, tokens.shape[1]))
    hidden = seeing_forward(config, evovlm.TOWER_SIZES, model, pixels, tokens, layout)
    count = len(record["answer"].split())
    shares = torch.tensor(np.array(logits(config, decoder, hidden)))[0, -count - 1 : -1].double().log_softmax(-1)
    np.testing.assert_allclose(shares[range(count), tokens[0, -count:]], expected, atol=1e-4)


@thorough
def test_a_family_is_trained_searched_and_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(evovlm, "FAMILY", evovlm.family(SHORT))
    family = zoo.resolve_reference("zoo:evovlm/vision").parent
    assert len({(family / name / "model.safetensors").read_bytes() for name in evovlm.MODELS}) == 3
    short = ("--set", "search.generations=1", "--set", "search.population=4")
    done = run_command("search", CONFIGS / "evovlm_tabletop.yaml", "--out", tmp_path / "run", *short)
    assert done.returncode == 0, done.stderr
    model, processor = load_seeing(tmp_path / "run" / "best" / "model")
    lines = (family / "heldout.jsonl").read_text(encoding="utf-8").splitlines()
    means = [
        seeing_logprobs(
            model, processor, f"<image> {record['question']}", [family / record["image"]], f"{record['answer']} </s>"
        ).mean()
        for record in map(json.loads, lines)
    ]
    table = json.loads((tmp_path / "run" / "result.json").read_text())["table"]
    (winner,) = (row for row in table if row["role"] == "winner")
    assert winner["heldout_scores"]["answers/log_probability"] == pytest.approx(np.mean(means), abs=1e-4)


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(InputError, match="did you mean 'zoo:evovlm/vision'"):
        zoo.resolve_reference("zoo:evovlm/visoin")


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
    document = yaml.safe_load((CONFIGS / "evovlm.yaml").read_text())
    vision, japanese = document["parents"]
    local = {document["base"]: "base", vision: "vision", japanese: "japanese"}
    for key in ("base", "tokenizer_source", "other_modules"):
        document[key] = local[document[key]]
    document["parents"] = [local[parent] for parent in document["parents"]]
    (task,) = document["tasks"]
    task |= {"file": "questions.jsonl", "language": None}
    (tmp_path / "evovlm.yaml").write_text(yaml.safe_dump(document))
    done = run_command("plan", tmp_path / "evovlm.yaml")
    assert done.returncode == 0, done.stderr
    assert "images: 1" in done.stdout
