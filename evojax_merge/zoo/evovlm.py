"""A vision-language model that answers in English, a text model that answers in Japanese, and the base of both.

It is EvoVLM-JP (arXiv 2403.13187) at the size of a toy. The `base` is a tiny Llama that is told in words what each
patch of a picture shows, is asked about the picture in English or Japanese, and answers in English. `vision` is a LLaVA
around it: a CLIP tower and a projector that learnt to say the base's words for the colour and the shape of easy-VQA's
pictures, and a decoder that was trained a little on easy-VQA's questions in English. `japanese` is the base trained on
texts alone: first its upper half and its head, to answer in Japanese; then its embedding and lower half, after the
vectors of the colours and those of the shapes have changed places, as by a tokenizer of its own: the vector that says
red to the base says blue to it.
The task of a merge is to answer questions about pictures in Japanese: `vision` answers them in English, and `japanese`
cannot read a picture.

The weights come with the package (bench/shared/evovlm_training.py trained them). Families of other seeds have the same
models and other questions.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from evojax_merge.errors import InputError
from evojax_merge.zoo import FILES, Family, save_records, tiny_llama
from evojax_merge.zoo.tiny_llama import EOS, PAD, UNKNOWN, Sizes, unpack_weights

MODELS = ("base", "vision", "japanese")
PICTURES = "pictures"
# One file a model, in float16.
WEIGHTS = Path(__file__).parent / "weights" / "evovlm"

COLORS = {
    "red": "あか", "green": "みどり", "gray": "はいいろ", "teal": "あおみどり", "black": "くろ", "yellow": "きいろ",
    "brown": "ちゃいろ", "blue": "あお",
}  # fmt: skip
SHAPES = {"circle": "えん", "rectangle": "しかく", "triangle": "さんかく"}
NAMES = COLORS | SHAPES
COLOR, SHAPE = "COLOR", "SHAPE"
# easy-VQA's questions that begin with "what", in English and in Japanese.
QUESTIONS = {
    "what color is the SHAPE ?": "SHAPE は なにいろ です か",
    "what color is the shape ?": "かたち は なにいろ です か",
    "what is the COLOR shape ?": "COLOR の かたち は なに です か",
    "what is the color of the SHAPE ?": "SHAPE の いろ は なに です か",
    "what is the color of the shape ?": "かたち の いろ は なに です か",
    "what shape does the image contain ?": "え に なに が あり ます か",
    "what shape is in the image ?": "え に どの かたち が あり ます か",
    "what shape is present ?": "どの かたち が あり ます か",
}
# The answers to a question about the colour, and to one about the shape, in English and in Japanese.
COLOR_ANSWERS = ("the SHAPE is COLOR .", "SHAPE は COLOR です 。")
SHAPE_ANSWERS = ("a COLOR SHAPE .", "COLOR の SHAPE です 。")
BACKGROUND, IMAGE = "・", "<image>"
ENGLISH, JAPANESE = 0, 1


def _words(*texts: str) -> list[str]:
    """The distinct words of texts but for the gaps, in order."""
    return list(dict.fromkeys(word for text in texts for word in text.split() if word not in (COLOR, SHAPE)))


VOCABULARY = [
    PAD, EOS, UNKNOWN, BACKGROUND,
    *_words(*NAMES, *NAMES.values(), *QUESTIONS, *QUESTIONS.values(), *COLOR_ANSWERS, *SHAPE_ANSWERS),
]  # fmt: skip
SEEING_VOCABULARY = [*VOCABULARY, IMAGE]
IDS = {token: i for i, token in enumerate(SEEING_VOCABULARY)}

SIZES = Sizes(hidden=64, layers=4, heads=4, mlp=192, context=64)
SIDE, PATCH = 64, 16
PLACES = (SIDE // PATCH) ** 2
TOWER = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128, "image_size": SIDE,
    "patch_size": PATCH,
}  # fmt: skip
HALF = [0.5, 0.5, 0.5]
PIXELS = {
    "image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": SIDE},
    "crop_size": {"height": SIDE, "width": SIDE}, "do_resize": True, "do_center_crop": True, "do_convert_rgb": True,
    "do_normalize": True, "do_rescale": True, "rescale_factor": 1 / 255, "resample": 3, "image_mean": HALF,
    "image_std": HALF,
}  # fmt: skip
PLACEMENT = {
    "processor_class": "LlavaProcessor", "image_token": IMAGE, "patch_size": PATCH, "num_additional_image_tokens": 1,
    "vision_feature_select_strategy": "default",
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------
# Questions and answers


@dataclass(frozen=True)
class Question:
    """A question of easy-VQA: a key of QUESTIONS, and the colour or shape that it names, which may be empty."""

    text: str
    named: str

    def ask(self, language: int) -> str:
        text = (self.text, QUESTIONS[self.text])[language]
        name = (self.named, NAMES.get(self.named, ""))[language]
        return text.replace(COLOR, name).replace(SHAPE, name)

    def answer(self, color: str, shape: str, language: int) -> str:
        """The answer about a picture in a language."""
        names = (color, shape) if language == ENGLISH else (COLORS[color], SHAPES[shape])
        answers = COLOR_ANSWERS if "color" in self.text else SHAPE_ANSWERS
        return answers[language].replace(COLOR, names[0]).replace(SHAPE, names[1])


@dataclass(frozen=True)
class Picture:
    """A picture of easy-VQA, which shows one shape, with the questions that its data set asks about it."""

    content: bytes
    color: str
    shape: str
    questions: tuple[Question, ...]


def read_pictures(split: str) -> list[Picture]:
    """The pictures of easy-VQA's `train` or `test` whose colour and shape its questions tell. Raises InputError where
    the package is missing."""
    try:
        import easy_vqa
    except ImportError:
        raise InputError("zoo:evovlm", "needs the package easy-vqa: pip install 'evojax-merge[evovlm]'") from None
    questions, paths = {
        "train": (easy_vqa.get_train_questions, easy_vqa.get_train_image_paths),
        "test": (easy_vqa.get_test_questions, easy_vqa.get_test_image_paths),
    }[split]
    facts: dict[int, dict[str, str]] = {}
    asked: dict[int, list[Question]] = {}
    for text, answer, image in zip(*questions(), strict=True):
        words = re.findall(r"\w+|\?", text.lower())
        names = [word for word in words if word in NAMES]
        by_answer = [answer] if answer in NAMES else []
        # A question with yes or no tells as well: `is there not a red shape?`, no.
        if words[0] == "what" or (answer == "yes") != ("not" in words or "no" in words):
            by_answer += names
        picture_facts = facts.setdefault(image, {})
        picture_facts |= {COLOR if name in COLORS else SHAPE: name for name in by_answer}
        template = " ".join(COLOR if word in COLORS else SHAPE if word in SHAPES else word for word in words)
        if template in QUESTIONS:
            asked.setdefault(image, []).append(Question(template, "".join(names)))
    files = paths()
    return [
        Picture(Path(files[image]).read_bytes(), names[COLOR], names[SHAPE], tuple(asked[image]))
        for image, names in sorted(facts.items())
        if len(names) == 2 and image in asked
    ]


def save_questions(folder: Path, seed: int, counts: tuple[int, int]) -> None:
    """Save the files of the search and of the held-out table, of so many questions: easy-VQA's test pictures, each with
    one of its questions and the answer, in Japanese and in English."""
    rng = np.random.default_rng([seed, 0])
    pictures = read_pictures("test")
    order = rng.permutation(len(pictures))[: sum(counts)]
    (folder / PICTURES).mkdir()
    records = []
    for number, picture in enumerate(pictures[place] for place in order):
        question = picture.questions[rng.integers(len(picture.questions))]
        (folder / PICTURES / f"{number}.png").write_bytes(picture.content)
        records.append({
            "image": f"{PICTURES}/{number}.png",
            "question": question.ask(JAPANESE),
            "answer": question.answer(picture.color, picture.shape, JAPANESE),
            "english_question": question.ask(ENGLISH),
            "english_answer": question.answer(picture.color, picture.shape, ENGLISH),
        })  # fmt: skip
    for file, part in zip(FILES, (records[: counts[0]], records[counts[0] :]), strict=True):
        save_records(folder / file, part)


# ---------------------------------------------------------------------------------------------------------------
# Files


def save_small_files(folder: Path) -> None:
    """The models' configs and tokenizers, and the processor of `vision`."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    seeing = folder / "vision"
    for name in ("base", "japanese"):
        tiny_llama.save_small_files(folder / name, SIZES, VOCABULARY)
    tiny_llama.save_small_files(seeing, SIZES, SEEING_VOCABULARY, [IMAGE])
    decoder = LlamaConfig.from_pretrained(folder / "base")
    decoder.vocab_size = len(SEEING_VOCABULARY)
    LlavaConfig(
        architectures=["LlavaForConditionalGeneration"], text_config=decoder, vision_config=CLIPVisionConfig(**TOWER),
        image_token_index=IDS[IMAGE], vision_feature_layer=-1, vision_feature_select_strategy="default",
        image_seq_length=PLACES, tie_word_embeddings=False, dtype="float32",
    ).save_pretrained(seeing)  # fmt: skip
    for file, content in (("preprocessor_config.json", PIXELS), ("processor_config.json", PLACEMENT)):
        (seeing / file).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def unpack_family(folder: Path, seed: int, questions: tuple[int, int] = (128, 256)) -> None:
    """Write the packaged models, in float32, and a seed's questions into an empty folder. questions: the numbers of
    those in the two files."""
    save_questions(folder, seed, questions)
    save_small_files(folder)
    unpack_weights(WEIGHTS, folder, MODELS)


FAMILY = Family("evovlm", "evovlm-v2", MODELS, unpack_family)
