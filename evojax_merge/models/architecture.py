"""What an architecture is: its tensors, what its config means, and its forward pass in three functions.

An `Architecture` is plain data. The families that come with the program are in models.families, a file each, which the
registry imports when it is first asked. One from outside is made known with `register_architecture`. Everything else
(the bank, the evaluator, generation, layer paths, recipes, the export) asks the architecture, and has no branch for any
of them.

Letters: L layers of a stack, B rows of T tokens. Weights keep Hugging Face's orientation `[out, in]`.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from typing import Any, Protocol

import jax
import numpy as np

from evojax_merge.errors import nearest, shown
from evojax_merge.models.config import DecoderConfig
from evojax_merge.models.config_keys import Expected
from evojax_merge.models.gguf import Gguf
from evojax_merge.models.layers import Attend, KeyValue, SequenceLayout, Weights

# The stack of layers that the forward pass of a decoder runs through.
LAYERS = "layers"
# Ends of the names of what earlier files hold beside the tensors, in most architectures.
BUFFERS = ("rotary_emb.inv_freq",)
# The components of a layer that every architecture has, and one that mixtures of experts have besides.
COMPONENTS = ("attention", "mlp", "norm")
ROUTER = "router"
# Leaves that every architecture has, and one that it may have: the LM head, where it is not the embedding.
EMBEDDING, FINAL_NORM, HEAD = "embed", "final_norm", "head"


@dataclass(frozen=True)
class Leaf:
    """One tensor, or one of each layer of a stack, or one of each expert of each layer.

    name: in the pytree; tensor: in the file, with `{layer}` where it is of a stack, and `{expert}` where each expert
    has one; component: of a stack one of `COMPONENTS` or `ROUTER`, else embedding, norm or head; shape: in the names of
    `Architecture.dimensions`, the experts first where each has a tensor; stack: which, None for a leaf outside of the
    layers. sharded_axis: the axis of `[…, out, in]`, counted from its end, that is cut where
    devices share a model (what a layer reads from the hidden state by its outputs, what it writes back by its inputs,
    the vocabulary by its rows; None: each device has all of it). writes_residual: whether what a layer adds to the
    residual stream is proportional to it (together with the others of whom that is said), so that a layer path's
    scale can be folded into it: to an output projection, or to the gain of the norm behind it. gain_offset: what is
    added to it before it multiplies; 1 for a norm that stores its gain less one, and it is that gain which is scaled.
    transposed: whether it is a linear module's weight that is kept `[in, out]` (transformers' Conv1D). present_if:
    whether a model of a config has it.
    """

    name: str
    tensor: str
    component: str
    shape: tuple[str, ...]
    stack: str | None = None
    sharded_axis: int | None = None
    writes_residual: bool = False
    gain_offset: float = 0.0
    transposed: bool = False
    present_if: Callable[[Any], bool] = lambda config: True

    @property
    def has_experts(self) -> bool:
        """Whether each expert has a tensor of its own in the file, of the leaf's shape without its first axis."""
        return "{expert}" in self.tensor

    def tensor_of(self, layer: int = 0, expert: int = 0) -> str:
        """The tensor's name in the file, of a layer and of an expert, as far as it has them."""
        return self.tensor.replace("{layer}", str(layer)).replace("{expert}", str(expert))


class SharedWeights(Protocol):
    """The leaves outside of the layers: in memory, or merged when they are asked for."""

    def leaf(self, name: str) -> jax.Array: ...
    def rows(self, name: str, ids: jax.Array) -> jax.Array:
        """`[…, *]`: the rows `ids: int32[…]` of a leaf `[n, *]`. Of a merge no others are computed."""
        ...


@dataclass(frozen=True, eq=False)
class Architecture:
    """What the program has to know of a family of models.

    model_type: as in config.json. leaves: all tensors; `embed` `[vocab, hidden]` and `final_norm` are among them, and
    `head` `[vocab, hidden]` where it may be untied. A model whose head is the embedding (config.head_is_embedding) has
    no `head`.

    keys: the keys of config.json that its forward pass reads, and what each must be. config_class: the name of its
    class in transformers, which then fills in defaults, and tells what else could matter; without one, defaults: the
    values of keys that may be missing (beside a class that of tie_word_embeddings alone, where it is true: a merge
    loads no class). read_config: those keys with their values -> the static config; raises ValueError, whose text is
    shown behind the file's name.

    dimensions: the sizes that the leaves' shapes are written in. depths: how many layers each stack has.

    embed: (config, weights, tokens int32[B, T], layout) -> the hidden states before the first layer. position_tables:
    (config, layout) -> what positions give to every layer, computed once (any pytree; leaves have axes `[B, T, …]`); a
    tuple of such, of one structure, where layers differ in it: `config.position_kinds` says which layer takes which.
    block: (config, a layer's weights, hidden states, its position tables, attend) -> the hidden states after it, and
    what `attend` kept; `attend` is prefill or decoding with a cache, so that a block is written once. final_norm:
    (config, weights, hidden states) -> what the head's rows are multiplied with. map_logits: (config, those products,
    float32) -> logits: an increasing function of each, such as a soft cap. always_maps_logits: whether every model of
    the family has such a function; transformers leaves it out inside of a larger model, so that a text decoder there
    is refused.

    buffers: ends of the names of what earlier files hold beside the tensors, and no forward pass reads.

    no_adapter: why PEFT has no adapters of all its matrices, where it has none.

    packed: tensors of other files, by their names there, and the leaves that each of them holds, one above the other:
    `[E, …]` for all experts where these have tensors of their own.

    filters: the substring of the tensors' names by which a recipe speaks of each component, and of each leaf outside of
    the layers; by default their whole names. Of components whose filters are in the name of a layer's tensor, the first
    has to be the tensor's own.

    gguf: the form of its GGUF files; None: they are refused.
    """

    model_type: str
    leaves: tuple[Leaf, ...]
    keys: Mapping[str, Expected]
    read_config: Callable[[Mapping[str, Any]], DecoderConfig]
    dimensions: Callable[[Any], Mapping[str, int]]
    embed: Callable[[Any, SharedWeights, jax.Array, SequenceLayout], jax.Array]
    position_tables: Callable[[Any, SequenceLayout], Any]
    block: Callable[[Any, Weights, jax.Array, Any, Attend], tuple[jax.Array, KeyValue]]
    final_norm: Callable[[Any, SharedWeights, jax.Array], jax.Array]
    map_logits: Callable[[Any, jax.Array], jax.Array] = lambda config, products: products
    always_maps_logits: bool = False
    config_class: str | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)
    depths: Callable[[Any], Mapping[str, int]] = lambda config: {LAYERS: config.layers}
    filters: Mapping[str, str] = field(default_factory=dict)
    buffers: tuple[str, ...] = BUFFERS
    no_adapter: str = ""
    packed: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    gguf: Gguf | None = None

    def __post_init__(self) -> None:
        problem = _complaint(self.leaves, self.components, self.filters)
        if problem is None and self.gguf is not None and self.gguf.names:
            missing = sorted({leaf.name for leaf in self.leaves} - self.gguf.names.keys())
            problem = f"gguf.names lacks the leaves {', '.join(missing)}" if missing else None
        if problem is not None:
            raise ValueError(f"architecture {self.model_type}: {problem}")

    def leaf(self, name: str) -> Leaf | None:
        """The leaf of that name, if there is one."""
        return next((leaf for leaf in self.leaves if leaf.name == name), None)

    def leaf_of(self, tensor: str) -> Leaf | None:
        """The leaf that a tensor of the file is of, by its name; None: of none."""
        return next((leaf for leaf in self.leaves if _pattern(leaf.tensor).fullmatch(tensor)), None)

    @property
    def components(self) -> tuple[str, ...]:
        """The components of a layer, in the order of the recipe's component axis."""
        has_router = any(leaf.component == ROUTER for leaf in self.leaves)
        return (*COMPONENTS, ROUTER) if has_router else COMPONENTS

    @property
    def shared(self) -> tuple[Leaf, ...]:
        """The leaves outside of the layers, whether or not a model has them."""
        return tuple(leaf for leaf in self.leaves if leaf.stack is None)


@cache
def _pattern(tensor: str) -> re.Pattern[str]:
    """Of the names of a leaf's tensors."""
    return re.compile(re.sub(r"\\\{(?:layer|expert)\\\}", r"\\d+", re.escape(tensor)))


def _complaint(leaves: tuple[Leaf, ...], components: tuple[str, ...], filters: Mapping[str, str]) -> str | None:
    """What is wrong with the leaves of an architecture, if anything."""
    names = [leaf.name for leaf in leaves]
    double = next((name for name in names if names.count(name) > 1), None)
    if double is not None:
        return f"two leaves are named {double!r}"
    missing = next((name for name in (EMBEDDING, FINAL_NORM) if name not in names), None)
    if missing is not None:
        return f"has no leaf {missing!r}"
    for leaf in leaves:
        known = components if leaf.stack is not None else ("embedding", "norm", "head")
        if leaf.component not in known:
            return f"leaf {leaf.name!r}: component {leaf.component!r}; expected one of {', '.join(known)}"
        if (leaf.stack is None) == ("{layer}" in leaf.tensor):
            return (
                f"leaf {leaf.name!r}: expected {{layer}} in the tensor's name where the leaf is of a stack, only there"
            )
        if leaf.has_experts and leaf.stack is None:
            return f"leaf {leaf.name!r}: {{expert}} in the tensor's name; expected it in a stack alone"
    if not any(leaf.writes_residual for leaf in leaves):
        return "no leaf has writes_residual, into which a layer path's scale is folded"
    return _complaint_of_filters(leaves, components, filters) if filters else None


def _complaint_of_filters(
    leaves: tuple[Leaf, ...], components: tuple[str, ...], filters: Mapping[str, str]
) -> str | None:
    """What is wrong with the filters that an architecture declares, if anything."""
    shared = [leaf.name for leaf in leaves if leaf.stack is None]
    if filters.keys() != {*components, *shared}:
        return f"filters: expected one for each of {', '.join(sorted({*components, *shared}))}"
    # A recipe lists the filters of leaves outside of the layers first.
    listed = [*shared, *(name for name in filters if name in components)]
    for leaf in leaves:
        order, own = (listed, leaf.component) if leaf.stack is not None else (shared, leaf.name)
        found = next((name for name in order if filters[name] in leaf.tensor), None)
        if found != own:
            return f"filters: that of {found or 'nothing'} takes {leaf.tensor}, which is of {own}"
    return None


# ---------------------------------------------------------------------------------------------------------------
# The registry


@cache
def _registry() -> dict[str, Architecture]:
    package = import_module("evojax_merge.models.families")
    modules = [import_module(f"{package.__name__}.{module.name}") for module in iter_modules(package.__path__)]
    public = [value for module in modules for name, value in vars(module).items() if not name.startswith("_")]
    return {value.model_type: value for value in public if isinstance(value, Architecture)}


def register_architecture(architecture: Architecture) -> Architecture:
    """Make an architecture known: checkpoints of its model_type are then searched, evaluated and merged like those of
    the families that come with the program. Raises ValueError where another has that model_type: what is compiled
    knows an architecture by it."""
    if not isinstance(architecture, Architecture):
        raise ValueError(f"architecture: {shown(architecture)}; expected an Architecture")
    if _registry().setdefault(architecture.model_type, architecture) is not architecture:
        raise ValueError(f"architecture {architecture.model_type!r} is registered already")
    return architecture


def model_types() -> tuple[str, ...]:
    """The model_type of every known architecture."""
    return tuple(_registry())


def gguf_architectures() -> dict[str, list[Architecture]]:
    """The architectures with GGUF files, by general.architecture: two where those with experts are another one."""
    by_name: dict[str, list[Architecture]] = {}
    for architecture in _registry().values():
        if architecture.gguf is not None:
            by_name.setdefault(architecture.gguf.name, []).append(architecture)
    return dict(sorted(by_name.items()))


def known_architecture(model_type: object) -> Architecture | None:
    """The architecture of a model_type, as a config gives it; None where there is none."""
    return _registry().get(model_type) if isinstance(model_type, str) else None


def find_architecture(model_type: object) -> Architecture:
    """The architecture of a model_type, as a config gives it. Raises ValueError with the nearest known name."""
    found = known_architecture(model_type)
    if found is None:
        near = nearest(model_type, model_types()) if isinstance(model_type, str) else None
        hint = "" if near is None else f" (did you mean '{near}'?)"
        raise ValueError(f"model_type is {shown(model_type)}{hint}; expected one of {', '.join(model_types())}")
    return found


# ---------------------------------------------------------------------------------------------------------------
# A model of a config


def architecture_of(config: DecoderConfig) -> Architecture:
    return find_architecture(config.architecture)


def dimensions(config: DecoderConfig) -> Mapping[str, int]:
    """The sizes that the shapes of the leaves are written in."""
    return architecture_of(config).dimensions(config)


def depths(config: DecoderConfig) -> Mapping[str, int]:
    """How many layers each stack has."""
    return architecture_of(config).depths(config)


def leaves_of(config: DecoderConfig) -> list[Leaf]:
    """The leaves that a model of this config has."""
    return [leaf for leaf in architecture_of(config).leaves if leaf.present_if(config)]


def stack_leaves(config: DecoderConfig, stack: str = LAYERS) -> list[Leaf]:
    """Those of a stack."""
    return [leaf for leaf in leaves_of(config) if leaf.stack == stack]


def shared_leaves(config: DecoderConfig) -> list[Leaf]:
    """Those outside of the layers."""
    return [leaf for leaf in leaves_of(config) if leaf.stack is None]


def tensor_grid(config: DecoderConfig, leaf: Leaf) -> tuple[int, ...]:
    """How a leaf's tensors are stacked: `(L,)` in a stack, `(L, E)` where each of E experts has a tensor, `()` outside
    of the layers, where a leaf is one tensor."""
    if leaf.stack is None:
        return ()
    layers = depths(config)[leaf.stack]
    return (layers, dimensions(config)[leaf.shape[0]]) if leaf.has_experts else (layers,)


def tensor_shape(config: DecoderConfig, leaf: Leaf) -> tuple[int, ...]:
    """The shape of each of a leaf's tensors in the file."""
    sizes = dimensions(config)
    return tuple(sizes[axis] for axis in (leaf.shape[1:] if leaf.has_experts else leaf.shape))


def leaf_tensors(config: DecoderConfig, leaf: Leaf) -> list[str]:
    """The names of all of a leaf's tensors in the file, in the order of its grid."""
    return [leaf.tensor_of(*place) for place in np.ndindex(tensor_grid(config, leaf))]


def tensors_of(config: DecoderConfig) -> Iterator[tuple[str, Leaf, tuple[int, ...]]]:
    """Every tensor of a model of this config: its name in the file, its leaf, and its place in the leaf's grid: the
    layer, then the expert, as far as it has them. Those outside of the layers come first."""
    yield from ((leaf.tensor, leaf, ()) for leaf in shared_leaves(config))
    for stack, depth in depths(config).items():
        grids = [(leaf, tensor_grid(config, leaf)[1:]) for leaf in stack_leaves(config, stack)]
        for i in range(depth):
            for leaf, grid in grids:
                yield from ((leaf.tensor_of(i, *rest), leaf, (i, *rest)) for rest in np.ndindex(grid))
