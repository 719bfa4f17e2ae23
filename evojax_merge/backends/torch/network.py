"""A torch module as a function of its tensors: traced by JAX through torchax, or called with each candidate."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

# The field of a module's output that tasks score.
OUTPUT = "logits"
# The first version of torchax that imports with torch 2.13 and later.
NEW_TORCHAX = "0.0.14.dev20260814"


@cache
def torchax_environment() -> tuple[Any, str]:
    """The environment in which torch's operations are JAX's, and ""; or None, and why there is none."""
    try:
        installed = version("torchax")
    except PackageNotFoundError:
        return None, "torchax is not installed; pip install 'evojax-merge[torch]'"
    try:
        import torchax

        return torchax.default_env(), ""
    # A version that does not fit torch fails with an error of any kind.
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        return None, (
            f"torchax {installed} does not import with torch {torch.__version__} ({reason}); torchax "
            f"{NEW_TORCHAX} and later do"
        )


@dataclass(frozen=True, eq=False)
class Network:
    """A module in float32 that is given its weights with each call. constants: its other tensors by name, of which no
    merge changes any: counts, positions, and buffers that no file holds."""

    module: Any
    constants: Mapping[str, Any] = field(repr=False)

    @property
    def name(self) -> str:
        return type(self.module).__name__

    def call(self, weights: Mapping[str, Any], inputs: Mapping[str, Any]) -> np.ndarray:
        """The output for a batch, by torch. The weights are not copied where they lie in the CPU's memory."""
        state = {name: to_torch(array).float() for name, array in weights.items()}
        arguments = {name: to_torch(np.asarray(array)) for name, array in inputs.items()}
        with torch.no_grad():
            outputs = torch.func.functional_call(self.module, {**state, **self.constants}, (), arguments)
        result: np.ndarray = outputs[OUTPUT].numpy()
        return result

    def write(self, weights: Mapping[str, Any], inputs: Mapping[str, Any], max_new_tokens: int) -> np.ndarray:
        """int[N, T]: the tokens that the network writes greedily for a batch, by transformers."""
        state = {f"module.{name}": to_torch(array).float() for name, array in weights.items()}
        constants = {f"module.{name}": tensor for name, tensor in self.constants.items()}
        arguments = {name: to_torch(np.asarray(array)) for name, array in inputs.items()}
        options = {"max_new_tokens": max_new_tokens, "do_sample": False, "num_beams": 1}
        with torch.no_grad():
            tokens = torch.func.functional_call(_Writer(self.module), state | constants, (), arguments | options)
        result: np.ndarray = tokens.numpy()
        return result

    def trace(self, weights: Mapping[str, Any], inputs: Mapping[str, Any]) -> jax.Array:
        """The output for a batch, by JAX: the module's operations become those of the program that is traced."""
        environment, _ = torchax_environment()
        state = {name: jnp.asarray(array).astype(jnp.float32) for name, array in weights.items()}
        constants = {name: environment.t2j_copy(tensor) for name, tensor in self.constants.items()}
        arguments = {name: jnp.asarray(array) for name, array in inputs.items()}
        tensors, arguments = environment.j2t_iso(({**state, **constants}, arguments))
        with environment:
            outputs = torch.func.functional_call(self.module, tensors, (), arguments)
        result: jax.Array = environment.t2j_iso(outputs[OUTPUT])
        return result


class _Writer(torch.nn.Module):
    """A module whose call is the generation of another."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module

    def forward(self, **inputs: Any) -> Any:
        return self.module.generate(**inputs)


def to_torch(array: Any) -> Any:
    """An array as a tensor. JAX's arrays on the CPU are not copied, nor are writable ones of NumPy."""
    if isinstance(array, jax.Array):
        if next(iter(array.devices())).platform != "cpu" and not torch.cuda.is_available():
            array = jax.device_put(array, jax.devices("cpu")[0])
        return torch.from_dlpack(array)
    if array.dtype == jnp.bfloat16:
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array if array.flags.writeable else array.copy())


@dataclass(frozen=True, eq=False)
class Scorer:
    """A task's function (weights, rows) -> float[N]: the network on `batch` rows at a time, and its outputs' scores.

    score: (outputs, rows) -> float[n], in JAX; traced: whether JAX traces the network.
    """

    network: Network
    score: Callable[[Any, Mapping[str, Any]], Any]
    batch: int
    traced: bool

    def __call__(self, weights: Mapping[str, Any], rows: Mapping[str, Any]) -> Any:
        size = len(rows["target"])
        if not self.traced:
            parts = [
                self._scored(self.network.call, weights, _rows(rows, range(begin, min(begin + self.batch, size))))
                for begin in range(0, size, self.batch)
            ]
            return np.concatenate(parts)
        if size <= self.batch:
            return self._scored(self.network.trace, weights, rows)
        # The last batch is filled with the first rows.
        count = -(-size // self.batch)
        order = np.arange(count * self.batch) % size
        batches = jax.tree.map(lambda leaf: leaf[order].reshape(count, self.batch, *leaf.shape[1:]), rows)
        scores = jax.lax.map(lambda part: self._scored(self.network.trace, weights, part), batches)
        return scores.reshape(-1)[:size]

    def _scored(self, run: Callable[..., Any], weights: Mapping[str, Any], rows: Mapping[str, Any]) -> Any:
        return self.score(run(weights, rows["inputs"]), rows)


@dataclass(frozen=True, eq=False)
class WrittenScorer:
    """A task's function (weights, rows) -> float[N]: compares the texts that the network writes with the targets.

    tokenizer: decodes them; compare: (text, target) -> a number; targets: by the number that a row has as target.
    """

    network: Network
    tokenizer: Any
    compare: Callable[[str, str], float]
    targets: tuple[str, ...]
    max_new_tokens: int
    batch: int

    def __call__(self, weights: Mapping[str, Any], rows: Mapping[str, Any]) -> np.ndarray:
        texts: list[str] = []
        for begin in range(0, len(rows["target"]), self.batch):
            inputs = _rows(rows["inputs"], range(begin, begin + self.batch))
            tokens = self.network.write(weights, inputs, self.max_new_tokens)
            texts += self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        targets = (self.targets[number] for number in rows["target"])
        return np.array([self.compare(*pair) for pair in zip(texts, targets, strict=True)], np.float32)


def _rows(rows: Mapping[str, Any], numbers: range) -> Any:
    return jax.tree.map(lambda leaf: leaf[numbers.start : numbers.stop], rows)


# ---------------------------------------------------------------------------------------------------------------
# Scores


def label_scores(metric: str) -> Callable[[Any, Mapping[str, Any]], Any]:
    """(outputs float[N, C], rows) -> whether the likeliest label is the target, or the target's log-probability."""

    def score(outputs: Any, rows: Mapping[str, Any]) -> Any:
        target = jnp.asarray(rows["target"])
        if metric == "accuracy":
            return jnp.where(jnp.isfinite(outputs).all(-1), outputs.argmax(-1) == target, jnp.nan)
        return jnp.take_along_axis(jax.nn.log_softmax(outputs), target[:, None], -1)[:, 0]

    return score


def number_scores(metric: str) -> Callable[[Any, Mapping[str, Any]], Any]:
    """(outputs float[N, D], rows) -> minus the mean squared, or absolute, difference from the target."""

    def score(outputs: Any, rows: Mapping[str, Any]) -> Any:
        difference = outputs - rows["target"]
        return -(jnp.square(difference) if metric == "negative_squared_error" else jnp.abs(difference)).mean(-1)

    return score


def token_scores(metric: str) -> Callable[[Any, Mapping[str, Any]], Any]:
    """(outputs float[N, T, V], rows) -> the mean log-probability of the target's tokens; a target of -100 is none."""

    def score(outputs: Any, rows: Mapping[str, Any]) -> Any:
        target = jnp.asarray(rows["target"])
        counts = target >= 0
        chosen = jnp.take_along_axis(jax.nn.log_softmax(outputs), jnp.where(counts, target, 0)[..., None], -1)[..., 0]
        return jnp.where(counts, chosen, 0.0).sum(-1) / counts.sum(-1)

    return score


SCORES: dict[str, Callable[[str], Callable[[Any, Mapping[str, Any]], Any]]] = {
    "classification": label_scores,
    "regression": number_scores,
    "text_to_text": token_scores,
    "transcription": token_scores,
    "likelihood": token_scores,
}


def same_text(text: str, target: str) -> float:
    """1 where the texts agree but for white space, else 0."""
    return float(text.split() == target.split())


def negative_word_error_rate(text: str, target: str) -> float:
    """Minus the share of the target's words that are wrong, missing or too many."""
    import jiwer

    return -float(jiwer.wer(target, text))


COMPARISONS: dict[str, Callable[[str, str], float]] = {
    "exact_match": same_text,
    "negative_word_error_rate": negative_word_error_rate,
}
