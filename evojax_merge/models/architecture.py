"""An architecture: its tensors, the meaning of its config, and its forward pass in three functions.

An `Architecture` is plain data. The families that come with the program are in models.families, one file each; the
registry imports them at its first use. `register_architecture` adds one from outside. All other code (the bank, the
evaluator, generation, layer paths, recipes, the export) asks the architecture, and has no branch for any family.

Letters: L layers of a stack, B rows of T tokens. Weights keep Hugging Face's orientation `[out, in]`.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from evojax_merge.models.layers import SequenceLayout, Weights

# The stack of layers that the forward pass of a decoder runs through.
LAYERS = "layers"
# Suffixes of the names of buffers, which earlier files of most architectures hold beside the tensors.
BUFFERS = ("rotary_emb.inv_freq",)
# The components of a layer in every architecture, and one more of mixtures of experts.
COMPONENTS = ("attention", "mlp", "norm")
ROUTER = "router"
# What a layer keeps of earlier tokens: keys and values, or the state of a recurrence (models.recurrence).
ATTENTION, RECURRENCE = "attention", "recurrence"
# The beginning of names of layers behind the decoder's last, before a number from 0 on. Files of some families have
# them as `model.layers.N.…`, from N = num_hidden_layers on.
NEXT_LAYERS = "next_layers_"
# Leaves that every architecture has, and one that it may have: the LM head, where it is not the embedding.
EMBEDDING, FINAL_NORM, HEAD = "embed", "final_norm", "head"


@dataclass(frozen=True)
class Leaf:
    """One tensor, or one per layer of a stack, or one per expert of each layer.

    name: the leaf's name in the pytree; tensor: the tensor's name in the file, with `{layer}` in a stack and `{expert}`
    where each expert has a tensor; component: one of `COMPONENTS` or `ROUTER` in a stack, else embedding, norm, head or
    projector; shape: the names of its axes in `Architecture.dimensions`, experts first where each has a tensor; stack:
    the name of its stack, None for a leaf outside of the layers. sharded_axis: the axis of `[…, out, in]`, counted from
    the end, that is sharded where devices share a model (the outputs of a matrix that reads the hidden state, the
    inputs of one that writes it, the rows of the vocabulary); None: each device has the whole leaf. writes_residual:
    whether a layer's contribution to the residual stream is proportional to this leaf (together with the other leaves
    that have the flag), so that a layer path's scale can be folded into it: an output projection, or the gain of the
    norm behind it. gain_offset: the number that is added to the leaf before it multiplies; 1 for a norm that stores its
    gain less one; a scale multiplies the gain itself. transposed: whether the leaf is a linear module's weight stored
    `[in, out]` (transformers' Conv1D). present_if: whether a model of a config has the leaf.
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
        """Return whether each expert has its own tensor in the file, of the leaf's shape without the first axis."""
        return "{expert}" in self.tensor

    def tensor_of(self, layer: int = 0, expert: int = 0) -> str:
        """The tensor's name in the file, for a layer and an expert where the leaf has these."""
        return self.tensor.replace("{layer}", str(layer)).replace("{expert}", str(expert))


def leaves_in(module: str, component: str, stack: str) -> Callable[..., Leaf]:
    """(name, tensor, *shape, **further fields) -> a leaf of a stack whose tensor's name begins with `module`."""
    return lambda name, tensor, *shape, **more: Leaf(name, module + tensor, component, shape, stack, **more)


Block = Callable[[Any, Weights, jax.Array, Any, Any], tuple[jax.Array, Any]]


@dataclass(frozen=True)
class LayerType:
    """A type of layer of models whose layers differ.

    block: see `Architecture.block`, with access to the layer's memory as the last argument, and what to keep in it as
    the second result: `Attend` and keys and values for `ATTENTION`, `models.recurrence.Recur` and a state for
    `RECURRENCE`, tuples of these where `memory` is a tuple. stacks: the stacks whose leaves the layers have.
    """

    block: Block
    stacks: tuple[str, ...]
    memory: str | tuple[str, ...] = ATTENTION


class SharedWeights(Protocol):
    """The leaves outside of the layers: in memory, or merged at each call."""

    def leaf(self, name: str) -> jax.Array: ...
    def rows(self, name: str, ids: jax.Array) -> jax.Array:
        """`[…, *]`: the rows `ids: int32[…]` of a leaf `[n, *]`. A merge computes these rows alone."""


@dataclass(frozen=True, eq=False)
class Architecture:
    """A family of models, as data.

    model_type: the key in config.json. leaves: all tensors; `embed` `[vocab, hidden]` and `final_norm` are among them,
    and `head` `[vocab, hidden]` where it may be untied. A model whose head is the embedding (config.head_is_embedding)
    has no `head`.

    keys: the keys of config.json that its forward pass reads, and the rule for each value. config_class: the name of
    its class in transformers, which fills in defaults and lists the other keys that could matter. defaults: the values
    of keys that may be missing, for an architecture without such a class (beside a class only tie_word_embeddings,
    where it is true: a merge loads no class). read_config: the values of `keys`, by name -> the static config; raises
    ValueError, whose text is shown behind the file's name.

    dimensions: the sizes that the leaves' shapes are written in. layer_types: the types of layers by the names in
    `config.layer_types`; empty: all layers are of the stack `layers`, and run `block`. type_keys: (the names of the
    layers' types) -> the keys of config.json that say them, with their values; raises ValueError for an order that no
    value says; None: `layer_types` in config.json says any order, or all layers are alike. further_stacks: the numbers
    of the layers of stacks that the forward pass does not run.

    embed: (config, weights, tokens int32[B, T], layout) -> the hidden states before the first layer. position_tables:
    (config, layout) -> the layers' inputs that depend on positions, computed once (any pytree; leaves have axes `[B, T,
    …]`); a tuple of such pytrees, of one structure, where layers differ: `config.position_kinds` is each layer's index
    into it. block: (config, a layer's weights, hidden states, its position tables, attend) -> the hidden states after
    the layer, and the keys and values that `attend` returned; `attend` (`models.layers.Attend`) is prefill or decoding
    with a cache, so that a block is written once. final_norm: (config, weights, hidden states) -> the vectors that the
    head's rows are multiplied with. map_logits: (config, the products of head and vectors, float32) -> logits: an
    increasing function of each product, such as a soft cap. always_maps_logits: whether every model of the family has
    such a function; transformers leaves it out inside of a larger model, so that a text decoder there is refused.

    bidirectional_images: whether the positions of an image attend to each other in both directions.

    text_model: for the text decoder of a larger model, the model_type of text models with the same tensors and the same
    forward pass over texts, which merge into it; None where these have its own model_type.

    buffers: suffixes of the names of buffers that earlier files hold, and that no forward pass reads.

    aside: beginnings of the names of tensors that the forward pass does not run, such as heads for several tokens: a
    search keeps them as they are in one model. With `NEXT_LAYERS` among them, layers behind the last are such tensors.

    no_adapter: the reason where PEFT has no adapters for all of its matrices.

    body_in_memory: the beginning of tensor names in transformers' memory, where it is another than in files.

    packed: the names of stacked tensors in other forms of the files, and the leaves that each of them holds, one above
    the other: `[E, …]` for all experts where each expert has a tensor here.

    transposable: leaves whose tensors some files hold with their last two axes exchanged; the axis that is as long as
    the hidden state tells which.

    filters: the substring of tensor names that selects, in a recipe, each component and each leaf outside of the
    layers; by default the whole names. Where several components' filters are in the name of a layer's tensor, the first
    must be the tensor's component.

    gguf: the form of its GGUF files; None: GGUF files are refused.
    """

    model_type: str
    leaves: tuple[Leaf, ...]
    keys: Mapping[str, Expected]
    read_config: Callable[[Mapping[str, Any]], DecoderConfig]
    dimensions: Callable[[Any], Mapping[str, int]]
    embed: Callable[[Any, SharedWeights, jax.Array, SequenceLayout], jax.Array]
    position_tables: Callable[[Any, SequenceLayout], Any]
    block: Block
    final_norm: Callable[[Any, SharedWeights, jax.Array], jax.Array]
    map_logits: Callable[[Any, jax.Array], jax.Array] = lambda config, products: products
    always_maps_logits: bool = False
    bidirectional_images: bool = False
    text_model: str | None = None
    config_class: str | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)
    layer_types: Mapping[str, LayerType] = field(default_factory=dict)
    type_keys: Callable[[Sequence[str]], Mapping[str, Any]] | None = None
    further_stacks: Callable[[Any], Mapping[str, tuple[int, ...]]] = lambda config: {}
    filters: Mapping[str, str] = field(default_factory=dict)
    buffers: tuple[str, ...] = BUFFERS
    aside: tuple[str, ...] = ()
    no_adapter: str = ""
    body_in_memory: str | None = None
    packed: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    transposable: tuple[str, ...] = ()
    gguf: Gguf | None = None

    def __post_init__(self) -> None:
        problem = _complaint(self.leaves, self.components, self.filters)
        if problem is None and self.gguf is not None and self.gguf.names:
            missing = sorted({leaf.name for leaf in self.leaves} - self.gguf.names.keys())
            problem = f"gguf.names lacks the leaves {', '.join(missing)}" if missing else None
        if problem is not None:
            raise ValueError(f"architecture {self.model_type}: {problem}")

    def leaf(self, name: str) -> Leaf | None:
        return next((leaf for leaf in self.leaves if leaf.name == name), None)

    def leaf_of(self, tensor: str) -> Leaf | None:
        """The leaf that holds a tensor of the file, by the tensor's name; None: no leaf holds it."""
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
    """The pattern of the names of a leaf's tensors."""
    return re.compile(re.sub(r"\\\{(?:layer|expert)\\\}", r"\\d+", re.escape(tensor)))


def _complaint(leaves: tuple[Leaf, ...], components: tuple[str, ...], filters: Mapping[str, str]) -> str | None:
    """The first fault of an architecture's leaves; None: there is none."""
    names = [leaf.name for leaf in leaves]
    double = next((name for name in names if names.count(name) > 1), None)
    if double is not None:
        return f"two leaves are named {double!r}"
    missing = next((name for name in (EMBEDDING, FINAL_NORM) if name not in names), None)
    if missing is not None:
        return f"has no leaf {missing!r}"
    for leaf in leaves:
        expected = components if leaf.stack is not None else ("embedding", "norm", "head", "projector")
        if leaf.component not in expected:
            return f"leaf {leaf.name!r}: component {leaf.component!r}; expected one of {', '.join(expected)}"
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
    """The first fault of the filters that an architecture declares; None: there is none."""
    shared = [leaf.name for leaf in leaves if leaf.stack is None]
    if filters.keys() != {*components, *shared}:
        return f"filters: expected one for each of {', '.join(sorted({*components, *shared}))}"
    # A recipe lists the filters of leaves outside of the layers first.
    listed = [*shared, *(name for name in filters if name in components)]
    for leaf in leaves:
        order, holder = (listed, leaf.component) if leaf.stack is not None else (shared, leaf.name)
        first = next((name for name in order if filters[name] in leaf.tensor), None)
        if first != holder:
            return f"filters: that of {first or 'nothing'} takes {leaf.tensor}, which is of {holder}"
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
    """Register an architecture: checkpoints of its model_type are then searched, evaluated and merged like those of the
    families that come with the program. Raises ValueError where another architecture has that model_type, by which
    compiled programs identify it."""
    if not isinstance(architecture, Architecture):
        raise ValueError(f"architecture: {shown(architecture)}; expected an Architecture")
    if _registry().setdefault(architecture.model_type, architecture) is not architecture:
        raise ValueError(f"architecture {architecture.model_type!r} is registered already")
    return architecture


def model_types() -> tuple[str, ...]:
    """The model_type of every registered architecture."""
    return tuple(_registry())


def gguf_architectures() -> dict[str, list[Architecture]]:
    """The architectures that have GGUF files, by general.architecture: two where files with experts belong to another
    architecture."""
    by_name: dict[str, list[Architecture]] = {}
    for architecture in _registry().values():
        if architecture.gguf is not None:
            by_name.setdefault(architecture.gguf.name, []).append(architecture)
    return dict(sorted(by_name.items()))


def known_architecture(model_type: object) -> Architecture | None:
    """The architecture of a config's model_type; None where it is not registered."""
    return _registry().get(model_type) if isinstance(model_type, str) else None


def find_architecture(model_type: object) -> Architecture:
    """The architecture of a config's model_type. Raises ValueError, with the nearest name, where it is not
    registered."""
    architecture = known_architecture(model_type)
    if architecture is None:
        near = nearest(model_type, model_types()) if isinstance(model_type, str) else None
        hint = "" if near is None else f" (did you mean '{near}'?)"
        raise ValueError(f"model_type is {shown(model_type)}{hint}; expected one of {', '.join(model_types())}")
    return architecture


# ---------------------------------------------------------------------------------------------------------------
# A model of a config


def architecture_of(config: DecoderConfig) -> Architecture:
    from evojax_merge.models.projector import with_projector

    architecture = find_architecture(config.architecture)
    return architecture if config.projector is None else with_projector(architecture)


def dimensions(config: DecoderConfig) -> Mapping[str, int]:
    """The sizes that the shapes of the leaves are written in."""
    return architecture_of(config).dimensions(config)


def layer_types(config: DecoderConfig) -> Mapping[str, LayerType]:
    architecture = architecture_of(config)
    return architecture.layer_types or {LAYERS: LayerType(architecture.block, (LAYERS,))}


def types_of_layers(config: DecoderConfig) -> tuple[str, ...]:
    """The name of each layer's type."""
    return config.layer_types or (LAYERS,) * config.layers


def stack_numbers(config: DecoderConfig) -> Mapping[str, Sequence[int]]:
    """The numbers of the layers of each stack: row r of a stack is layer `stack_numbers(config)[stack][r]`."""
    numbers: dict[str, list[int]] = {}
    types = layer_types(config)
    for number, name in enumerate(types_of_layers(config)):
        for stack in types[name].stacks:
            numbers.setdefault(stack, []).append(number)
    return {**numbers, **architecture_of(config).further_stacks(config)}


def first_of_each_type(config: DecoderConfig) -> dict[str, int]:
    """The number of the first layer of each type."""
    names = types_of_layers(config)
    return {name: names.index(name) for name in dict.fromkeys(names)}


def rows_of_layers(config: DecoderConfig) -> list[dict[str, int]]:
    """For each layer its stacks, and its row in each."""
    rows: list[dict[str, int]] = [{} for _ in range(config.layers)]
    types, used = layer_types(config), Counter[str]()
    for number, name in enumerate(types_of_layers(config)):
        for stack in types[name].stacks:
            rows[number][stack] = used[stack]
            used[stack] += 1
    return rows


def leaves_of(config: DecoderConfig) -> list[Leaf]:
    """The leaves that a model of this config has."""
    stacks = {None, *stack_numbers(config)}
    return [leaf for leaf in architecture_of(config).leaves if leaf.stack in stacks and leaf.present_if(config)]


def stack_leaves(config: DecoderConfig, stack: str = LAYERS) -> list[Leaf]:
    return [leaf for leaf in leaves_of(config) if leaf.stack == stack]


def leaves_of_layer(config: DecoderConfig, number: int) -> list[Leaf]:
    stacks = layer_types(config)[types_of_layers(config)[number]].stacks
    return [leaf for stack in stacks for leaf in stack_leaves(config, stack)]


def components_of(config: DecoderConfig) -> tuple[str, ...]:
    """The components of a layer, in the order of the recipe's component axis, in a model of this config."""
    present = {leaf.component for leaf in leaves_of(config)}
    return tuple(name for name in architecture_of(config).components if name != ROUTER or name in present)


def shared_leaves(config: DecoderConfig) -> list[Leaf]:
    """The leaves outside of the layers, in a model of this config."""
    return [leaf for leaf in leaves_of(config) if leaf.stack is None]


def tensor_grid(config: DecoderConfig, leaf: Leaf) -> tuple[int, ...]:
    """The shape in which a leaf's tensors are stacked: `(L,)` in a stack, `(L, E)` where each of E experts has a
    tensor, `()` outside of the layers, where a leaf is one tensor."""
    if leaf.stack is None:
        return ()
    layers = len(stack_numbers(config)[leaf.stack])
    return (layers, dimensions(config)[leaf.shape[0]]) if leaf.has_experts else (layers,)


def tensor_shape(config: DecoderConfig, leaf: Leaf) -> tuple[int, ...]:
    """The shape of each of a leaf's tensors in the file."""
    sizes = dimensions(config)
    return tuple(sizes[axis] for axis in (leaf.shape[1:] if leaf.has_experts else leaf.shape))


def leaf_tensors(config: DecoderConfig, leaf: Leaf) -> list[str]:
    """The names in the file of a leaf's tensors, in the order of its grid."""
    if leaf.stack is None:
        return [leaf.tensor]
    numbers = stack_numbers(config)[leaf.stack]
    return [leaf.tensor_of(numbers[row], *expert) for row, *expert in np.ndindex(tensor_grid(config, leaf))]


def first_tensor(config: DecoderConfig, leaf: Leaf) -> str:
    """The name in the file of the first of a leaf's tensors."""
    return leaf.tensor if leaf.stack is None else leaf.tensor_of(stack_numbers(config)[leaf.stack][0])


def tensors_of(config: DecoderConfig) -> Iterator[tuple[str, Leaf, tuple[int, ...]]]:
    """Every tensor of a model of this config: its name in the file, its leaf, and its index in the leaf's grid: the row
    of the stack, then the expert, where the leaf has these. Tensors outside of the layers come first."""
    yield from ((leaf.tensor, leaf, ()) for leaf in shared_leaves(config))
    for stack, numbers in stack_numbers(config).items():
        grids = [(leaf, tensor_grid(config, leaf)[1:]) for leaf in stack_leaves(config, stack)]
        for row, number in enumerate(numbers):
            for leaf, grid in grids:
                yield from ((leaf.tensor_of(number, *expert), leaf, (row, *expert)) for expert in np.ndindex(grid))
