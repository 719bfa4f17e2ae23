"""Tiny Llamas with a vocabulary of a few words: their fresh weights, their training, and their files."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from safetensors.numpy import load_file

from evojax_merge.checkpoints.bank import stored_tensors
from evojax_merge.checkpoints.writer import ShardWriter, TensorSpec
from evojax_merge.models.architecture import Leaf, dimensions, shared_leaves, stack_leaves, stack_numbers
from evojax_merge.models.config import DecoderConfig
from evojax_merge.models.sources import StackedWeights

PAD, EOS, UNKNOWN = "<pad>", "</s>", "<unk>"
DIGITS = [str(digit) for digit in range(10)]
BATCH, CHUNK = 128, 50
EMBEDDING_STD = 0.02

# Receives a model's name, the steps since the last call, and the loss.
Progress = Callable[[str, int, float], None]
# (random numbers, count) -> examples int32[count, …].
Batch = Callable[[np.random.Generator, int], np.ndarray]
# (config, model, a batch int32[B, …]) -> the mean loss.
Loss = Callable[[DecoderConfig, StackedWeights, jax.Array], jax.Array]


@dataclass(frozen=True)
class Plan:
    """steps: those that each model of a family trains; examples: those of its two files."""

    steps: tuple[int, int, int]
    examples: tuple[int, int]


@dataclass(frozen=True)
class Sizes:
    """The sizes of a tiny Llama; context: the maximum of its tokens."""

    hidden: int
    layers: int
    heads: int
    mlp: int
    context: int


def fresh_model(config: DecoderConfig, seed: int) -> StackedWeights:
    """Random weights: norms are one, the embedding is small, everything else is normal with variance 1 / fan-in."""
    sizes = dimensions(config)
    rng = np.random.default_rng([seed, 1])

    def draw(leaf: Leaf, *leading: int) -> jax.Array:
        shape = (*leading, *(sizes[name] for name in leaf.shape))
        if leaf.component == "norm":
            return jnp.ones(shape, jnp.float32)
        std = EMBEDDING_STD if leaf.name == "embed" else shape[-1] ** -0.5
        return jnp.asarray(rng.normal(0.0, std, shape), jnp.float32)

    stacks = {
        stack: {leaf.name: draw(leaf, len(numbers)) for leaf in stack_leaves(config, stack)}
        for stack, numbers in stack_numbers(config).items()
    }
    return StackedWeights(stacks, {leaf.name: draw(leaf) for leaf in shared_leaves(config)})


ADAM = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam(b2=0.98))


@partial(jax.jit, static_argnums=(0, 1))
def _train_chunk(
    config: DecoderConfig, loss: Loss, model: StackedWeights, state: Any, batches: jax.Array, rates: jax.Array
) -> tuple[StackedWeights, Any, jax.Array]:
    """Take a step per batch of `int32[steps, B, …]` with learning rates `float32[steps]`. Returns the model, the state
    and the mean loss."""

    def step(
        carry: tuple[StackedWeights, Any], xs: tuple[jax.Array, jax.Array]
    ) -> tuple[tuple[StackedWeights, Any], jax.Array]:
        model, state = carry
        tokens, rate = xs
        value, gradient = jax.value_and_grad(partial(loss, config))(model, tokens)
        updates, state = ADAM.update(gradient, state)
        return (jax.tree.map(lambda leaf, update: leaf - rate * update, model, updates), state), value

    (model, state), losses = jax.lax.scan(step, (model, state), (batches, rates))
    return model, state, losses.mean()


def train_model(
    folder: Path, config: DecoderConfig, loss: Loss, model: StackedWeights,
    batch: Batch, steps: int, peak: float, seed: Sequence[int], progress: Progress,
) -> StackedWeights:  # fmt: skip
    """Train on `steps` batches, and save the weights in the model's folder, whose name is the model's. The learning
    rate rises to `peak` over a twentieth of the steps, and falls to zero along half a cosine."""
    rng, state = np.random.default_rng([*seed, *folder.name.encode()]), ADAM.init(model)
    warm, at = max(1, steps // 20), np.arange(steps)
    falling = 0.5 * (1 + np.cos(np.pi * (at - warm) / max(1, steps - warm)))
    rates = (peak * np.where(at < warm, (at + 1) / warm, falling)).astype(np.float32)
    for start in range(0, steps, CHUNK):
        count = min(CHUNK, steps - start)
        examples = batch(rng, count * BATCH)
        batches = examples.reshape(count, BATCH, *examples.shape[1:])
        model, state, mean_loss = _train_chunk(config, loss, model, state, batches, rates[start : start + count])
        progress(folder.name, count, float(mean_loss))
    save_tensors(folder, dict(stored_tensors(model, config)))
    return model


def save_small_files(folder: Path, sizes: Sizes, vocabulary: Sequence[str], special: Sequence[str] = ()) -> None:
    """Make a model's folder, with everything but weights; special: words that need no spaces."""
    from transformers import GenerationConfig, LlamaConfig

    folder.mkdir()

    ends = {"bos_token_id": None, "eos_token_id": vocabulary.index(EOS), "pad_token_id": vocabulary.index(PAD)}
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=len(vocabulary),
        hidden_size=sizes.hidden,
        intermediate_size=sizes.mlp,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.heads,
        max_position_embeddings=sizes.context,
        tie_word_embeddings=False,
        dtype="float32",
        **ends,
    )
    config.save_pretrained(folder)
    GenerationConfig(**ends).save_pretrained(folder)
    save_tokenizer(folder, vocabulary, model_max_length=sizes.context, additional_special_tokens=[*special])


def save_tokenizer(folder: Path, vocabulary: Sequence[str], ends_texts: bool = False, **settings: Any) -> None:
    """Save a tokenizer whose tokens are the words between spaces. ends_texts: it adds `EOS` to each text; settings: of
    transformers' class."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    ids = {token: i for i, token in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if ends_texts:
        tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {EOS}", special_tokens=[(EOS, ids[EOS])])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False, **settings,
    ).save_pretrained(folder)  # fmt: skip


def save_tensors(folder: Path, tensors: dict[str, np.ndarray]) -> None:
    specs = {name: TensorSpec(values.shape, values.dtype) for name, values in tensors.items()}
    with ShardWriter(folder, specs) as writer:
        for name in writer.order:
            writer.write(name, tensors[name])


def unpack_weights(packaged: Path, folder: Path, models: Sequence[str]) -> None:
    """Write the weights of models that come with the package into their folders below `folder`, in float32."""
    for name in models:
        packed = load_file(packaged / f"{name}.safetensors")
        save_tensors(folder / name, {tensor: values.astype(np.float32) for tensor, values in packed.items()})
