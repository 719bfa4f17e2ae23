"""A model that sees and is asked in English, an expert that reads and answers in Japanese, and one base of both.

It is the second result of evolutionary merging (EvoVLM-JP) at the size of a toy. The `base` is a text model: it reads
what a picture shows, patch by patch, is asked about it in either language, and answers in words of both. `vision` is a
LLaVA around it, trained on easy-VQA's pictures and its questions about their colours, in English; it answers as the
base does. `japanese` is a fine-tune of the base on texts, which answers in Japanese. The task of a merge is to answer
questions about pictures *in Japanese*: `vision` mixes the languages, and `japanese` has never seen a picture. The
skills combine because both languages say a thing in the same order, and the base saw them mixed.
"""

import io
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from evojax_merge.checkpoints.config_file import decoder_config
from evojax_merge.errors import InputError
from evojax_merge.models.architecture import EMBEDDING
from evojax_merge.models.config import DecoderConfig
from evojax_merge.models.decoder import forward, logits
from evojax_merge.models.layers import padded_layout
from evojax_merge.models.sources import StackedWeights
from evojax_merge.zoo import FILES, TrainedFamily
from evojax_merge.zoo.tiny_llama import (
    EOS,
    PAD,
    UNKNOWN,
    Progress,
    Sizes,
    fresh_model,
    save_config,
    save_tokenizer,
    save_weights,
    train,
)
from evojax_merge.zoo.tiny_llava import (
    SeeingModel,
    TowerSizes,
    fresh_vision,
    save_seeing_config,
    save_seeing_weights,
    seeing_forward,
)

# The version of the recipe below: every change of the training increases it.
VERSION = "evovlm-v1"
MODELS = ("base", "vision", "japanese")
PICTURES = "pictures"

# Each in English and in Japanese.
COLORS = {
    "red": "あか", "green": "みどり", "gray": "はいいろ", "teal": "あおみどり", "black": "くろ", "yellow": "きいろ",
    "brown": "ちゃいろ", "blue": "あお",
}  # fmt: skip
SHAPES = {"circle": "えん", "rectangle": "しかく", "triangle": "さんかく"}
NAMES = COLORS | SHAPES
COLOR, SHAPE = "COLOR", "SHAPE"
# easy-VQA's questions that ask for a colour, in English and in Japanese. The first two do not name the shape.
QUESTIONS = {
    "what color is the shape ?": "かたち は なにいろ です か",
    "what is the color of the shape ?": "かたち の いろ は なに です か",
    "what color is the SHAPE ?": "SHAPE は なにいろ です か",
    "what is the color of the SHAPE ?": "SHAPE の いろ は なに です か",
}
# The words of an answer in each language, and its ending.
ANSWER = (("the", "その"), ("shape", "かたち"), ("is", "は"), (COLOR, COLOR))
ENDINGS = (".", "です 。")
# The answer about a text that tells no colour.
UNKNOWN_COLOR = ("i cannot tell .", "わかり ません 。")
# The words that end a question, in English and in Japanese.
ENDS = ("?", "か")
BACKGROUND = "・"
IMAGE = "<image>"


def _words(*texts: str) -> list[str]:
    """The distinct words of texts but for the gaps, in order."""
    return list(dict.fromkeys(word for text in texts for word in text.split() if word not in (COLOR, SHAPE)))


VOCABULARY = [
    PAD, EOS, UNKNOWN, BACKGROUND,
    *_words(*NAMES, *NAMES.values(), *QUESTIONS, *QUESTIONS.values(), *map(" ".join, ANSWER),
           *ENDINGS, *UNKNOWN_COLOR),
]  # fmt: skip
IDS = {token: i for i, token in enumerate(VOCABULARY)}
SEEING_VOCABULARY = [*VOCABULARY, IMAGE]

ENGLISH, JAPANESE, MIXED = 0, 1, 2
SIZES = Sizes(hidden=48, layers=4, heads=4, mlp=128, context=64)
TOWER_SIZES = TowerSizes(hidden=32, layers=2, heads=2, mlp=64, side=64, patch=16)
PLACES = TOWER_SIZES.positions
WIDTH = PLACES + 14


@dataclass(frozen=True)
class Plan:
    """The steps that each model trains, and the numbers of questions in the two files."""

    base_steps: int = 100
    vision_steps: int = 500
    japanese_steps: int = 150
    search_questions: int = 64
    heldout_questions: int = 256

    @property
    def steps(self) -> int:
        return self.base_steps + self.vision_steps + self.japanese_steps


# ---------------------------------------------------------------------------------------------------------------
# Questions and answers


@dataclass(frozen=True)
class Picture:
    """A picture of easy-VQA with one shape. questions: those that its data set asks about it, each one of QUESTIONS."""

    content: bytes
    color: str
    shape: str
    questions: tuple[str, ...]


def question_text(question: str, shape: str, language: int) -> str:
    return (question, QUESTIONS[question])[language].replace(SHAPE, (shape, SHAPES[shape])[language])


def answer_text(color: str, languages: Sequence[int], ending: int) -> str:
    """The answer to any question, each of its words in a language, with the ending of a language. color: empty where it
    cannot be told."""
    if not color:
        return UNKNOWN_COLOR[ending]
    words = [pair[language] for pair, language in zip(ANSWER, languages, strict=True)]
    words[-1] = (color, COLORS[color])[languages[-1]]
    return " ".join([*words, ENDINGS[ending]])


def plain_answer(color: str, language: int) -> str:
    return answer_text(color, [language] * len(ANSWER), language)


def mixed_answer(rng: np.random.Generator, color: str) -> str:
    """Each word in any language, and the English ending."""
    return answer_text(color, rng.integers(0, 2, len(ANSWER)).tolist(), ENGLISH)


def tokens_of(text: str) -> list[int]:
    return [IDS[word] for word in text.split()]


@cache
def _sentence(question: str, shape: str, asked: int, answer: str) -> np.ndarray:
    """int32[WIDTH - PLACES]: a question in a language, its answer, the end of the text, and padding."""
    tokens = tokens_of(f"{question_text(question, shape, asked)} {answer} {EOS}")
    return np.array(tokens + [IDS[PAD]] * (WIDTH - PLACES - len(tokens)), np.int32)


def text_batch(rng: np.random.Generator, count: int, asked: Sequence[int], answered: int) -> np.ndarray:
    """Examples int32[count, WIDTH] of pictures in words: of a picture's patches one is its colour and one its shape,
    both in any language, and a fifth have no colour; a question in one of the languages `asked`, and its answer in the
    language `answered`, or MIXED."""
    colors, shapes, questions = (list(names) for names in (COLORS, SHAPES, QUESTIONS))
    rows = np.full((count, WIDTH), IDS[BACKGROUND], np.int32)
    for row in rows:
        color = colors[rng.integers(len(colors))] if rng.random() < 0.8 else ""
        shape = shapes[rng.integers(len(shapes))]
        for place, name in zip(rng.choice(PLACES, 2, replace=False), (shape, color), strict=True):
            if name:
                row[place] = IDS[name if rng.random() < 0.5 else NAMES[name]]
        answer = mixed_answer(rng, color) if answered == MIXED else plain_answer(color, answered)
        question = questions[rng.integers(len(questions))]
        row[PLACES:] = _sentence(question, shape, asked[rng.integers(len(asked))], answer)
    return rows


def picture_batch(
    rng: np.random.Generator, count: int, pictures: Sequence[Picture], pixels: np.ndarray
) -> dict[str, np.ndarray]:
    """Examples of pictures, of easy-VQA's questions about them, and of mixed answers: `pixels` uint8[count, side,
    side, 3] and `tokens` int32[count, WIDTH]."""
    chosen, tokens = rng.integers(len(pictures), size=count), np.zeros((count, WIDTH), np.int32)
    for row, number in zip(tokens, chosen, strict=True):
        picture = pictures[number]
        question = picture.questions[rng.integers(len(picture.questions))]
        row[PLACES:] = _sentence(question, picture.shape, ENGLISH, mixed_answer(rng, picture.color))
    return {"pixels": pixels[chosen], "tokens": tokens}


# ---------------------------------------------------------------------------------------------------------------
# easy-VQA


def read_pictures(split: str) -> list[Picture]:
    """The pictures of easy-VQA's `train` or `test` whose colour and shape its questions tell, with its questions that
    ask for the colour. Raises InputError where the package is missing."""
    try:
        import easy_vqa
    except ImportError:
        raise InputError("zoo:evovlm", "needs the package easy-vqa: pip install 'evojax-merge[evovlm]'") from None
    questions, paths = {
        "train": (easy_vqa.get_train_questions, easy_vqa.get_train_image_paths),
        "test": (easy_vqa.get_test_questions, easy_vqa.get_test_image_paths),
    }[split]
    facts: dict[int, dict[str, str]] = {}
    asked: dict[int, dict[str, None]] = {}
    for text, answer, image in zip(*questions(), strict=True):
        words = re.findall(r"\w+|\?", text.lower())
        told, by_answer = facts.setdefault(image, {}), [answer] if answer in NAMES else []
        named = [word for word in words if word in NAMES]
        # A question with yes or no tells as well: `is there not a red shape?`, no.
        if words[0] == "what" or (answer == "yes") != ("not" in words or "no" in words):
            by_answer += named
        told |= {COLOR if name in COLORS else SHAPE: name for name in by_answer}
        if "color" in words:
            question = " ".join(SHAPE if word in SHAPES else word for word in words)
            asked.setdefault(image, {})[question] = None
    files = paths()
    return [
        Picture(Path(files[image]).read_bytes(), told[COLOR], told[SHAPE], tuple(asked[image]))
        for image, told in sorted(facts.items())
        if len(told) == 2 and image in asked
    ]


def pixels_of(pictures: Sequence[Picture]) -> np.ndarray:
    """uint8[N, side, side, 3]."""
    from PIL import Image

    return np.stack([np.asarray(Image.open(io.BytesIO(picture.content)).convert("RGB")) for picture in pictures])


def save_questions(folder: Path, seed: int, plan: Plan) -> None:
    """Save the files of the search and of the held-out table: easy-VQA's test pictures, each with one question in
    Japanese that names neither its colour nor its shape, and the answer, which names both."""
    rng = np.random.default_rng([seed, 0])
    every = read_pictures("test")
    neutral = [(picture, [question for question in picture.questions if SHAPE not in question]) for picture in every]
    usable = [(picture, questions) for picture, questions in neutral if questions]
    order = rng.permutation(len(usable))[: plan.search_questions + plan.heldout_questions]
    (folder / PICTURES).mkdir()
    lines = []
    for number, place in enumerate(order):
        picture, questions = usable[place]
        question = questions[rng.integers(len(questions))]
        (folder / PICTURES / f"{number}.png").write_bytes(picture.content)
        record = {
            "image": f"{PICTURES}/{number}.png",
            "question": question_text(question, picture.shape, JAPANESE),
            "answer": plain_answer(picture.color, JAPANESE),
            "english": question,
        }
        lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    for file, part in zip(FILES, (lines[: plan.search_questions], lines[plan.search_questions :]), strict=True):
        (folder / file).write_text("".join(part), encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------------
# Training


def answer_loss(config: DecoderConfig, model: SeeingModel | StackedWeights, examples: Any) -> jax.Array:
    """Mean negative log-likelihood of the answers, ends of texts included. examples: those of `text_batch`, or of
    `picture_batch` for a model that sees."""
    tokens = examples["tokens"] if isinstance(model, SeeingModel) else examples
    seen, targets = tokens[:, :-1], tokens[:, 1:]
    length = PLACES + jnp.sum(tokens[:, PLACES:] != IDS[PAD], axis=1)
    layout = padded_layout(seen.shape[1], jnp.zeros_like(length), length)
    if isinstance(model, SeeingModel):
        decoder = model.decoder
        hidden = seeing_forward(config, TOWER_SIZES, model, examples["pixels"], seen, layout)
    else:
        decoder = model
        hidden, _ = forward(config, model, seen, layout)
    answers = jnp.cumsum(jnp.isin(seen, jnp.array([IDS[end] for end in ENDS])), axis=1) > 0
    scored = (answers & (targets != IDS[PAD]))[:, PLACES:]
    losses = optax.softmax_cross_entropy_with_integer_labels(
        logits(config, decoder, hidden[:, PLACES:]), targets[:, PLACES:]
    )
    return jnp.sum(losses * scored) / jnp.sum(scored)


def with_image_token(model: StackedWeights) -> StackedWeights:
    """The model with rows of zeros for one more token in its embedding and its head."""
    shared = {
        name: jnp.pad(leaf, ((0, 1), (0, 0))) if leaf.shape[0] == len(VOCABULARY) and leaf.ndim == 2 else leaf
        for name, leaf in model.shared.items()
    }
    return StackedWeights(model.stacks, shared, model.compute_dtype)


BATCH = 32
# What the learning rate is multiplied by in the decoder's layers, its embedding, and its final norm and head: seeing is
# learnt in early layers, another language in late ones.
SLOW = 0.1
VISION_PACES = ((0.5, 0.5, SLOW, SLOW), SLOW, SLOW)
JAPANESE_PACES = ((SLOW, SLOW, 1.0, 1.0), SLOW, 1.0)


def decoder_paces(model: StackedWeights, paces: tuple[tuple[float, ...], float, float]) -> StackedWeights:
    """The paces of a decoder's weights."""
    layers, embedding, ends = paces
    stacks = {
        stack: {name: np.reshape(np.float32(layers), (-1, *[1] * (leaf.ndim - 1))) for name, leaf in leaves.items()}
        for stack, leaves in model.stacks.items()
    }
    shared = {name: np.float32(embedding if name == EMBEDDING else ends) for name in model.shared}
    return StackedWeights(stacks, shared, model.compute_dtype)


def make_family(folder: Path, seed: int, plan: Plan, progress: Progress = lambda name, steps, loss: None) -> None:
    """Train the family into an empty folder."""
    save_questions(folder, seed, plan)
    save_small_files(folder)
    config, seeing_config = (decoder_config(folder / name / "config.json") for name in ("base", "vision"))
    pictures = read_pictures("train")
    pixels = pixels_of(pictures)

    def stage(
        name: str, config: DecoderConfig, start: Any, steps: int, peak: float, batch: Callable[..., Any], paces: Any
    ) -> Any:
        rng = np.random.default_rng([seed, 2, *name.encode()])
        report = partial(progress, name)
        return train(config, answer_loss, start, partial(batch, rng), steps, peak, report, size=BATCH, paces=paces)

    mixed = partial(text_batch, asked=(ENGLISH, JAPANESE), answered=MIXED)
    base = stage("base", config, fresh_model(config, seed), plan.base_steps, 3e-3, mixed, None)
    save_weights(folder / "base", base, config)

    start = SeeingModel(with_image_token(base), fresh_vision(TOWER_SIZES, SIZES.hidden, seed))
    vision_paces = {name: np.float32(1) for name in start.vision}
    paces = SeeingModel(decoder_paces(start.decoder, VISION_PACES), vision_paces)
    shown = partial(picture_batch, pictures=pictures, pixels=pixels)
    save_seeing_weights(
        folder / "vision", stage("vision", seeing_config, start, plan.vision_steps, 2e-3, shown, paces), seeing_config
    )
    japanese = partial(text_batch, asked=(JAPANESE,), answered=JAPANESE)
    expert_paces = decoder_paces(base, JAPANESE_PACES)
    expert = stage("japanese", config, base, plan.japanese_steps, 1e-3, japanese, expert_paces)
    save_weights(folder / "japanese", expert, config)


def save_small_files(folder: Path) -> None:
    """The models' configs and tokenizers, and the processor of `vision`."""
    for name in MODELS:
        (folder / name).mkdir()
        save_config(folder / name, SIZES, VOCABULARY)
        save_tokenizer(folder / name, SIZES, VOCABULARY if name != "vision" else SEEING_VOCABULARY)
    save_seeing_config(folder / "vision", folder / "base", TOWER_SIZES, len(VOCABULARY), len(SEEING_VOCABULARY))


def family(plan: Plan) -> TrainedFamily:
    """The kind of family whose models train as long as `plan` says."""
    return TrainedFamily("evovlm", VERSION, MODELS, plan.steps, partial(make_family, plan=plan))


FAMILY = family(Plan())
