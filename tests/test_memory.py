"""What a pass over a 7B Llama takes beyond the bank, as the compiler reports it. Nothing is allocated.

In float32, the dtype that a CPU computes in; and of a smaller one in bfloat16, which a CPU's compiler widens.
"""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.sampling import sample, thorough
from merge_kernels import METHODS

from evojax_merge.evaluation import passes
from evojax_merge.evaluation.passes import LazyMergeFactory
from evojax_merge.evaluation.responses import arrays_of
from evojax_merge.models import decoder
from evojax_merge.models.architecture import COMPONENTS, LAYERS, Leaf, dimensions, shared_leaves, stack_leaves
from evojax_merge.models.bank import Bank, LeafBank, MergeSpec, Recipe
from evojax_merge.models.config import NO_WINDOW, LlamaLikeConfig, RopeConfig
from evojax_merge.tasks.batches import scoring_batches
from evojax_merge.tasks.task import Row

PARENTS = 2
LLAMA = LlamaLikeConfig(
    architecture="llama",
    hidden=4096, layers=32, heads=32, kv_heads=32, head_dim=128, rotary_dim=128, mlp=11008, vocab=32000, norm_eps=1e-5,
    activation="silu", rope=RopeConfig("default", 10000.0), windows=(NO_WINDOW,) * 32,
)  # fmt: skip
# Rows and tokens of a batch.
ROWS, WIDTH = 4, 128


def array(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def shape_of(leaf: Leaf, config: LlamaLikeConfig) -> tuple[int, ...]:
    sizes = dimensions(config)
    return tuple(sizes[axis] for axis in leaf.shape)


def abstract(
    config: LlamaLikeConfig, method: str, chunk: int, dtype: Any = jnp.float32
) -> tuple[Bank, Recipe, MergeSpec]:
    """Shapes of a bank of a base and two parents, of a dtype, and of a chunk of recipes."""
    spec = MergeSpec(method, METHODS[method].options, 0, "float32")
    sources, numbers = PARENTS + int(spec.options.has_base), spec.method.mask_keys(PARENTS)
    layers, shared = stack_leaves(config), shared_leaves(config)
    depth = config.layers

    def leaf_bank(leaf: Leaf, *axes: int) -> LeafBank:
        shape = shape_of(leaf, config)
        keys_shape, keys_dtype = spec.method.mask_key_array(shape, np.dtype(dtype))
        return LeafBank(
            array(*axes, sources, *shape, dtype=dtype),  # type: ignore[arg-type]
            mask_keys=array(*axes, numbers, *keys_shape, dtype=keys_dtype) if numbers else None,  # type: ignore[arg-type]
            statistics={name: array(*axes, *rest) for name, rest in statistics_of(spec).items()},  # type: ignore[misc]
            group=COMPONENTS.index(leaf.component) if leaf.stack is not None else 0,
        )

    bank = Bank(
        {LAYERS: {leaf.name: leaf_bank(leaf, depth) for leaf in layers}},
        {leaf.name: leaf_bank(leaf) for leaf in shared},
    )
    parameters = spec.method.parameters
    recipe = Recipe(
        {
            LAYERS: {
                p.name: array(chunk, depth, len(COMPONENTS), *([PARENTS] if p.per_parent else [])) for p in parameters
            }
        },
        {
            leaf.name: {p.name: array(chunk, *([PARENTS] if p.per_parent else [])) for p in parameters}
            for leaf in shared
        },
    )
    return bank, recipe, spec


def statistics_of(spec: MergeSpec) -> dict[str, tuple[int, ...]]:
    """What is tabulated of a tensor, by what a small one gives."""
    from merge_kernels import draw_row_keys, tabulate

    rng = np.random.default_rng(0)
    small = [rng.normal(size=(4, 6)).astype(np.float32) for _ in range(PARENTS + int(spec.options.has_base))]
    draws = lambda k: draw_row_keys(0, bytes([k] * 8), (4, 6))  # noqa: E731
    found = tabulate(spec.method, spec.options, small, {}, draws).statistics
    return {name: values.shape for name, values in found.items()}


def temporaries(
    config: LlamaLikeConfig, method: str, chunk: int, rows: int = ROWS, dtype: Any = jnp.float32, prefetch: bool = False
) -> int:
    """Of a bank whose weights are of `dtype`."""
    bank, recipe, spec = abstract(config, method, chunk, dtype)
    tokens = np.random.default_rng(0).integers(0, config.vocab, (rows, WIDTH))
    (scoring,) = scoring_batches(
        [[Row(tuple(map(int, row)), 1, "row", i) for i, row in enumerate(tokens)]], rows * WIDTH
    )
    (batch,) = scoring.batches
    arrays = {name: array(*values.shape, dtype=values.dtype) for name, values in arrays_of(batch).items()}
    build = LazyMergeFactory(spec, "float32", prefetch)
    lowered = passes.score.lower(passes.ScoreSpec(config, build, None), (bank, arrays), (recipe, None))
    return int(lowered.compile().memory_analysis().temp_size_in_bytes)


def floats(*parts: tuple[int, ...]) -> int:
    return 4 * sum(int(np.prod(part)) for part in parts)


def bound(config: LlamaLikeConfig, method: str, chunk: int, rows: int = ROWS) -> float:
    """1.1 x chunk x (K + 1 layer slices, one merged layer, activations, a tile of the head)."""
    layer = floats(*(shape_of(leaf, config) for leaf in stack_leaves(config)))
    tokens = rows * WIDTH
    # The state, what the MLP makes of it in three arrays, queries, keys, values, and what attention looks at.
    activations = floats(
        *[(tokens, config.hidden)] * 4, *[(tokens, config.mlp)] * 3, *[(tokens, config.heads * config.head_dim)] * 4,
        *[(rows, config.heads, WIDTH, WIDTH)] * 2,
    )  # fmt: skip
    tile = min(decoder.VOCAB_TILE, config.vocab)
    head = floats(*[(tile, config.hidden)] * (PARENTS + 2), *[(tokens, tile)] * 3)
    return 1.1 * chunk * ((PARENTS + 1) * layer + layer + activations + head)


@pytest.mark.parametrize(
    ("method", "chunk"),
    sample([(method, chunk) for method in ("ties", "dare_ties", "linear", "slerp") for chunk in (1, 2)], 2),
)
def test_temporaries_are_a_few_layers(method: str, chunk: int) -> None:
    assert temporaries(LLAMA, method, chunk) <= bound(LLAMA, method, chunk)


@thorough
def test_temporaries_do_not_depend_on_depth_or_vocabulary() -> None:
    plain = temporaries(LLAMA, "ties", 1)
    deep = replace(LLAMA, layers=80, windows=(NO_WINDOW,) * 80)
    wide = replace(LLAMA, vocab=128_256)
    for other in (deep, wide):
        assert abs(temporaries(other, "ties", 1) - plain) <= 0.01 * plain


def test_a_bank_in_bfloat16_is_not_copied_in_float32() -> None:
    """Slices of bfloat16 are picked by way of float32; they alone, not all that they are picked from."""
    small = replace(LLAMA, hidden=256, heads=2, kv_heads=2, mlp=688, layers=16, windows=(NO_WINDOW,) * 16)
    found = temporaries(small, "ties", 1, 1, jnp.bfloat16, prefetch=True)
    assert found <= bound(small, "ties", 1, 1)
    # So few tokens and layers are much less than all layers.
    sources = (PARENTS + 1) * small.layers
    assert found < 4 * sources * sum(int(np.prod(shape_of(leaf, small))) for leaf in stack_leaves(small))
