"""A family of random Llamas of 30 M parameters, rows of random words, and a search over a TIES merge."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import yaml

from evojax_merge.benchmarks.header_models import word_tokenizer
from evojax_merge.problem import SearchProblem, build_problem, read_config

METHOD = "ties"


def write_random_family(folder: Path) -> None:
    """Base and two experts of 30 M parameters: a Llama of 8 layers, width 512, vocabulary 16,384."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    vocab = 16384
    tokenizer = word_tokenizer(vocab)
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=512, intermediate_size=1376, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=2048, tie_word_embeddings=True, eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    for name in ("base", "one", "two"):
        if name != "base":
            for parameter in model.parameters():
                parameter.data += 0.002 * torch.randn_like(parameter)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def write_rows(file: Path, words: Sequence[str], tokens: int, length: int) -> None:
    """Examples of `length` tokens, a quarter of them target, `tokens` tokens together."""
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(max(2, tokens // length)):
        text = [words[i] for i in rng.integers(0, len(words), length)]
        split = length - length // 4
        rows.append({"prompt": " ".join(text[:split]), "target": " ".join(text[split:])})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def problem_for(folder: Path, base: str, parents: list[str], population: int) -> SearchProblem:
    document = {
        "base": base,
        "parents": parents,
        "space": {"method": METHOD, "parameters": {"weight": {"high": 1.5}, "density": {"low": 0.1}}},
        "tasks": [{"name": "text", "kind": "likelihood", "file": "rows.jsonl", "heldout": "rows.jsonl"}],
        "search": {"population": population},
        "export_dtype": "float32",
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(document))
    return build_problem(path, read_config(path, [], None))
