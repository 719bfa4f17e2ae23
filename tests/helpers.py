"""Builders of tiny random checkpoints, tokenizers and task files that several test files share.

Checkpoints are made with transformers and torch, so that what is read back was not written by what is tested.
"""

import contextlib
import io
import json
import os
import subprocess
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import yaml
from merge_kernels import METHODS
from reference.merging import DIFFUSION
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from evojax_merge.cli import cli, run
from evojax_merge.config.search_config import SearchConfig
from evojax_merge.mergekit.schema import RecipeFile, parse_recipe
from evojax_merge.problem import build_strategy
from evojax_merge.schema.yaml_reader import load_yaml
from evojax_merge.search.checkpoints import Checkpoints, FolderStorage
from evojax_merge.search.example_choice import ExampleChoice
from evojax_merge.search.loop import Archive, Reporter, evolve
from evojax_merge.search.run_folder import RunFolder
from evojax_merge.tasks.records import read_source
from evojax_merge.tasks.text import Example, TextConfig, read_examples
from evojax_merge.zoo import MODELS, VERSION

# The methods that mergekit has as well; image generators' are sd-mecha's.
OF_MERGEKIT = [name for name in METHODS if name not in DIFFUSION]
CONFIGS = {
    "llama": LlamaConfig, "mistral": MistralConfig, "mixtral": MixtralConfig, "qwen2": Qwen2Config,
    "qwen2_moe": Qwen2MoeConfig, "qwen3": Qwen3Config, "qwen3_moe": Qwen3MoeConfig,
}  # fmt: skip
# What mixtures of experts have besides.
EXPERTS = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 28, "shared_expert_intermediate_size": 44,
    },
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 28, "norm_topk_prob": True},
}  # fmt: skip
# Models this small lose more by waking a second thread than they gain.
torch.set_num_threads(1)

T = TypeVar("T")
# Run every case of every kind (`make test-all`).
ALL = "EVOJAX_TEST_ALL" in os.environ


def sample(cases: Iterable[T], count: int) -> list[T]:
    """Return at most `count` cases, evenly spaced over the list, or all of them with EVOJAX_TEST_ALL.

    Similar cases stand next to each other in most lists. The sample depends on the list and on `count` alone.
    """
    cases = list(cases)
    if ALL or count >= len(cases):
        return cases
    return [cases[(2 * i + 1) * len(cases) // (2 * count)] for i in range(count)]


# Runs with EVOJAX_TEST_ALL alone: a long way to what shorter tests meet as well.
thorough = pytest.mark.skipif(not ALL, reason="make test-all runs it (EVOJAX_TEST_ALL)")

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
VOCAB = 64


def tiny_config(kind: str = "llama", **changes: Any) -> Any:
    """A small config of one architecture; sizes are all different, so that no two axes can be mistaken."""
    sizes: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    config = CONFIGS[kind](**(sizes | EXPERTS.get(kind, {}) | changes))
    config._attn_implementation = "eager"
    return config


def random_model(config: Any, seed: int = 0, std: float = 0.15) -> Any:
    """A torch model of `config` in float32 in which no parameter is zero or one."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    for name, values in model.named_parameters():
        torch.nn.init.normal_(values, mean=1.0 if "norm" in name else 0.0, std=std)
    return model


def finetune(model: Any, seed: int, scale: float = 0.03) -> Any:
    """A copy of a torch model with noise added to every parameter."""
    torch.manual_seed(seed)
    tuned = AutoModelForCausalLM.from_config(model.config).to(next(model.parameters()).dtype).eval()
    tuned.load_state_dict(model.state_dict())
    with torch.no_grad():
        for values in tuned.parameters():
            values += scale * torch.randn_like(values)
    return tuned


def words(vocab: int = VOCAB) -> list[str]:
    """The tokens of `word_tokenizer`, in the order of their ids."""
    return [*SPECIAL, *(f"w{i}" for i in range(len(SPECIAL), vocab))]


def word_tokenizer(tokens: Sequence[str]) -> PreTrainedTokenizerFast:
    """A tokenizer that splits at white space and gives each of `tokens` its position as id."""
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def save(model: Any, folder: Path, tokens: Sequence[str] | None = None, **options: Any) -> Path:
    """Save a torch model, with a word tokenizer of its own vocabulary's size unless told which tokens."""
    model.save_pretrained(folder, **options)
    word_tokenizer(words(model.config.vocab_size) if tokens is None else tokens).save_pretrained(folder)
    return folder


def load_torch(folder: Path) -> Any:
    """The folder as transformers reads it, in float32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def state(folder: Path) -> dict[str, np.ndarray]:
    """All tensors of a folder as safetensors reads them: float32 or wider, by name."""
    from safetensors.torch import load_file

    tensors: dict[str, np.ndarray] = {}
    for file in sorted(folder.glob("*.safetensors")):
        for name, values in load_file(file).items():
            tensors[name] = values.to(torch.promote_types(values.dtype, torch.float32)).numpy()
    return tensors


def edit_json(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a JSON file in place."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def write_lines(path: Path, records: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


def random_records(count: int, vocab: int = VOCAB, seed: int = 0) -> list[dict[str, Any]]:
    """Examples of random words that serve all kinds of tasks; prompts and targets differ in length."""
    rng = np.random.default_rng(seed)

    def text(size: int) -> str:
        return " ".join(f"w{i}" for i in rng.integers(len(SPECIAL), vocab, size))

    return [
        {
            "prompt": text(int(rng.integers(2, 14))),
            "target": text(int(rng.integers(1, 6))),
            "choices": [text(int(rng.integers(1, 4))) for _ in range(4)],
            "answer": int(rng.integers(4)),
        }
        for _ in range(count)
    ]


def even_records(count: int, vocab: int = VOCAB, seed: int = 0) -> list[dict[str, Any]]:
    """As `random_records`, but of one length, as each length is a program to compile: 6 words in each prompt, 2 in each
    target and choice."""
    rng = np.random.default_rng(seed)

    def text(size: int) -> str:
        return " ".join(f"w{i}" for i in rng.integers(len(SPECIAL), vocab, size))

    return [
        {
            "prompt": text(6), "target": text(2), "choices": [text(2) for _ in range(4)],
            "answer": int(rng.integers(4)),
        }
        for _ in range(count)
    ]  # fmt: skip


def load_decoder(folder: Path) -> tuple[Any, Any]:
    """A folder's config, and its weights as a model."""
    from evojax_merge.checkpoints.bank import load_stored
    from evojax_merge.checkpoints.parents import open_sources

    sources, config = open_sources([folder])
    return config, load_stored(sources, config)


@partial(jax.jit, static_argnums=0)
def logits(config: Any, model: Any, tokens: Any) -> jax.Array:
    """float32[R, T, V] of plain rows, tokens int[R, T]."""
    from evojax_merge.models import decoder

    return decoder.logits(config, model, hidden_states(config, model, tokens))


def stored_logits(folder: Path, tokens: np.ndarray) -> np.ndarray:
    """Those of the model of a folder."""
    return np.asarray(logits(*load_decoder(folder), tokens))


def hidden_states(config: Any, source: Any, tokens: Any, first: Any = None, length: Any = None) -> jax.Array:
    """The decoder's final states of plain rows, without padding unless `first` and `length` tell of it."""
    from evojax_merge.models.decoder import forward
    from evojax_merge.models.layers import padded_layout

    rows, width = tokens.shape
    first = jnp.zeros(rows, jnp.int32) if first is None else jnp.asarray(first, jnp.int32)
    length = width - first if length is None else jnp.asarray(length, jnp.int32)
    return forward(config, source, jnp.asarray(tokens, jnp.int32), padded_layout(width, first, length))[0]


def greedy_tokens(
    config: Any, model: Any, tokens: Any, first: Any, new: int, stop: tuple[int, ...], window: int = 1, seen: Any = None
) -> np.ndarray:
    """Greedy continuations int32[B, new] of prompts that are padded at the left, by one stored model."""
    tokens = jnp.asarray(tokens, jnp.int32)
    seen = jnp.zeros((len(tokens), 0), jnp.int32) if seen is None else jnp.asarray(seen, jnp.int32)
    return np.asarray(_greedy(config, new, stop, window, model, tokens, jnp.asarray(first, jnp.int32), seen))[0]


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _greedy(
    config: Any, new: int, stop: tuple[int, ...], window: int, model: Any, tokens: Any, first: Any, seen: Any
) -> jax.Array:
    from evojax_merge.models.decoder import scatter_columns
    from evojax_merge.models.generate import decode, init_decode_state, prefill

    def alone(_: Any) -> Any:
        return model

    members, (rows, width) = jnp.zeros(1), tokens.shape
    decode_state = init_decode_state(config, model.compute_dtype, 1, rows, width, new, window)
    decode_state = prefill(config, alone, members, decode_state, width, jnp.int32(0), tokens, first, stop)
    return decode(config, alone, members, decode_state, new, window, scatter_columns, stop, tokens, seen).tokens


@dataclass(frozen=True)
class Family:
    """A base and parents that were made from it, their task file, and the folder they lie in."""

    root: Path
    base: Path
    parents: tuple[Path, ...]
    tasks: Path


def build_family(root: Path, config: Any = None, parents: int = 2, dtype: torch.dtype = torch.float32) -> Family:
    """Write base, parents and `tasks.jsonl` (even_records) below `root`."""
    model = random_model(tiny_config(tie_word_embeddings=True) if config is None else config).to(dtype)
    base = save(model, root / "base")
    folders = tuple(save(finetune(model, k + 1), root / f"parent{k}") for k in range(parents))
    tasks = write_lines(root / "tasks.jsonl", even_records(12, model.config.vocab_size))
    return Family(root, base, folders, tasks)


def stand_in_for_the_zoo(cache: Path, family: Family) -> dict[str, Path]:
    """Put a family's models and examples where a cache folder (XDG_CACHE_HOME) has the demo family's; the models by
    their names."""
    packaged = cache / "evojax-merge" / "zoo" / VERSION / "packaged"
    packaged.mkdir(parents=True)
    folders = dict(zip(MODELS, (family.base, *family.parents), strict=True))
    files = dict.fromkeys(("search.jsonl", "heldout.jsonl"), family.tasks)
    for name, target in (folders | files).items():
        (packaged / name).symlink_to(target)
    return folders


def examples_in(file: Path, kind: Any, **keys: Any) -> list[Example]:
    """The examples of a file, by the keys of a task's section."""
    return read_examples(read_source(file), kind, TextConfig(name="task", kind=kind, file=str(file), **keys), "tasks")


def run_here(*arguments: object) -> subprocess.CompletedProcess[str]:
    """`evojax-merge` with these arguments, in this process: programs that it traces and compiles serve the next command
    as well, where a process of its own takes four times as long. (hostile.run_command: a real process.)"""
    words = list(map(str, arguments))
    with contextlib.redirect_stdout(io.StringIO()) as stdout, contextlib.redirect_stderr(io.StringIO()) as stderr:
        status = run(lambda: cli.main(words, standalone_mode=False))
    return subprocess.CompletedProcess(["evojax-merge", *words], status, stdout.getvalue(), stderr.getvalue())


def run_linear_merge(folder: Path, *models: object) -> int:
    """`evojax-merge merge` of models with weights of 1, in float32, to `out` in a folder; its exit status."""
    rows = [{"model": str(model), "parameters": {"weight": 1.0}} for model in models]
    recipe = {"merge_method": "linear", "dtype": "float32", "models": rows}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    arguments = ["merge", str(folder / "recipe.yaml"), str(folder / "out")]
    return run(lambda: cli.main(arguments, standalone_mode=False))


def search_in(
    folder: Path,
    config: SearchConfig,
    seed: int,
    space: Any,
    shards: Sequence[Any],
    validation: Any = None,
    reporter: Reporter | None = None,
    choice: ExampleChoice | None = None,
) -> Archive:
    """A search of a config's strategy with evaluators of a test's own, kept in a run folder."""
    run, reporter = RunFolder(folder), reporter or Reporter()
    objectives, storage = sum(task.weight > 0 for task in shards[0].tasks), FolderStorage(run, Checkpoints(run))
    strategy = build_strategy("search", config, space, objectives)
    return evolve(config, seed, strategy, space, shards, storage, reporter, validation=validation, choice=choice)


def read_recipe(path: Path) -> RecipeFile:
    """A recipe of one document."""
    return parse_recipe(path, load_yaml(path))
