"""Searches over models of random shapes: headers alone, a tokenizer of words, examples of random words."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from evojax_merge.checkpoints.config_file import decoder_config
from evojax_merge.checkpoints.headers import STORED_DTYPES, TensorHeader, write_header_only
from evojax_merge.checkpoints.parents import tensor_shapes
from evojax_merge.evaluation.targets import Target
from evojax_merge.problem import SearchProblem, build_problem, config_from

MISTRAL_7B = {
    "architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000,
    "max_position_embeddings": 32768, "rope_theta": 10000.0, "rms_norm_eps": 1e-5, "hidden_act": "silu",
    "sliding_window": None, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
WORDS = 1000
# Tokens of an example: of its prompt, and of what is scored or generated.
PROMPT, ANSWER = 250, 100


def word_tokenizer(count: int, special: Sequence[str] = ("<unk>", "</s>")) -> PreTrainedTokenizerFast:
    """A tokenizer of `count` words, the special ones and then w2, w3, …, each the number of its token."""
    names = [*special, *(f"w{i}" for i in range(len(special), count))]
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")


def write_models(folder: Path, config: dict[str, Any], parents: int, dtype: str = "bfloat16") -> None:
    """A base and parents of a config."""
    for name in ("base", *(f"parent{k}" for k in range(parents))):
        write_model(folder / name, config, dtype)


def write_model(folder: Path, config: dict[str, Any], dtype: str = "bfloat16") -> None:
    """A model of a config: headers, and a tokenizer of words."""
    word_tokenizer(WORDS, ("<unk>", "<s>", "</s>")).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))
    shapes, (stored, itemsize) = tensor_shapes(decoder_config(folder / "config.json")), STORED_DTYPES[dtype]
    write_header_only(
        folder / "model.safetensors",
        {tensor: TensorHeader(stored, shape, itemsize * int(np.prod(shape))) for tensor, shape in shapes.items()},
    )


def write_examples(folder: Path, count: int, prompt: int = PROMPT) -> None:
    """Examples of `prompt` random words, and ANSWER words that are scored or generated."""
    rng = np.random.default_rng(0)

    def text(length: int) -> str:
        return " ".join(f"w{i}" for i in rng.integers(3, WORDS, length))

    rows = [{"prompt": text(prompt), "target": text(ANSWER)} for _ in range(count)]
    (folder / "examples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def problem_for(
    folder: Path, parents: int, method: str, mode: str, target: Target, model: int = 1, dtype: str = "bfloat16",
    tokens: int | None = None, bank: str = "device", strategy: str = "cma_es", **changes: Any,
) -> SearchProblem:  # fmt: skip
    """A search over the models of a folder, all but a hundredth of the examples searched (at least one is not). model:
    devices to a candidate; dtype: what is computed and exported in; tokens: of a batch, None for the target's own;
    bank: the models' place; changes: keys of `search`."""
    task: dict[str, Any] = {"name": mode, "file": "examples.jsonl", "heldout": 0.01}
    task |= {"kind": "likelihood"} if mode == "likelihood" else {"kind": "exact_match", "max_new_tokens": ANSWER}
    space: dict[str, Any] = {"space": {"method": method}}
    if method == "path":
        space = {"data_flow": {"form": "moves"}}
    document = space | {
        # Folders of these names may be where the command runs.
        "base": str(folder / "base"), "parents": [str(folder / f"parent{k}") for k in range(parents)], "tasks": [task],
        "search": {"strategy": strategy, "population": 8, "generations": 1} | changes,
        "evaluation": {"compute_dtype": dtype, "model": model, "tokens_per_batch": tokens, "bank": bank},
        "export_dtype": dtype,
    }  # fmt: skip
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(document))
    return build_problem(path, config_from(path, document, [], None), target=target)
