"""The demo family: a base and two experts of sums in two languages, trained in a minute or two.

It is the Japanese-maths result of evolutionary merging at the size of a toy: the `maths` expert does two-digit sums, in
English; the `japanese` expert answers in Japanese, easy sums only; the task of a merge is two-digit sums *in Japanese*,
which no model of the family ever saw. The skills combine for three reasons: digits are tokens that both languages
share, both languages say a thing in the same number of words, and the base saw the languages mixed.

The weights that come with the package were made by bench/shared/packaged_weights.py.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from evojax_merge.checkpoints.bank import load_stored
from evojax_merge.checkpoints.config_file import decoder_config
from evojax_merge.checkpoints.parents import open_sources
from evojax_merge.models.config import DecoderConfig
from evojax_merge.models.decoder import forward, logits
from evojax_merge.models.layers import padded_layout
from evojax_merge.models.sources import StackedWeights
from evojax_merge.zoo import MODELS, PREFIX, resolve_reference, save_records
from evojax_merge.zoo.tiny_llama import (
    DIGITS,
    EOS,
    PAD,
    UNKNOWN,
    Batch,
    Plan,
    Progress,
    Sizes,
    fresh_model,
    save_small_files,
    train_model,
    unpack_weights,
)

# A word in English and in Japanese.
WORDS = {
    "ask": ("what", "いくつ"),
    "plus": ("plus", "たす"),
    "minus": ("minus", "ひく"),
    "is": ("is", "は"),
    "copy": ("copy", "うつす"),
    "count": ("count", "かぞえる"),
}
ENDINGS = ((".",), ("です", "。"))
VOCABULARY = [PAD, EOS, UNKNOWN, *DIGITS, *(word for pair in WORDS.values() for word in pair), ".", "です", "。"]
IDS = {token: i for i, token in enumerate(VOCABULARY)}
# Row per word: its token in each language.
WORD_IDS = {name: np.array([IDS[word] for word in pair], np.int32) for name, pair in WORDS.items()}

ENGLISH, JAPANESE, MIXED = 0, 1, 2
# Every sentence has ten tokens; the ending and the end of the text take up to three more.
BODY, WIDTH = 10, 13

SIZES = Sizes(hidden=96, layers=3, heads=4, mlp=256, context=64)
# The highest learning rate of each model.
PEAKS = (3e-3, 2e-3, 1e-3)
PLAN = Plan(steps=(1200, 800, 300), examples=(256, 512))


@dataclass(frozen=True)
class Sums:
    """Problems `first ± second`, int[N] each; `minus`: bool[N]."""

    first: np.ndarray
    second: np.ndarray
    minus: np.ndarray

    def __len__(self) -> int:
        return len(self.first)

    def __getitem__(self, rows: Any) -> "Sums":
        return Sums(self.first[rows], self.second[rows], self.minus[rows])

    @property
    def results(self) -> np.ndarray:
        return np.where(self.minus, self.first - self.second, self.first + self.second)


# ---------------------------------------------------------------------------------------------------------------
# Problems and sentences


def split_hard_sums(seed: int, plan: Plan) -> tuple[Sums, Sums, Sums]:
    """(for training, for the search, held out): all sums and differences of two numbers from 10 to 99 whose result is
    not negative. The two files share no unordered pair of numbers with the training."""
    first, second = (grid.ravel() for grid in np.meshgrid(np.arange(10, 100), np.arange(10, 100), indexing="ij"))
    down = first >= second
    everything = Sums(
        np.concatenate([first, first[down]]),
        np.concatenate([second, second[down]]),
        np.repeat([False, True], [len(first), int(down.sum())]),
    )
    pair = np.minimum(everything.first, everything.second) * 100 + np.maximum(everything.first, everything.second)
    order = np.random.default_rng([seed, 0]).permutation(len(everything))
    # One problem per pair: the first in the shuffled order.
    _, firsts = np.unique(pair[order], return_index=True)
    distinct = order[np.sort(firsts)]
    chosen = distinct[: sum(plan.examples)]
    training = everything[~np.isin(pair, pair[chosen])]
    return training, everything[chosen[: plan.examples[0]]], everything[chosen[plan.examples[0] :]]


def easy_sums(rng: np.random.Generator, count: int) -> Sums:
    """Sums and differences whose second number has one digit."""
    first, second, minus = rng.integers(0, 100, count), rng.integers(0, 10, count), rng.random(count) < 0.5
    return Sums(
        np.where(minus, np.maximum(first, second), first), np.where(minus, np.minimum(first, second), second), minus
    )


def _digits(numbers: np.ndarray, count: int) -> np.ndarray:
    """Tokens `int[N, count]` of the digits, highest first."""
    return IDS["0"] + numbers[:, None] // 10 ** np.arange(count)[::-1] % 10


def sum_sentences(sums: Sums, languages: np.ndarray) -> np.ndarray:
    """`what 3 7 plus 4 5 is 2 8 0`, int[N, BODY]: the result's digits come lowest first. languages: int[N, 3], the
    language of each word."""
    ask, is_ = WORD_IDS["ask"][languages[:, 0]], WORD_IDS["is"][languages[:, 2]]
    sign = np.where(sums.minus, WORD_IDS["minus"][languages[:, 1]], WORD_IDS["plus"][languages[:, 1]])
    return np.concatenate(
        [
            ask[:, None], _digits(sums.first, 2), sign[:, None], _digits(sums.second, 2), is_[:, None],
            _digits(sums.results, 3)[:, ::-1],
        ],
        axis=1,
    )  # fmt: skip


def _languages(rng: np.random.Generator, manners: np.ndarray) -> np.ndarray:
    """int[N, 3]: the language of each word of sentences that are ENGLISH, JAPANESE or MIXED."""
    return np.where(manners[:, None] == MIXED, rng.integers(0, 2, (len(manners), 3)), manners[:, None])


def _end(bodies: np.ndarray, ending: int) -> np.ndarray:
    """Append a language's ending and the end of the text, and pad to WIDTH."""
    tail = [IDS[token] for token in (*ENDINGS[ending], EOS)]
    tail += [IDS[PAD]] * (WIDTH - BODY - len(tail))
    return np.concatenate([bodies, np.tile(np.array(tail), (len(bodies), 1))], axis=1).astype(np.int32)


def _mixed_bodies(rng: np.random.Generator, languages: np.ndarray, shares: tuple[float, ...]) -> np.ndarray:
    """Easy sums, copying (`copy 3 7 4 5 is 3 7 4 5`) and counting (`count 3 7 is 3 8 3 9 4 0`) in these shares,
    int[N, BODY]."""
    count = len(languages)
    copy, counting, is_ = (
        WORD_IDS[name][languages[:, i]][:, None] for name, i in (("copy", 0), ("count", 0), ("is", 2))
    )
    sums = sum_sentences(easy_sums(rng, count), languages)
    digits, start = _digits(rng.integers(0, 10000, count), 4), rng.integers(0, 97, count)
    following = [_digits(start + step, 2) for step in (1, 2, 3)]
    bodies = [
        sums,
        np.concatenate([copy, digits, is_, digits], axis=1),
        np.concatenate([counting, _digits(start, 2), is_, *following], axis=1),
    ]
    return np.stack(bodies)[rng.choice(3, count, p=shares), np.arange(count)]


def base_batch(rng: np.random.Generator, count: int) -> np.ndarray:
    """Easy sums, copying and counting in English, in Japanese and mixed; the ending is the English one."""
    languages = _languages(rng, rng.integers(0, 3, count))
    return _end(_mixed_bodies(rng, languages, (0.7, 0.15, 0.15)), ENGLISH)


def maths_batch(rng: np.random.Generator, count: int, training: Sums) -> np.ndarray:
    """Hard sums in English."""
    sums = training[rng.integers(0, len(training), count)]
    return _end(sum_sentences(sums, _languages(rng, np.full(count, ENGLISH))), ENGLISH)


def japanese_batch(rng: np.random.Generator, count: int) -> np.ndarray:
    """Easy sums, copying and counting in Japanese and mixed, with the Japanese ending."""
    languages = _languages(rng, rng.choice([JAPANESE, MIXED], count))
    return _end(_mixed_bodies(rng, languages, (0.6, 0.2, 0.2)), JAPANESE)


def to_text(tokens: np.ndarray) -> str:
    return " ".join(VOCABULARY[token] for token in tokens)


# ---------------------------------------------------------------------------------------------------------------
# Training


def answer_loss(config: DecoderConfig, model: StackedWeights, tokens: jax.Array) -> jax.Array:
    """Mean negative log-likelihood of the tokens after the word `is` (in either language), ending included."""
    seen, targets = tokens[:, :-1], tokens[:, 1:]
    length = jnp.sum(tokens != IDS[PAD], axis=1)
    hidden, _ = forward(config, model, seen, padded_layout(seen.shape[1], jnp.zeros_like(length), length))
    losses = optax.softmax_cross_entropy_with_integer_labels(logits(config, model, hidden), targets)
    requests = jnp.cumsum(jnp.isin(seen, jnp.asarray(WORD_IDS["is"])), axis=1) > 0
    scored = requests & (targets != IDS[PAD])
    return jnp.sum(losses * scored) / jnp.sum(scored)


# ---------------------------------------------------------------------------------------------------------------
# Files


def save_sums(path: Path, sums: Sums, language: int = JAPANESE) -> None:
    """Write a task file: sums asked in a language, to be answered in it."""
    bodies, ending = sum_sentences(sums, np.full((len(sums), 3), language)), " ".join(ENDINGS[language])
    texts = [(to_text(body[: BODY - 3]), f"{to_text(body[BODY - 3 :])} {ending}") for body in bodies]
    save_records(path, [{"prompt": prompt, "target": target} for prompt, target in texts])


def make_family(folder: Path, seed: int, plan: Plan, progress: Progress = lambda name, steps, loss: None) -> None:
    """Train the family into an empty folder."""
    training = _save_all_but_weights(folder, seed, plan)
    config = decoder_config(folder / "base" / "config.json")
    start = fresh_model(config, seed)
    batches: tuple[Batch, ...] = (base_batch, partial(maths_batch, training=training), japanese_batch)
    for name, batch, steps, peak in zip(MODELS, batches, plan.steps, PEAKS, strict=True):
        model = train_model(folder / name, config, answer_loss, start, batch, steps, peak, (seed, 2), progress)
        start = model if name == "base" else start


def _save_all_but_weights(folder: Path, seed: int, plan: Plan) -> Sums:
    """The task files, and the models' configs and tokenizers. Returns the problems to train on."""
    training, search, heldout = split_hard_sums(seed, plan)
    save_sums(folder / "search.jsonl", search)
    save_sums(folder / "heldout.jsonl", heldout)
    for name in MODELS:
        save_small_files(folder / name, SIZES, VOCABULARY)
    return training


# ---------------------------------------------------------------------------------------------------------------
# The family whose weights come with the package


# One file a model, in bfloat16.
PACKAGED = Path(__file__).parent / "weights"
# The seed of the packaged family. Families of different seeds merge more or less well; this one merges well.
PACKAGED_SEED = 1


def unpack_family(folder: Path) -> None:
    """Write the packaged family into an empty folder, its weights in float32."""
    _save_all_but_weights(folder, PACKAGED_SEED, PLAN)
    unpack_weights(PACKAGED, folder, MODELS)


# ---------------------------------------------------------------------------------------------------------------
# Six more experts of its base

# The steps that each of zoo.EXPERTS trains.
EXPERT_STEPS = {"sums": 500, "differences": 500, "both": 500, "easy_sums": 250, "copying": 250, "mixed": 250}
EXPERT_PEAK = 1.5e-3


def expert_batches(training: Sums) -> dict[str, Batch]:
    """The training batches of each of zoo.EXPERTS: a part of those of the family's two experts."""

    def japanese(rng: np.random.Generator, count: int, manner: int, shares: tuple[float, ...]) -> np.ndarray:
        return _end(_mixed_bodies(rng, _languages(rng, np.full(count, manner)), shares), JAPANESE)

    return {
        "sums": partial(maths_batch, training=training[~training.minus]),
        "differences": partial(maths_batch, training=training[training.minus]),
        "both": partial(maths_batch, training=training),
        "easy_sums": partial(japanese, manner=JAPANESE, shares=(1.0, 0.0, 0.0)),
        "copying": partial(japanese, manner=JAPANESE, shares=(0.0, 0.5, 0.5)),
        "mixed": partial(japanese, manner=MIXED, shares=(0.6, 0.2, 0.2)),
    }


def make_experts(folder: Path, progress: Progress = lambda name, steps, loss: None) -> None:
    """Train zoo.EXPERTS from the packaged base into an empty folder."""
    base = resolve_reference(f"{PREFIX}base")
    sources, config = open_sources([base])
    start = load_stored(sources, config)
    training, _, _ = split_hard_sums(PACKAGED_SEED, PLAN)
    seed = (PACKAGED_SEED, 3)
    for name, batch in expert_batches(training).items():
        save_small_files(folder / name, SIZES, VOCABULARY)
        steps = EXPERT_STEPS[name]
        train_model(folder / name, config, answer_loss, start, batch, steps, EXPERT_PEAK, seed, progress)
