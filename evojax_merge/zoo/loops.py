"""A family in which the path through the layers matters: a model that adds two numbers, and adds five where its middle
layers run four times.

It is a looped transformer (Universal Transformers, arXiv 1807.03819) at the size of a toy. A prompt is an operation and
two to five digits, `plus 3 5 2 7`, and its answer is the last digit of the result. The models are trained with their
two middle layers running once to four times, and after each run the target is the result so far: `2 plus 7` after the
first run, `5 plus 2 plus 7` after the second. So every run continues from the run before, and changes nothing once all
numbers are in. The saved model is a plain model of four layers, which runs each once.

The `base` knows `max` and `min`; the experts `plus` and `times` are fine-tunes of it. The task of a merge is sums of
three to five numbers. No model of the family was trained to do that in four layers: only a path that runs the middle
layers again can.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from evojax_merge.checkpoints.config_file import decoder_config
from evojax_merge.models.architecture import LAYERS
from evojax_merge.models.config import DecoderConfig
from evojax_merge.models.decoder import forward, logits
from evojax_merge.models.layers import padded_layout
from evojax_merge.models.sources import StackedWeights
from evojax_merge.zoo import FILES, Family, save_records
from evojax_merge.zoo.tiny_llama import (
    DIGITS,
    EOS,
    PAD,
    UNKNOWN,
    Plan,
    Progress,
    Sizes,
    fresh_model,
    save_small_files,
    train_model,
)

# The version of the recipe below: every change of the training increases it.
VERSION = "loops-v1"
MODELS = ("base", "plus", "times")

# All of them associative: a run of the middle layers puts one more number in front.
OPERATIONS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "max": np.maximum,
    "min": np.minimum,
    "plus": lambda left, right: (left + right) % 10,
    "times": lambda left, right: left * right % 10,
}
VOCABULARY = [PAD, EOS, UNKNOWN, *DIGITS, *OPERATIONS]
IDS = {token: i for i, token in enumerate(VOCABULARY)}

MAX_NUMBERS = 5
MAX_LOOPS = MAX_NUMBERS - 1
# The lengths of the task's sums: more numbers than one run of the middle layers adds.
ASKED_FOR = range(3, MAX_NUMBERS + 1)
SIZES = Sizes(hidden=64, layers=4, heads=4, mlp=192, context=16)
# The layers that run again; the first one reads the prompt, and the last one writes the answer.
LOOPED = (1, 2)

# The operations that each model is trained on.
LEARNT = (("max", "min"), ("plus",), ("times",))
PLAN = Plan(steps=(300, 1000, 200), examples=(128, 256))

Chain = tuple[int, ...]


# ---------------------------------------------------------------------------------------------------------------
# Chains of numbers


def results(operation: str, numbers: np.ndarray) -> np.ndarray:
    """The results int[N, MAX_LOOPS, T] of the numbers int[N, T] up to each place after 1, 2, … runs: after r runs, the
    result of the last r + 1 numbers."""
    by_runs = [numbers]
    for _ in range(MAX_LOOPS):
        further = OPERATIONS[operation](by_runs[-1][:, :-1], numbers[:, 1:])
        by_runs.append(np.concatenate([numbers[:, :1], further], axis=1))
    return np.stack(by_runs[1:], axis=1)


def codes(numbers: np.ndarray) -> np.ndarray:
    """A code int[N] for each chain of int[N, n], different for all chains of all lengths."""
    length = numbers.shape[1]
    return length * 10**MAX_NUMBERS + numbers @ 10 ** np.arange(length)


def training_batch(
    rng: np.random.Generator, count: int, operations: Sequence[str], unseen: np.ndarray | None = None
) -> np.ndarray:
    """Examples int32[count, 1 + MAX_LOOPS, 1 + MAX_NUMBERS], each of one of the operations: the tokens, and the answers
    at each token after one to four runs of the middle layers; answers at the operation are 0. unseen: the codes of
    chains that no example begins with."""
    numbers = rng.integers(0, 10, (count, MAX_NUMBERS))
    while unseen is not None:
        met = np.any([np.isin(codes(numbers[:, :length]), unseen) for length in ASKED_FOR], axis=0)
        if not met.any():
            break
        numbers[met] = rng.integers(0, 10, (int(met.sum()), MAX_NUMBERS))
    chosen = rng.integers(len(operations), size=count)
    answers = np.stack([results(name, numbers) for name in operations])[chosen, np.arange(count)]
    examples = np.zeros((count, 1 + MAX_LOOPS, 1 + MAX_NUMBERS), np.int32)
    examples[:, 0, 0] = np.array([IDS[name] for name in operations])[chosen]
    examples[:, :, 1:] = IDS["0"] + np.concatenate([numbers[:, None], answers], axis=1)
    return examples


def split_sums(seed: int, plan: Plan) -> tuple[list[Chain], list[Chain]]:
    """(for the search, held out): sums of three to five numbers, each once; none of them is trained on."""
    rng = np.random.default_rng([seed, 0])
    chains: dict[Chain, None] = {}
    while len(chains) < sum(plan.examples):
        length = int(rng.integers(ASKED_FOR.start, ASKED_FOR.stop))
        chains[tuple(rng.integers(0, 10, length).tolist())] = None
    every = list(chains)
    return every[: plan.examples[0]], every[plan.examples[0] :]


# ---------------------------------------------------------------------------------------------------------------
# Training


def with_loops(config: DecoderConfig, model: StackedWeights, loops: int) -> tuple[DecoderConfig, StackedWeights]:
    """The model whose middle layers run `loops` times."""
    layers = [*range(LOOPED[0]), *LOOPED * loops, *range(LOOPED[-1] + 1, config.layers)]
    stack = {name: leaf[np.array(layers)] for name, leaf in model.stacks[LAYERS].items()}
    deep_config = replace(config, layers=len(layers), windows=tuple(config.windows[layer] for layer in layers))
    return deep_config, StackedWeights({LAYERS: stack}, model.shared, model.compute_dtype)


def loop_loss(config: DecoderConfig, model: StackedWeights, examples: jax.Array) -> jax.Array:
    """Mean negative log-likelihood of the answers of examples int32[B, 1 + MAX_LOOPS, T]: a quarter of the examples
    counts after one run of the middle layers, a quarter after two, and so forth."""
    losses = []
    for loops in range(1, MAX_LOOPS + 1):
        rows = examples[loops - 1 :: MAX_LOOPS]
        count, _, width = rows.shape
        deep_config, deep_model = with_loops(config, model, loops)
        layout = padded_layout(width, jnp.zeros(count, jnp.int32), jnp.full(count, width))
        hidden, _ = forward(deep_config, deep_model, rows[:, 0], layout)
        answer_logits = logits(config, model, hidden[:, 1:])
        losses.append(optax.softmax_cross_entropy_with_integer_labels(answer_logits, rows[:, loops, 1:]))
    return jnp.mean(jnp.concatenate(losses))


def make_family(folder: Path, seed: int, plan: Plan, progress: Progress) -> None:
    """Train the family into an empty folder."""
    splits = split_sums(seed, plan)
    for file, chains in zip(FILES, splits, strict=True):
        records = [{"prompt": " ".join(["plus", *map(str, chain)]), "target": str(sum(chain) % 10)} for chain in chains]
        save_records(folder / file, records)
    for name in MODELS:
        save_small_files(folder / name, SIZES, VOCABULARY)
    config = decoder_config(folder / "base" / "config.json")
    unseen = np.concatenate([codes(np.array([chain])) for chains in splits for chain in chains])
    start = fresh_model(config, seed)
    for name, operations, steps in zip(MODELS, LEARNT, plan.steps, strict=True):
        batch = partial(training_batch, operations=operations, unseen=unseen)
        model = train_model(folder / name, config, loop_loss, start, batch, steps, 3e-3, (seed, 2), progress)
        start = model if name == "base" else start


def family(plan: Plan) -> Family:
    """The kind of family whose models train as long as `plan` says."""
    return Family("loops", VERSION, MODELS, partial(make_family, plan=plan), sum(plan.steps))


FAMILY = family(PLAN)
