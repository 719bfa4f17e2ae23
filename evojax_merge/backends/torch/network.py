"""A torch module as a function of its tensors: traced by JAX through torchax, or called with each candidate."""

import copy
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from evojax_merge.tasks.entropy import negative_entropies
from evojax_merge.tasks.function import UserFunction, checked, guard_user_function
from evojax_merge.tasks.networks import NEGATIVE_ENTROPY

# The field of a module's output that tasks score.
OUTPUT = "logits"
# The number of the likeliest label, in place of a score.
LIKELIEST = "likeliest"
# The tensor of CLIP's family whose exponential multiplies cosines, and what does so for networks without one.
SCALE = "logit_scale"
COSINE_SCALE = 20.0
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


def stored_groups(module: Any, named: Sequence[tuple[str, int]]) -> list[tuple[str, int]]:
    """The names under which a module's tensors are stored, each with its group's number. named: the module's own names,
    likewise. transformers renames, joins and parts tensors when it loads and saves a model."""
    from transformers import PreTrainedModel
    from transformers.core_model_loading import revert_weight_conversion

    if not isinstance(module, PreTrainedModel):
        return list(named)
    groups = dict(named)
    numbered = {
        name: torch.full((), float(groups.get(name, -1))).expand(tensor.shape)
        for name, tensor in module.state_dict().items()
    }
    stored = {name: int(tensor.max()) for name, tensor in revert_weight_conversion(module, numbered).items()}
    return [(name, group) for name, group in stored.items() if group >= 0]


@dataclass(frozen=True, eq=False)
class Network:
    """A module in float32 that is given its weights with each call. constants: its other tensors by name, of which no
    merge changes any: counts, positions, and buffers that no file holds."""

    module: Any
    constants: Mapping[str, Any] = field(repr=False)
    # A copy of the module for each thread, with the same tensors: a call puts its own tensors into the module.
    _copies: threading.local = field(default_factory=threading.local, repr=False)

    @property
    def name(self) -> str:
        return type(self.module).__name__

    @property
    def compares_images(self) -> bool:
        """Return whether the network embeds images and texts, as CLIP does."""
        return hasattr(self.module, "get_image_features") and hasattr(self.module, "get_text_features")

    def call(self, weights: Mapping[str, Any], inputs: Mapping[str, Any], ask: "Ask") -> np.ndarray:
        """The answer to a batch, by torch. The weights are not copied where they lie in the CPU's memory."""
        state = {name: to_torch(array).float() for name, array in weights.items()}
        arguments = {name: to_torch(np.asarray(array)) for name, array in inputs.items()}
        with torch.no_grad():
            result: np.ndarray = self._answer({**state, **self.constants}, arguments, ask).numpy()
        return result

    def trace(self, weights: Mapping[str, Any], inputs: Mapping[str, Any], ask: "Ask") -> jax.Array:
        """The answer to a batch, by JAX: the module's operations become those of the program that is traced."""
        environment, _ = torchax_environment()
        state = {name: jnp.asarray(array).astype(jnp.float32) for name, array in weights.items()}
        constants = {name: environment.t2j_copy(tensor) for name, tensor in self.constants.items()}
        arguments = {name: jnp.asarray(array) for name, array in inputs.items()}
        tensors, arguments = environment.j2t_iso(({**state, **constants}, arguments))
        with environment:
            answer = self._answer(tensors, arguments, ask)
        result: jax.Array = environment.t2j_iso(answer)
        return result

    def loaded(self, weights: Mapping[str, Any]) -> Any:
        """A module with a candidate's weights."""
        module = copy.deepcopy(self.module)
        tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        for name, array in weights.items():
            tensors[name].data = to_torch(array).float().clone()
        return module.eval()

    def measured(
        self, weights: Mapping[str, Any], batches: Sequence[Mapping[str, Any]], ask: "Ask"
    ) -> dict[str, np.ndarray]:
        """The weights with the means and variances of their batch norms measured anew, as the averages over batches
        (see torch.optim.swa_utils.update_bn)."""
        module = self._own_copy()
        norms = {name: part for name, part in module.named_modules() if measures(part)}
        state = {name: to_torch(array).float() for name, array in weights.items()}
        changed = [f"{name}.{key}" for name in norms for key in ("running_mean", "running_var")]
        state.update((name, state[name].clone()) for name in changed)
        counts = {f"{name}.num_batches_tracked": torch.zeros((), dtype=torch.long) for name in norms}
        momenta = {name: part.momentum for name, part in norms.items()}
        try:
            for part in norms.values():
                # Without a momentum every batch counts alike.
                part.train().momentum = None
            with torch.no_grad():
                for batch in batches:
                    arguments = {name: to_torch(np.asarray(array)) for name, array in batch.items()}
                    self._answer({**state, **self.constants, **counts}, arguments, ask)
        finally:
            for name, part in norms.items():
                part.eval().momentum = momenta[name]
        return {**weights, **{name: state[name].numpy().astype(weights[name].dtype) for name in changed}}

    def _answer(self, tensors: Mapping[str, Any], arguments: Mapping[str, Any], ask: "Ask") -> Any:
        named = {f"module.{name}": tensor for name, tensor in tensors.items()}
        return torch.func.functional_call(_Asked(self._own_copy(), ask), named, (dict(arguments),))

    def _own_copy(self) -> Any:
        if not hasattr(self._copies, "module"):
            tensors = [*self.module.parameters(), *self.module.buffers()]
            self._copies.module = copy.deepcopy(self.module, {id(tensor): tensor for tensor in tensors})
        return self._copies.module


def measures(module: Any) -> bool:
    """Return whether a module is a batch norm that keeps means and variances."""
    return isinstance(module, torch.nn.modules.batchnorm._BatchNorm) and module.running_mean is not None


class _Asked(torch.nn.Module):
    """A module as the function of a task."""

    def __init__(self, module: Any, ask: "Ask") -> None:
        super().__init__()
        self.module, self.ask = module, ask

    def forward(self, inputs: Mapping[str, Any]) -> Any:
        return self.ask(self.module, inputs)


# (module, inputs) -> a tensor with a row for each example.
Ask = Callable[[Any, Mapping[str, Any]], Any]


def outputs(module: Any, inputs: Mapping[str, Any]) -> Any:
    """The module's results: its tensor, or that of its head."""
    answer = module(**inputs)
    return answer if torch.is_tensor(answer) else answer[OUTPUT]


def embeddings(module: Any, inputs: Mapping[str, Any]) -> Any:
    """float[N, E]: the embeddings of images or texts: those of a sentence transformer's modules, those that CLIP
    compares, or else the means over a text's tokens of the last states."""
    if hasattr(module, "encode"):
        return module(dict(inputs))["sentence_embedding"]
    name = "get_image_features" if "pixel_values" in inputs else "get_text_features"
    if hasattr(module, name):
        features = getattr(module, name)(**inputs)
        return features if torch.is_tensor(features) else features.pooler_output
    states = module(**inputs).last_hidden_state
    counts = inputs["attention_mask"][..., None].to(states.dtype)
    return (states * counts).sum(1) / counts.sum(1)


@dataclass(frozen=True)
class Writing:
    """Asks for the tokens that a network writes greedily, by transformers: int[N, T]."""

    max_new_tokens: int

    def __call__(self, module: Any, inputs: Mapping[str, Any]) -> Any:
        return module.generate(**inputs, max_new_tokens=self.max_new_tokens, do_sample=False, num_beams=1)


def to_torch(array: Any) -> Any:
    """An array as a tensor. JAX's arrays on the CPU are not copied, nor are writable ones of NumPy."""
    if isinstance(array, jax.Array):
        if next(iter(array.devices())).platform != "cpu" and not torch.cuda.is_available():
            array = jax.device_put(array, jax.devices("cpu")[0])
        return torch.from_dlpack(array)
    if array.dtype == jnp.bfloat16:
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def in_batches(run: Callable[[Any], Any], rows: Any, batch: int, traced: bool) -> Any:
    """run: (rows) -> an array with a row for each of them; its result for all rows, `batch` of them at a time."""
    size = len(jax.tree.leaves(rows)[0])
    if not traced:
        parts = [run(_rows(rows, range(begin, min(begin + batch, size)))) for begin in range(0, size, batch)]
        return np.concatenate(parts)
    if size <= batch:
        return run(rows)
    # The last batch is filled with the first rows.
    count = -(-size // batch)
    order = np.arange(count * batch) % size
    batches = jax.tree.map(lambda leaf: leaf[order].reshape(count, batch, *leaf.shape[1:]), rows)
    answers = jax.lax.map(run, batches)
    return answers.reshape(-1, *answers.shape[2:])[:size]


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
        run = self.network.trace if self.traced else self.network.call

        def scored(part: Mapping[str, Any]) -> Any:
            return self.score(run(weights, part["inputs"], outputs), part)

        return in_batches(scored, rows, self.batch, self.traced)


@dataclass(frozen=True, eq=False)
class EmbeddingScorer:
    """A task's function (weights, rows) -> float[N]: scores by the embeddings, of length 1, of each row's `inputs`, and
    of what they are compared with: the row's `second`, or `others`, the same for all rows (prompts of classes, the
    documents of a corpus).

    score: (first float[N, E], second float[M, E], rows, scale) -> float[N], in JAX; scale: what the network multiplies
    cosines by, where it says so.
    """

    network: Network
    score: Callable[[Any, Any, Mapping[str, Any], Any], Any]
    others: Mapping[str, Any] | None
    batch: int
    traced: bool

    def __call__(self, weights: Mapping[str, Any], rows: Mapping[str, Any]) -> Any:
        first = self._embedded(weights, rows["inputs"])
        second = self._embedded(weights, rows["second"] if self.others is None else self.others)
        scale = jnp.exp(jnp.asarray(weights[SCALE]).astype(jnp.float32)) if SCALE in weights else COSINE_SCALE
        return self.score(first, second, rows, scale)

    def _embedded(self, weights: Mapping[str, Any], inputs: Mapping[str, Any]) -> Any:
        run = self.network.trace if self.traced else self.network.call
        vectors = in_batches(lambda part: run(weights, part, embeddings), inputs, self.batch, self.traced)
        return vectors / jnp.linalg.norm(vectors, axis=-1, keepdims=True)


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
        targets = (self.targets[number] for number in rows["target"])
        pairs = zip(self.written(weights, rows), targets, strict=True)
        return np.array([self.compare(*pair) for pair in pairs], np.float32)

    def written(self, weights: Mapping[str, Any], rows: Mapping[str, Any]) -> list[str]:
        """The texts that the network writes."""
        texts: list[str] = []
        for begin in range(0, len(rows["target"]), self.batch):
            inputs = _rows(rows["inputs"], range(begin, begin + self.batch))
            tokens = self.network.call(weights, inputs, Writing(self.max_new_tokens))
            texts += self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return texts


@dataclass(frozen=True, eq=False)
class FunctionScorer:
    """A task's function (weights, rows) -> float[N] that a user's own computes: of the records, by the number that a
    row has as target, and of the answers to `ask`, float[N, …], or, where there is none, of the module."""

    network: Network
    function: UserFunction
    records: Sequence[Mapping[str, Any]]
    ask: Ask | None
    batch: int

    def __call__(self, weights: Mapping[str, Any], rows: Mapping[str, Any]) -> np.ndarray:
        ask, records = self.ask, [dict(self.records[number]) for number in rows["target"]]
        if ask is None:
            given: Any = self.network.loaded(weights)
        else:
            inputs = rows["inputs"]
            given = in_batches(lambda part: self.network.call(weights, part, ask), inputs, self.batch, traced=False)
        with guard_user_function(self.function.reference):
            return checked(self.function, self.function.call(records, given), len(records))


def _rows(rows: Mapping[str, Any], numbers: range) -> Any:
    return jax.tree.map(lambda leaf: leaf[numbers.start : numbers.stop], rows)


# ---------------------------------------------------------------------------------------------------------------
# Scores


def label_scores(metric: str) -> Callable[[Any, Mapping[str, Any]], Any]:
    """(outputs float[N, C], rows) -> whether the likeliest label is the target, the target's log-probability, minus the
    entropy of the labels, or the likeliest label's number."""

    def score(outputs: Any, rows: Mapping[str, Any]) -> Any:
        target = jnp.asarray(rows["target"])
        if metric == "accuracy":
            return jnp.where(jnp.isfinite(outputs).all(-1), outputs.argmax(-1) == target, jnp.nan)
        if metric == NEGATIVE_ENTROPY:
            return negative_entropies(outputs)
        if metric == LIKELIEST:
            return outputs.argmax(-1)
        return jnp.take_along_axis(jax.nn.log_softmax(outputs), target[:, None], -1)[:, 0]

    return score


def number_scores(metric: str) -> Callable[[Any, Mapping[str, Any]], Any]:
    """(outputs float[N, …], rows) -> minus the mean squared, or absolute, difference from the target."""

    def score(outputs: Any, rows: Mapping[str, Any]) -> Any:
        difference = outputs - rows["target"]
        error = jnp.square(difference) if metric == "negative_squared_error" else jnp.abs(difference)
        return -error.reshape(len(error), -1).mean(-1)

    return score


def token_scores(metric: str) -> Callable[[Any, Mapping[str, Any]], Any]:
    """(outputs float[N, T, V], rows) -> the mean log-probability of the target's tokens, or minus the mean entropy of
    the distributions in their places; a target of -100 is none."""

    def score(outputs: Any, rows: Mapping[str, Any]) -> Any:
        target = jnp.asarray(rows["target"])
        counts = target >= 0
        if metric == NEGATIVE_ENTROPY:
            chosen = negative_entropies(outputs)
        else:
            places = jnp.where(counts, target, 0)[..., None]
            chosen = jnp.take_along_axis(jax.nn.log_softmax(outputs), places, -1)[..., 0]
        return jnp.where(counts, chosen, 0.0).sum(-1) / counts.sum(-1)

    return score


def class_scores(metric: str, classes: int) -> Callable[[Any, Any, Mapping[str, Any], Any], Any]:
    """(images float[N, E], prompts float[C * T, E], rows, scale) -> the label's scores: an image's class is that whose
    prompts' mean is the most similar. Each of C classes has T prompts, one behind the other."""
    score = label_scores(metric)

    def compare(images: Any, prompts: Any, rows: Mapping[str, Any], scale: Any) -> Any:
        means = prompts.reshape(classes, -1, prompts.shape[-1]).mean(1)
        return score(scale * images @ (means / jnp.linalg.norm(means, axis=-1, keepdims=True)).T, rows)

    return compare


def similarity_scores(metric: str) -> Callable[[Any, Any, Mapping[str, Any], Any], Any]:
    """(first float[N, E], second float[N, E], rows, scale) -> float[N], whose mean is the correlation of the pairs'
    cosines with the targets, or of their ranks: the product of both in standard units."""

    def compare(first: Any, second: Any, rows: Mapping[str, Any], scale: Any) -> Any:
        cosines, target = (first * second).sum(-1), jnp.asarray(rows["target"])
        if metric == "spearman":
            cosines, target = jax.scipy.stats.rankdata(cosines), jax.scipy.stats.rankdata(target)
        return _standard(cosines) * _standard(target)

    return compare


def _standard(values: Any) -> Any:
    """Values less their mean, in units of their deviation; zeros where they are all equal."""
    centred = values - values.mean()
    deviation = jnp.sqrt(jnp.square(centred).mean())
    return jnp.where(deviation > 0, centred / jnp.where(deviation > 0, deviation, 1.0), 0.0)


def ranking_scores(metric: str, k: int) -> Callable[[Any, Any, Mapping[str, Any], Any], Any]:
    """(queries float[N, E], documents float[M, E], rows, scale) -> float[N]: how high a query's documents come among
    all of them by cosine; rows["relevant"] is bool[N, M]. A tie counts against the query."""

    def compare(queries: Any, documents: Any, rows: Mapping[str, Any], scale: Any) -> Any:
        relevant = jnp.asarray(rows["relevant"])
        cosines = queries @ documents.T
        if metric == "log_probability":
            chances = jax.nn.log_softmax(scale * cosines)
            return jax.nn.logsumexp(jnp.where(relevant, chances, -jnp.inf), axis=-1)
        # Relevant documents come last among equals.
        ordered = jnp.lexsort((relevant, -cosines))[:, :k]
        hits = jnp.take_along_axis(relevant, ordered, -1).astype(jnp.float32)
        counts = jnp.minimum(relevant.sum(-1), k) if metric == "ndcg" else relevant.sum(-1)
        places = jnp.arange(hits.shape[1])
        if metric == "recall":
            score = hits.sum(-1) / counts
        elif metric == "reciprocal_rank":
            score = (hits / (places + 1)).max(-1)
        else:
            gains = 1 / jnp.log2(places + 2)
            score = (hits * gains).sum(-1) / jnp.where(places < counts[:, None], gains, 0.0).sum(-1)
        return jnp.where(jnp.isfinite(cosines).all(-1), score, jnp.nan)

    return compare


SCORES: dict[str, Callable[[str], Callable[[Any, Mapping[str, Any]], Any]]] = {
    "classification": label_scores,
    "regression": number_scores,
    "text_to_text": token_scores,
    "transcription": token_scores,
    "likelihood": token_scores,
}


def negative_word_error_rate(text: str, target: str) -> float:
    """Minus the share of the target's words that are wrong, missing or too many."""
    import jiwer

    return -float(jiwer.wer(target, text))


COMPARISONS: dict[str, Callable[[str, str], float]] = {
    # White space does not count.
    "exact_match": lambda text, target: float(text.split() == target.split()),
    "negative_word_error_rate": negative_word_error_rate,
}
