"""Tiny random checkpoints, tokenizers and examples.

Checkpoints are made with transformers and torch, so that what is read back was not written by what is tested.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from merge_kernels import METHODS
from reference.merging import ACTIVATIONS, DIFFUSION
from reference.spectral import SPECTRAL
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
    WhisperConfig,
)

# The methods that mergekit has as well; image generators' are sd-mecha's, those of spectra and activations papers' own.
OF_MERGEKIT = [name for name in METHODS if name not in (*DIFFUSION, *SPECTRAL, *ACTIVATIONS)]


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
    for name, values in _stored(model):
        torch.nn.init.normal_(values, mean=1.0 if "norm" in name else 0.0, std=std)
    return model


def _stored(model: Any) -> list[tuple[str, Any]]:
    """The parameters of a torch model, then the floating-point buffers that its files hold, such as routers' biases."""
    parameters, stored = dict(model.named_parameters()), model.state_dict()
    buffers = [(name, values) for name, values in model.named_buffers() if name in stored and name not in parameters]
    return [*parameters.items(), *((name, values) for name, values in buffers if values.is_floating_point())]


def randomised(model: Any, seed: int, scale: float = 0.2) -> Any:
    """The model with random numbers in every floating-point tensor; variances stay positive."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            drawn = torch.randn(tensor.shape, generator=generator) * scale
            tensor.copy_(drawn.abs() + 0.5 if name.endswith("running_var") else drawn)
    return model.eval()


def finetune(model: Any, seed: int, scale: float = 0.03) -> Any:
    """A copy of a torch model with noise added to every parameter."""
    torch.manual_seed(seed)
    tuned = AutoModelForCausalLM.from_config(model.config).to(next(model.parameters()).dtype).eval()
    tuned.load_state_dict(model.state_dict())
    with torch.no_grad():
        for _, values in _stored(tuned):
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


def random_records(count: int, vocab: int = VOCAB, seed: int = 0, even: bool = False) -> list[dict[str, Any]]:
    """Examples of random words that serve all kinds of tasks. Prompts and targets differ in length, or have 6 words and
    2 each where lengths are `even`."""
    rng = np.random.default_rng(seed)

    def text(fixed: int, low: int, high: int) -> str:
        size = fixed if even else int(rng.integers(low, high))
        return " ".join(f"w{i}" for i in rng.integers(len(SPECIAL), vocab, size))

    return [
        {
            "prompt": text(6, 2, 14), "target": text(2, 1, 6), "choices": [text(2, 1, 4) for _ in range(4)],
            "answer": int(rng.integers(4)),
        }
        for _ in range(count)
    ]  # fmt: skip


# Each length is a program to compile.
even_records = partial(random_records, even=True)


def whisper_config() -> WhisperConfig:
    """A transcriber of a second of sound, to `VOCAB` tokens."""
    return WhisperConfig(
        vocab_size=VOCAB, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, num_mel_bins=8,
        decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, max_source_positions=50,
        max_target_positions=32, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
        begin_suppress_tokens=None, suppress_tokens=None,
    )  # fmt: skip
