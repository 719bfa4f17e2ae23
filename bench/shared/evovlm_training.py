"""Trains the models of the table-top EvoVLM (evojax_merge/zoo/evovlm.py) anew, into the package.

python -m bench.shared.evovlm_training    # five minutes on two cores
"""

import copy
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bench.shared.packaged_weights import pack_weights
from evojax_merge.tasks.images import read_rgb
from evojax_merge.zoo.evovlm import (
    BACKGROUND,
    COLOR,
    COLORS,
    ENGLISH,
    IDS,
    IMAGE,
    JAPANESE,
    MODELS,
    PLACES,
    QUESTIONS,
    SHAPE,
    SHAPES,
    TOWER,
    WEIGHTS,
    Picture,
    Question,
    read_pictures,
    save_small_files,
)
from evojax_merge.zoo.tiny_llama import EOS, Progress
from evojax_merge.zoo.torch_training import seeded_torch, train

# The decoder's layers that `vision` trains; `japanese` trains the others.
LOWER_LAYERS = 2
WIDTH = PLACES + 14


@dataclass(frozen=True)
class Plan:
    """The steps that each model trains."""

    base_steps: int = 600
    upper_steps: int = 500
    lower_steps: int = 500
    tower_steps: int = 2500
    projector_steps: int = 1400
    vision_steps: int = 60


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


def pixels_of(pictures: Sequence[Picture]) -> np.ndarray:
    """uint8[N, side, side, 3]."""
    return np.stack([np.asarray(read_rgb("easy-VQA", picture.content)) for picture in pictures])


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


def main() -> None:
    done: Counter[str] = Counter()

    def show(name: str, steps: int, loss: float) -> None:
        done[name] += steps
        if done[name] % 20 == 0:
            print(f"{name}  step {done[name]:,}  loss {loss:.4f}", file=sys.stderr)

    with tempfile.TemporaryDirectory() as folder:
        train_models(Path(folder), Plan(), show)
        pack_weights(Path(folder), MODELS, WEIGHTS, np.float16)


if __name__ == "__main__":
    main()
