"""Ministral: a Mistral with sliding windows in some layers. Ministral 3: a Mistral whose queries grow with the
logarithm of their position, as in Llama 4."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from evojax_merge.models.config import LlamaLikeConfig
from evojax_merge.models.config_keys import CONTEXT, TEXTS, Expected, is_number, mapping, or_null
from evojax_merge.models.families import llama_like
from evojax_merge.models.layers import Attend, CosSin, KeyValue, SequenceLayout, Weights


@dataclass(frozen=True, kw_only=True)
class Ministral3Config(LlamaLikeConfig):
    """Queries at position p are multiplied by 1 + `query_growth` * log(1 + p // `query_period`)."""

    query_growth: float
    query_period: int


def tables_of_growing_queries(config: Ministral3Config, layout: SequenceLayout) -> tuple[CosSin, jax.Array]:
    """RoPE's tables, and the factors of the queries, `[B, T]`."""
    periods = (layout.positions // config.query_period).astype(jnp.float32)
    return llama_like.position_tables(config, layout), 1.0 + config.query_growth * jnp.log1p(periods)


def block_of_growing_queries(
    config: Ministral3Config, weights: Weights, x: jax.Array, tables: tuple[CosSin, jax.Array], attend: Attend
) -> tuple[jax.Array, KeyValue]:
    rope, growth = tables

    def grown(query: jax.Array, *others: jax.Array, **options: Any) -> tuple[jax.Array, KeyValue]:
        return attend(query * growth[..., None, None].astype(query.dtype), *others, **options)

    return llama_like.block(config, weights, x, rope, grown)


def read_ministral3(hf: Mapping[str, Any]) -> Ministral3Config:
    rope = hf["rope_parameters"]
    for key in ("llama_4_scaling_beta", "original_max_position_embeddings"):
        if rope.get(key) is None:
            raise ValueError(f"rope_parameters.{key}: missing; expected a number, by which queries grow")
    return llama_like.read_config(
        "ministral3", hf, Ministral3Config, query_growth=float(rope["llama_4_scaling_beta"]),
        query_period=rope["original_max_position_embeddings"],
    )  # fmt: skip


MINISTRAL = llama_like.llama_like(
    "ministral",
    "MinistralConfig",
    {"layer_types": or_null(TEXTS), "sliding_window": llama_like.WINDOW},
    partial(llama_like.read_config, "ministral"),
)
_GROWTH = Expected(lambda value: is_number(value) and 0 <= value <= 1e6, "a number from 0 to 1,000,000")
_ROPE = or_null(mapping({**llama_like.ROPE.keys, "llama_4_scaling_beta": _GROWTH, "max_position_embeddings": CONTEXT}))
MINISTRAL3 = llama_like.llama_like(
    "ministral3",
    "Ministral3Config",
    {"rope_parameters": _ROPE, "rope_scaling": _ROPE, "sliding_window": llama_like.WINDOW},
    read_ministral3,
    position_tables=tables_of_growing_queries,
    block=block_of_growing_queries,
)
