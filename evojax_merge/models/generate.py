"""Generation for a population over one batch of prompts, greedy or sampled, with prompt-lookup speculative decoding.

`prefill` computes the prompts' KV caches, group by group in their own widths; `decode` then generates for all of them
together, in several calls, so that the host can look for stop texts in between. Sequences that ended, by a stop token
or by the host's decision, are not extended.

A decode step reads all weights to produce one token, and would read as much to produce a few. So every step takes
`step_tokens` tokens: the last token and draft tokens after it, looked up in the texts that other candidates generated
for the same prompt, in the prompt, and in the sequence itself. The model's greedy tokens after each of them are
computed side by side, and the longest prefix of the draft that agrees with them is accepted (speculative decoding,
arXiv 2211.17192, in its greedy form, with prompt lookup in place of a draft model). The text is the same as from steps
of one token. That holds for sampled tokens too: the noise of a position is fixed (see models.sampling), and so is the
token after a given text.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from evojax_merge.models.architecture import ATTENTION, architecture_of, layer_types, types_of_layers
from evojax_merge.models.bank import vmap_population
from evojax_merge.models.config import DecoderConfig
from evojax_merge.models.decoder import (
    CacheUpdate,
    KVCache,
    LayerStates,
    decode_step,
    forward,
    map_memory,
    update_columns,
)
from evojax_merge.models.images import ImageInputs
from evojax_merge.models.layers import SequenceLayout, matmul_transposed, padded_layout
from evojax_merge.models.recurrence import DraftState, RecurrentState, empty_state
from evojax_merge.models.sampling import Draws
from evojax_merge.models.sharding import shard
from evojax_merge.models.sources import StackedWeights, UnstackedWeights

# The token that fills the output after a sequence has ended.
PAD_ID = -1
# The token where the model's logits are not finite.
NONFINITE_ID = -2
# The number of a sequence's last tokens that are matched when its continuation is looked up.
NGRAM = 4


@struct.dataclass
class DecodeState:
    """P candidates on B prompts; every leaf has the leading axis P. tokens: int32[P, B, new], the generated tokens,
    then `PAD_ID`; num_generated: int32[P, B], the number of generated tokens, the last of which is not yet in the
    states; states: what each layer keeps of the tokens, without the axis of layers; left_pad: int32[P, B], the column
    of each prompt's first token; done: bool[P, B], True for sequences that have ended."""

    tokens: jax.Array
    num_generated: jax.Array
    states: tuple[Any, ...]
    left_pad: jax.Array
    done: jax.Array


# A candidate -> its weights, for prefill and for decoding.
PrefillModel = Callable[[Any], StackedWeights]
DecodeModel = Callable[[Any], StackedWeights | UnstackedWeights]


def init_decode_state(
    config: DecoderConfig, dtype: str, size: int, rows: int, width: int, new: int, step_tokens: int
) -> DecodeState:
    """The state of `size` candidates that will generate up to `new` tokens, `step_tokens` a step, after `rows` prompts
    of up to `width` tokens. Nothing is prefilled, and so all sequences are done."""
    room, heads, dim = width + new + step_tokens - 1, (size, config.kv_heads, rows), config.head_dim

    def empty(*shape: int) -> jax.Array:
        return shard(jnp.zeros((*heads, *shape), jnp.dtype(dtype)), 1)

    def memory(name: str) -> KVCache | RecurrentState:
        if name == ATTENTION:
            return KVCache(empty(dim, room), empty(room, dim))
        assert config.recurrent is not None
        zeros = empty_state(config.recurrent, rows, dtype)
        return jax.tree.map(lambda leaf: jnp.zeros((size, *leaf.shape), leaf.dtype), zeros)

    types = layer_types(config)
    states = tuple(map_memory(memory, types[name].memory) for name in types_of_layers(config))
    nothing = jnp.zeros((size, rows), jnp.int32)
    return DecodeState(
        jnp.full((size, rows, new), PAD_ID, jnp.int32), nothing, states, nothing + width - 1, nothing == 0
    )


def prefill(
    config: DecoderConfig,
    model_of: PrefillModel,
    candidates: Any,
    state: DecodeState,
    width: int,
    row: jax.Array,
    tokens: jax.Array,
    left_pad: jax.Array,
    stop: tuple[int, ...],
    prefix: LayerStates | None = None,
    images: ImageInputs | None = None,
    draws: Draws | None = None,
) -> DecodeState:
    """Prefill prompts `int32[B, T]`, padded on the left, after a prefix (leading axis P) where there is one, into the
    rows from `row` on of a state for prompts of `width` tokens, and generate a first token after each prompt.

    candidates: P of them, leading axis P on every leaf; stop: token ids that end a sequence and are not part of it;
    images: those of the prompts (see `decoder.embed`); draws: those of the prompts' sequences; None: greedy tokens.
    """
    prompt_width = tokens.shape[1]
    prompt_layout = padded_layout(prompt_width, left_pad, prompt_width - left_pad)
    prefix_length = 0 if prefix is None else prefix.width
    layout = SequenceLayout(prefix_length + prompt_layout.positions, prompt_layout.segment_ids)

    def read(candidate: Any, prefix: LayerStates | None) -> tuple[jax.Array, LayerStates]:
        model = model_of(candidate)
        hidden, states = forward(config, model, tokens, layout, prefix=prefix, return_states=True, images=images)
        assert states is not None
        return _next_tokens(config, model, hidden[:, -1], draws, 0), states

    def put(old: jax.Array, fresh: jax.Array, *at: jax.Array | int) -> jax.Array:
        return jax.lax.dynamic_update_slice(old, fresh.astype(old.dtype), at)

    token, fresh = vmap_population(read, candidates, prefix)
    done, column = is_stop(token, stop), width - prompt_width

    def put_memory(name: str, old: Any, fresh: Any) -> Any:
        if name == ATTENTION:
            return KVCache(
                put(old.keys, fresh.keys, 0, 0, row, 0, column), put(old.values, fresh.values, 0, 0, row, column, 0)
            )
        return jax.tree.map(lambda old, fresh: put(old, fresh, 0, row, *(0,) * (old.ndim - 2)), old, fresh)

    types, names, states = layer_types(config), types_of_layers(config), []
    for number, (name, old) in enumerate(zip(names, state.states, strict=True)):
        at = names[:number].count(name)
        of_layer = jax.tree.map(lambda leaf, at=at: leaf[:, at], fresh.by_type[name])
        states.append(map_memory(put_memory, types[name].memory, old, of_layer))
    return DecodeState(
        put(state.tokens, jnp.where(done, PAD_ID, token)[..., None], 0, row, 0),
        put(state.num_generated, jnp.where(done, 0, 1), 0, row),
        tuple(states),
        put(state.left_pad, jnp.broadcast_to(left_pad + column, token.shape), 0, row),
        put(state.done, done | (state.tokens.shape[-1] == 1), 0, row),
    )


def decode(
    config: DecoderConfig,
    model_of: DecodeModel,
    candidates: Any,
    state: DecodeState,
    steps: int,
    step_tokens: int,
    update_rows: CacheUpdate,
    stop: tuple[int, ...],
    texts: tuple[jax.Array, jax.Array],
    prefix: LayerStates | None = None,
    shift: jax.Array | None = None,
    draws: Draws | None = None,
) -> DecodeState:
    """Run up to `steps` decode steps, each of which adds 1 to `step_tokens` tokens to every running sequence;
    `NONFINITE_ID` where logits are not finite. update_rows: writes into the caches where each row has a column of its
    own; texts: the prompts int32[B, T], as they were prefilled, and int32[B, M], texts that are likely to share parts
    with the continuations, both negative where there is no text. shift: see `decoder.decode_step`; draws: see
    `prefill`."""
    prompts, lookup_corpus = texts
    width, new = prompts.shape[1], state.tokens.shape[-1]
    # One set of prompts for the whole population.
    left_pad = state.left_pad[0]
    # A population of one goes without its axis: the compiler would copy every cache to add and remove it.
    single = state.num_generated.shape[0] == 1
    arguments = (candidates, state, prefix)
    candidates, state, prefix = jax.tree.map(lambda leaf: leaf[0], arguments) if single else arguments

    def body(carry: Any) -> Any:
        number, state = carry
        # Without draft tokens all running sequences end in one column.
        shared_column = width + jnp.max(jnp.where(state.done, 0, state.num_generated)) - 1 if step_tokens == 1 else None
        update = update_columns if step_tokens == 1 else update_rows

        def verify_step(
            candidate: Any,
            states: tuple[Any, ...],
            tokens: jax.Array,
            num_generated: jax.Array,
            prefix: LayerStates | None,
        ) -> tuple[jax.Array, jax.Array, tuple[Any, ...]]:
            model = model_of(candidate)
            context = jnp.concatenate([lookup_corpus, prompts, tokens], axis=1)
            column = width + num_generated - 1
            draft = prompt_lookup_draft(context, lookup_corpus.shape[1] + column, step_tokens)
            hidden, states = decode_step(
                config, model, states, column if shared_column is None else shared_column, draft, left_pad, update,
                prefix, shift,
            )  # fmt: skip
            return draft, _next_tokens(config, model, hidden, draws, num_generated), states

        run = verify_step if single else jax.vmap(verify_step)
        draft, target, states = run(candidates, state.states, state.tokens, state.num_generated, prefix)
        # The target after the last token is right, and so is the target after a draft token that was right.
        num_accepted = jnp.cumprod(target[..., :-1] == draft[..., 1:], axis=-1).sum(axis=-1) + 1
        stops = is_stop(target, stop)
        ends = jnp.where(stops.any(axis=-1), jnp.argmax(stops, axis=-1), step_tokens)
        accepted = jnp.where(state.done, 0, jnp.minimum(jnp.minimum(num_accepted, ends), new - state.num_generated))
        offset = jnp.arange(new) - state.num_generated[..., None]
        fresh = jnp.take_along_axis(target, jnp.clip(offset, 0, step_tokens - 1), axis=-1)
        tokens = jnp.where((offset >= 0) & (offset < accepted[..., None]), fresh, state.tokens)
        num_generated = state.num_generated + accepted
        done = state.done | (ends < num_accepted) | (num_generated >= new)
        states = _accept(states, accepted)
        return number + 1, DecodeState(tokens, num_generated, states, state.left_pad, done)

    begin = jnp.int32(0), state
    _, state = jax.lax.while_loop(lambda carry: (carry[0] < steps) & ~carry[1].done.all(), body, begin)
    return jax.tree.map(lambda leaf: leaf[None], state) if single else state


def _accept(states: tuple[Any, ...], accepted: jax.Array) -> tuple[Any, ...]:
    """The states behind the tokens of a step that were accepted, `int32[…, B]` of them. A KV cache stays as it is: the
    columns of the others are written anew."""

    def accept(state: Any) -> Any:
        if not isinstance(state, DraftState):
            return state
        return (DraftState.accept if accepted.ndim == 1 else jax.vmap(DraftState.accept))(state, accepted)

    return jax.tree.map(accept, states, is_leaf=lambda state: isinstance(state, DraftState))


def prompt_lookup_draft(context: jax.Array, last: jax.Array, step_tokens: int) -> jax.Array:
    """The tokens in column `last: int32[B]` of contexts `int32[B, M]`, and `step_tokens - 1` draft tokens after them:
    the tokens that follow the earlier place whose last `NGRAM` tokens match the context's best. The latest of equal
    places counts."""
    columns = jnp.arange(context.shape[1])
    matches = jnp.ones(context.shape, bool)
    length = jnp.zeros(context.shape, jnp.int32)
    for back in range(NGRAM):
        token = jnp.take_along_axis(context, jnp.maximum(last - back, 0)[:, None], axis=1)
        matches &= (jnp.roll(context, back, axis=1) == token) & (columns >= back)
        length += matches
    earlier = columns < last[:, None]
    best = jnp.argmax(jnp.where(earlier, length * context.shape[1] + columns, -1), axis=1)
    follows = jnp.take_along_axis(context, best[:, None] + jnp.arange(step_tokens), axis=1, mode="clip")
    last_tokens = jnp.take_along_axis(context, last[:, None], axis=1)
    return jnp.concatenate([last_tokens, follows[:, 1:]], axis=1)


def is_stop(tokens: jax.Array, stop: tuple[int, ...]) -> jax.Array:
    return (tokens[..., None] == jnp.asarray(stop or (PAD_ID,), jnp.int32)).any(-1)


def _next_tokens(
    config: DecoderConfig,
    model: StackedWeights | UnstackedWeights,
    hidden: jax.Array,
    draws: Draws | None,
    first: jax.Array | int,
) -> jax.Array:
    """The tokens `int32[…]` after final hidden states `[B, hidden]` or `[B, T, hidden]`: the argmax (the first of
    equals), or those drawn (first: see `Draws.tokens`). `NONFINITE_ID` where any token's logit is NaN or plus
    infinity."""
    # In the transposed layout a CPU compares the logits of many rows at a time.
    columns = matmul_transposed(hidden, model.head(model.lm_head_rows(0, config.vocab, 1)), jnp.float32)
    columns = architecture_of(config).map_logits(config, columns)
    # argmax treats NaN as the largest; a maximum need not keep it.
    best = jnp.argmax(columns, axis=0).astype(jnp.int32)
    max_logit = jnp.take_along_axis(columns, best[None], axis=0)[0]
    best, max_logit = best.reshape(hidden.shape[:-1]), max_logit.reshape(hidden.shape[:-1])
    if draws is not None:
        best = draws.tokens(columns.T.reshape(len(hidden), -1, config.vocab), first).reshape(best.shape)
    return jnp.where(jnp.isfinite(max_logit), best, NONFINITE_ID)
