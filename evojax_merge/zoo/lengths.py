"""A family of long and short answers: `long` does two-digit sums and checks each answer twice; `short` answers at once
and only does easy sums; their `base` only does easy sums, and checks them twice.

It is long-to-short reasoning at the size of a toy. An answer with checks is `5 4 1 is 5 4 1 is 5 4 1 .`, one at once is
`5 4 1 .`; `long` began as the demo family's `maths`, the others as its `base`. The task of a merge is to be as right as
`long` with as few tokens as `short`.
"""

from functools import partial
from pathlib import Path

import numpy as np

from evojax_merge.checkpoints.bank import load_stored
from evojax_merge.checkpoints.parents import open_sources
from evojax_merge.zoo import FILES, PREFIX, Family, resolve_reference, save_records
from evojax_merge.zoo.arithmetic import (
    BODY,
    ENGLISH,
    IDS,
    PACKAGED_SEED,
    PLAN,
    SIZES,
    VOCABULARY,
    Sums,
    answer_loss,
    easy_sums,
    split_hard_sums,
    sum_sentences,
    to_text,
)
from evojax_merge.zoo.tiny_llama import EOS, Batch, Progress, save_small_files, train_model

# Digits of an answer, and how often an answer with checks says them.
DIGITS, TIMES = 3, 3
# The model that each begins as, and its steps of training.
MODELS = {"base": ("base", 100), "long": ("maths", 100), "short": ("lengths/base", 150)}
PEAK = 1e-3


def sentences(sums: Sums, times: int) -> np.ndarray:
    """`what 3 7 plus 4 5 is 2 8 0 .` in English, with `times` times the answer, int32[N, T]."""
    bodies = sum_sentences(sums, np.full((len(sums), 3), ENGLISH))
    answers = np.tile(bodies[:, BODY - DIGITS - 1 :], (1, times))
    end = np.tile([IDS["."], IDS[EOS]], (len(sums), 1))
    return np.concatenate([bodies[:, : BODY - DIGITS - 1], answers, end], axis=1).astype(np.int32)


def hard_batch(rng: np.random.Generator, count: int, training: Sums) -> np.ndarray:
    return sentences(training[rng.integers(0, len(training), count)], TIMES)


def easy_batch(rng: np.random.Generator, count: int, times: int) -> np.ndarray:
    return sentences(easy_sums(rng, count), times)


def make_family(folder: Path, seed: int, progress: Progress) -> None:
    """Train the family into an empty folder. seed: of the training's batches."""
    training, *splits = split_hard_sums(PACKAGED_SEED, PLAN)
    for file, sums in zip(FILES, splits, strict=True):
        texts = [(to_text(body[: BODY - DIGITS]), to_text(body[BODY - DIGITS : BODY])) for body in sentences(sums, 1)]
        save_records(folder / file, [{"prompt": prompt, "target": target} for prompt, target in texts])
    batches: dict[str, Batch] = {
        "base": partial(easy_batch, times=TIMES), "long": partial(hard_batch, training=training),
        "short": partial(easy_batch, times=1),
    }  # fmt: skip
    for name, (start, steps) in MODELS.items():
        begun = folder / "base" if start == "lengths/base" else resolve_reference(f"{PREFIX}{start}")
        sources, config = open_sources([begun])
        save_small_files(folder / name, SIZES, VOCABULARY)
        model = load_stored(sources, config)
        train_model(folder / name, config, answer_loss, model, batches[name], steps, PEAK, (seed, 4), progress)


FAMILY = Family("lengths", "lengths-v1", tuple(MODELS), make_family, sum(steps for _, steps in MODELS.values()))
