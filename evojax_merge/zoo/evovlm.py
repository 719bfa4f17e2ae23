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

The weights come with the package. Families of other seeds have the same models and other questions.

python -m evojax_merge.zoo.evovlm    # trains the models anew, into the package
"""

import copy
import json
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from evojax_merge.errors import InputError
from evojax_merge.tasks.images import read_rgb
from evojax_merge.zoo import FILES, PackagedFamily
from evojax_merge.zoo.tiny_llama import EOS, PAD, UNKNOWN, Progress, Sizes, save_config, save_tensors, save_tokenizer
from evojax_merge.zoo.torch_training import seeded_torch, train

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
# The decoder's layers that `vision` trains; `japanese` trains the others.
LOWER_LAYERS = 2
SIDE, PATCH = 64, 16
PLACES = (SIDE // PATCH) ** 2
WIDTH = PLACES + 14
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


@dataclass(frozen=True)
class Plan:
    """The steps that each model trains, and the numbers of questions in the two files."""

    base_steps: int = 600
    upper_steps: int = 500
    lower_steps: int = 500
    tower_steps: int = 2500
    projector_steps: int = 1400
    vision_steps: int = 60
    search_questions: int = 128
    heldout_questions: int = 256


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


def pixels_of(pictures: Sequence[Picture]) -> np.ndarray:
    """uint8[N, side, side, 3]."""
    return np.stack([np.asarray(read_rgb("easy-VQA", picture.content)) for picture in pictures])


def save_questions(folder: Path, seed: int, plan: Plan) -> None:
    """Save the files of the search and of the held-out table: easy-VQA's test pictures, each with one of its
    questions and the answer, in Japanese and in English."""
    rng = np.random.default_rng([seed, 0])
    pictures = read_pictures("test")
    order = rng.permutation(len(pictures))[: plan.search_questions + plan.heldout_questions]
    (folder / PICTURES).mkdir()
    lines = []
    for number, picture in enumerate(pictures[place] for place in order):
        question = picture.questions[rng.integers(len(picture.questions))]
        (folder / PICTURES / f"{number}.png").write_bytes(picture.content)
        record = {
            "image": f"{PICTURES}/{number}.png",
            "question": question.ask(JAPANESE),
            "answer": question.answer(picture.color, picture.shape, JAPANESE),
            "english_question": question.ask(ENGLISH),
            "english_answer": question.answer(picture.color, picture.shape, ENGLISH),
        }
        lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    for file, part in zip(FILES, (lines[: plan.search_questions], lines[plan.search_questions :]), strict=True):
        (folder / file).write_text("".join(part), encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------------
# Batches


IGNORED = -100
# The least share of a picture in words that is not blank.
MOST_BLANK = 0.4


def description(color: str, shape: str) -> list[int]:
    """The tokens that say in words what the patches of a picture show."""
    return [IDS[color], IDS[shape]] * (PLACES // 2)


def _append(tokens: np.ndarray, labels: np.ndarray, question: str, answer: str) -> None:
    """Write a question, its answer and the end of the text behind a row's picture; only the answer is a label."""
    asked, answered = ([IDS[word] for word in text.split()] for text in (question, f"{answer} {EOS}"))
    start, end = PLACES + len(asked), PLACES + len(asked) + len(answered)
    tokens[PLACES:start], tokens[start:end] = asked, answered
    labels[start:end] = answered


def _rows(count: int, picture: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens int64[count, WIDTH] that begin with a picture's tokens, and labels that are all ignored."""
    tokens = np.zeros((count, WIDTH), np.int64)
    tokens[:, :PLACES] = picture
    return tokens, np.full((count, WIDTH), IGNORED, np.int64)


def text_batch(rng: np.random.Generator, count: int, answered: int) -> dict[str, np.ndarray]:
    """Questions in both languages about pictures in words, answered in one: `input_ids` and `labels`,
    int64[count, WIDTH]. Every other patch of a picture is its colour, the others its shape, in English; some are blank.
    """
    colors, shapes, texts = list(COLORS), list(SHAPES), list(QUESTIONS)
    tokens, labels = _rows(count, IDS[BACKGROUND])
    for row, label in zip(tokens, labels, strict=True):
        color, shape = colors[rng.integers(len(colors))], shapes[rng.integers(len(shapes))]
        shown = rng.random(PLACES) < rng.uniform(MOST_BLANK, 1)
        pair = 2 * rng.integers(PLACES // 2)
        shown[pair : pair + 2] = True
        row[:PLACES][shown] = np.array(description(color, shape))[shown]
        text = texts[rng.integers(len(texts))]
        question = Question(text, color if COLOR in text else shape if SHAPE in text else "")
        _append(row, label, question.ask(int(rng.integers(2))), question.answer(color, shape, answered))
    return {"input_ids": tokens, "labels": labels}


def turn(rng: np.random.Generator, pixels: np.ndarray) -> np.ndarray:
    """The pictures uint8[N, side, side, 3], turned by a quarter, a half, three quarters or not at all."""
    return np.rot90(pixels, int(rng.integers(4)), (1, 2))


def pixel_values(pixels: np.ndarray) -> np.ndarray:
    """float32[N, 3, side, side]: the pictures uint8[N, side, side, 3] as the processor prepares them."""
    return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)).astype(np.float32) / 127.5 - 1


def picture_batch(
    rng: np.random.Generator, count: int, pictures: Sequence[Picture], pixels: np.ndarray
) -> dict[str, np.ndarray]:
    """Pictures, questions about them and answers, both in English: the inputs of LLaVA, with labels."""
    chosen = rng.integers(len(pictures), size=count)
    tokens, labels = _rows(count, IDS[IMAGE])
    for row, label, picture in zip(tokens, labels, (pictures[number] for number in chosen), strict=True):
        question = picture.questions[rng.integers(len(picture.questions))]
        _append(row, label, question.ask(ENGLISH), question.answer(picture.color, picture.shape, ENGLISH))
    return {"pixel_values": pixel_values(turn(rng, pixels[chosen])), "input_ids": tokens, "labels": labels}


# ---------------------------------------------------------------------------------------------------------------
# Files


def save_small_files(folder: Path) -> None:
    """The models' configs and tokenizers, and the processor of `vision`."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    for name in MODELS:
        (folder / name).mkdir()
        save_config(folder / name, SIZES, VOCABULARY)
    for name in ("base", "japanese"):
        save_tokenizer(folder / name, SIZES, VOCABULARY)
    seeing = folder / "vision"
    save_tokenizer(seeing, SIZES, SEEING_VOCABULARY, [IMAGE])
    decoder = LlamaConfig.from_pretrained(folder / "base")
    decoder.vocab_size = len(SEEING_VOCABULARY)
    LlavaConfig(
        architectures=["LlavaForConditionalGeneration"], text_config=decoder, vision_config=CLIPVisionConfig(**TOWER),
        image_token_index=IDS[IMAGE], vision_feature_layer=-1, vision_feature_select_strategy="default",
        image_seq_length=PLACES, tie_word_embeddings=False, dtype="float32",
    ).save_pretrained(seeing)  # fmt: skip
    for file, content in (("preprocessor_config.json", PIXELS), ("processor_config.json", PLACEMENT)):
        (seeing / file).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def unpack_family(folder: Path, seed: int, plan: Plan | None = None) -> None:
    """Write the packaged models, in float32, and a seed's questions into an empty folder."""
    save_questions(folder, seed, plan or Plan())
    save_small_files(folder)
    for name in MODELS:
        packed = load_file(WEIGHTS / f"{name}.safetensors")
        save_tensors(folder / name, {tensor: values.astype(np.float32) for tensor, values in packed.items()})


def pack_models(folder: Path) -> None:
    """Make trained models the packaged ones."""
    WEIGHTS.mkdir(exist_ok=True, parents=True)
    for name in MODELS:
        tensors = load_file(folder / name / "model.safetensors")
        narrow = {tensor: values.astype(np.float16) for tensor, values in tensors.items()}
        save_file(narrow, WEIGHTS / f"{name}.safetensors")


# ---------------------------------------------------------------------------------------------------------------
# Training


BATCH, PICTURES_BATCH, TOWER_BATCH = 32, 64, 96
WARMUP = 0.1
# The most pixels by which a picture is shifted.
SHIFT = 3
BASE_RATE, JAPANESE_RATE, LOWER_RATE, TOWER_RATE, PROJECTOR_RATE, VISION_RATE = 3e-3, 3e-3, 3e-3, 2.5e-3, 1e-3, 5e-5
# The most noise that the words of a picture have in texts, in standard deviations.
WORD_NOISE = 1.0


def text_loss(module: Any, input_ids: Any, labels: Any) -> Any:
    """The mean negative log-likelihood of answers, where the words of the pictures are as imperfect as those that a
    projector finds: noise of a size that differs from text to text, and partly the same in all words of a picture."""
    import torch

    embedding = module.model.embed_tokens
    vectors = embedding(input_ids)
    count, _, hidden = vectors.shape
    size = WORD_NOISE * torch.rand(count, 1, 1) * embedding.weight.detach().std()
    shared = torch.rand(count, 1, 1)
    common = torch.randn(count, 2, hidden).repeat(1, PLACES // 2, 1)
    noise = shared * common + (1 - shared**2).sqrt() * torch.randn(count, PLACES, hidden)
    noisy = torch.cat([vectors[:, :PLACES] + size * noise, vectors[:, PLACES:]], 1)
    return module(inputs_embeds=noisy, labels=labels).loss


def tower_loss(module: Any, pixel_values: Any, colors: Any, shapes: Any) -> Any:
    """The mean negative log-likelihood of the pictures' colours and shapes; module: a tower and a linear layer."""
    from torch.nn.functional import cross_entropy

    tower, head = module
    scores = head(tower(pixel_values=pixel_values, output_hidden_states=True).hidden_states[-1][:, 1:].mean(1))
    return cross_entropy(scores[:, : len(COLORS)], colors) + cross_entropy(scores[:, len(COLORS) :], shapes)


def words_loss(module: Any, pixel_values: Any, words: Any) -> Any:
    """The mean squared distance between what a tower and a projector say of pictures' patches and words."""
    tower, projector = module
    patches = tower(pixel_values=pixel_values, output_hidden_states=True).hidden_states[-1][:, 1:]
    return ((projector(patches) - words) ** 2).mean()


def clipped_one_cycle(weights: list[Any], steps: int, rate: float) -> tuple[Any, Any]:
    """AdamW with clipped gradients, without a decay of the weights, and with a shorter memory of the gradients'
    squares: a projector that is trained without these stays far from the words."""
    import torch

    optimizer = torch.optim.AdamW(weights, lr=rate, betas=(0.9, 0.98), weight_decay=0.0)

    def clip(*_: Any) -> None:
        torch.nn.utils.clip_grad_norm_(weights, 1.0)

    optimizer.register_step_pre_hook(clip)
    return optimizer, torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rate, total_steps=steps, pct_start=WARMUP, cycle_momentum=False
    )


def train_models(folder: Path, plan: Plan, progress: Progress = lambda name, steps, loss: None, seed: int = 0) -> None:
    """Train the models into an empty folder."""
    save_small_files(folder)
    pictures = read_pictures("train")
    pixels = pixels_of(pictures)
    with seeded_torch("zoo:evovlm", seed) as torch:
        from transformers import CLIPVisionModel, LlamaConfig, LlamaForCausalLM, LlavaConfig
        from transformers import LlavaForConditionalGeneration as Llava

        def stage(
            name: str, module: Any, batch: Callable[[np.random.Generator], dict[str, np.ndarray]], steps: int,
            rate: float, **loss: Any,
        ) -> Any:  # fmt: skip
            rng = np.random.default_rng([seed, 2, *name.encode()])

            def inputs() -> dict[str, Any]:
                return {key: torch.from_numpy(values) for key, values in batch(rng).items()}

            return train(module, inputs, steps, rate, partial(progress, name), optimiser=clipped_one_cycle, **loss)

        def in_japanese(rng: np.random.Generator) -> dict[str, np.ndarray]:
            return text_batch(rng, BATCH, JAPANESE)

        def in_english(rng: np.random.Generator) -> dict[str, np.ndarray]:
            return text_batch(rng, BATCH, ENGLISH)

        fresh = LlamaForCausalLM(LlamaConfig.from_pretrained(folder / "base"))
        base = stage("base", fresh, in_english, plan.base_steps, BASE_RATE, loss=text_loss)
        base.save_pretrained(folder / "base")

        upper = copy.deepcopy(base).requires_grad_(False)
        for part in (upper.model.layers[LOWER_LAYERS:], upper.model.norm, upper.lm_head):
            part.requires_grad_(True)
        japanese = stage("upper half", upper, in_japanese, plan.upper_steps, JAPANESE_RATE, loss=text_loss)
        japanese.requires_grad_(False)
        embedding, layers = japanese.model.embed_tokens, japanese.model.layers[:LOWER_LAYERS]
        for names in (COLORS, SHAPES):
            rows = [IDS[name] for name in names]
            embedding.weight[rows] = embedding.weight[rows[1:] + rows[:1]].clone()
        for part in (embedding, layers):
            part.requires_grad_(True)
        japanese = stage("lower half", japanese, in_japanese, plan.lower_steps, LOWER_RATE)
        japanese.save_pretrained(folder / "japanese")

        labels = np.array(
            [(list(COLORS).index(picture.color), list(SHAPES).index(picture.shape)) for picture in pictures]
        )
        table = base.model.embed_tokens.weight.detach().numpy()
        spread = table.std()
        words = np.array([table[description(picture.color, picture.shape)] for picture in pictures]) / spread

        def mirrored(rng: np.random.Generator, chosen: np.ndarray) -> np.ndarray:
            return turn(rng, pixels[chosen])[:, :, :: 1 if rng.random() < 0.5 else -1]

        def labelled(rng: np.random.Generator) -> dict[str, np.ndarray]:
            chosen = rng.integers(len(pictures), size=TOWER_BATCH)
            shifted = np.roll(mirrored(rng, chosen), rng.integers(-SHIFT, SHIFT + 1, size=2), (1, 2))
            return {
                "pixel_values": pixel_values(shifted), "colors": labels[chosen, 0], "shapes": labels[chosen, 1]
            }  # fmt: skip

        def described(rng: np.random.Generator) -> dict[str, np.ndarray]:
            chosen = rng.integers(len(pictures), size=PICTURES_BATCH)
            return {"pixel_values": pixel_values(mirrored(rng, chosen)), "words": words[chosen]}

        config = LlavaConfig.from_pretrained(folder / "vision")
        tower = CLIPVisionModel(config.vision_config)
        head = torch.nn.Linear(TOWER["hidden_size"], len(COLORS) + len(SHAPES))
        classifier = torch.nn.ModuleList([tower, head])
        tower, _ = stage("tower", classifier, labelled, plan.tower_steps, TOWER_RATE, loss=tower_loss)
        vision = Llava(config)
        projector = vision.model.multi_modal_projector
        for linear in (projector.linear_1, projector.linear_2):
            torch.nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
            torch.nn.init.zeros_(linear.bias)
        speaker = torch.nn.ModuleList([tower, projector])
        tower, projector = stage("projector", speaker, described, plan.projector_steps, PROJECTOR_RATE, loss=words_loss)
        with torch.no_grad():
            # The words were scaled to a deviation of one.
            for weights in projector.linear_2.parameters():
                weights.mul_(spread)
            for name, weights in base.state_dict().items():
                ours = vision.get_parameter(name.replace("model.", "model.language_model.", 1))
                ours.zero_()[: len(weights)].copy_(weights)
        vision.model.vision_tower.load_state_dict(tower.state_dict())
        vision.model.multi_modal_projector.load_state_dict(projector.state_dict())
        for part in (vision.model.language_model.embed_tokens, vision.model.language_model.norm, vision.lm_head):
            part.requires_grad_(False)

        def shown(rng: np.random.Generator) -> dict[str, np.ndarray]:
            # A quarter are texts, without which the model would forget the Japanese that the base reads.
            if rng.random() < 0.25:
                return in_english(rng)
            return picture_batch(rng, BATCH, pictures, pixels)

        stage("vision", vision, shown, plan.vision_steps, VISION_RATE).save_pretrained(folder / "vision")


FAMILY = PackagedFamily("evovlm", "evovlm-v2", MODELS, unpack_family)


def main() -> None:
    done: Counter[str] = Counter()

    def show(name: str, steps: int, loss: float) -> None:
        done[name] += steps
        if done[name] % 20 == 0:
            print(f"{name}  step {done[name]:,}  loss {loss:.4f}", file=sys.stderr)

    with tempfile.TemporaryDirectory() as folder:
        train_models(Path(folder), Plan(), show)
        pack_models(Path(folder))


if __name__ == "__main__":
    main()
