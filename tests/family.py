"""A family of random tiny models with tokenizer and task files, written through transformers."""

import json
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")


def word_tokenizer(vocab: int) -> PreTrainedTokenizerFast:
    """Words `w4 … w{vocab-1}` after four special tokens, split at white space."""
    words = {word: i for i, word in enumerate(SPECIAL)} | {f"w{i}": i for i in range(len(SPECIAL), vocab)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>", bos_token="<s>", pad_token="<pad>"
    )


def write_task(path: Path, examples: int, vocab: int, seed: int) -> None:
    rng = np.random.default_rng(seed)

    def words(count: int) -> list[str]:
        return [f"w{i}" for i in rng.choice(np.arange(len(SPECIAL), vocab), count, replace=False)]

    rows = [
        {
            "prompt": " ".join(words(int(rng.integers(3, 14)))),
            "target": " ".join(words(3)),
            "choices": words(4),
            "answer": int(rng.integers(4)),
        }
        for _ in range(examples)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_family(root: Path, *, dtype: str = "float32", vocab: int = 40, layers: int = 3, **config: object) -> Path:
    """`base`, `one` and `two` (base plus noise), `task.jsonl` and `heldout.jsonl` under `root`."""
    torch.manual_seed(0)
    settings = {
        "vocab_size": vocab, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": layers,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
        "tie_word_embeddings": True, "eos_token_id": 2, "bos_token_id": 1, "dtype": dtype,
    }  # fmt: skip
    hf = LlamaConfig(**(settings | config))
    tokenizer = word_tokenizer(vocab)
    base = AutoModelForCausalLM.from_config(hf)
    for parameter in base.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    for name in ("base", "one", "two"):
        model = AutoModelForCausalLM.from_config(hf)
        model.load_state_dict(base.state_dict())
        for parameter in model.parameters():
            if name != "base":
                parameter.data += 0.05 * torch.randn_like(parameter)
        model.to(getattr(torch, dtype)).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    write_task(root / "task.jsonl", 16, vocab, seed=1)
    write_task(root / "heldout.jsonl", 8, vocab, seed=2)
    return root
