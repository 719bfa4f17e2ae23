"""config.json -> the static config of a known architecture, read without believing the file.

`read_decoder_config` refuses an attribute that the architecture's class in transformers declares and that is neither
read nor at its default: a model that loads is computed correctly. An attribute that the class does not declare cannot
change its forward pass and is accepted, unless another family's forward pass reads an attribute of this name.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from evojax_merge.checkpoints.json_files import read_json_object
from evojax_merge.errors import InputError, did_you_mean, shown
from evojax_merge.models.architecture import Architecture, find_architecture, known_architecture
from evojax_merge.models.config import NO_WINDOW, DecoderConfig
from evojax_merge.models.config_keys import CONTEXT, INFINITY, Expected

# The dtypes that a model's weights may have by its config.json, in torch's words.
TORCH_DTYPES = (
    "bfloat16", "double", "float", "float16", "float32", "float64", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2",
    "float8_e5m2fnuz", "half", "int8", "uint8",
)  # fmt: skip
NO_CONFIG = "expected a Hugging Face model folder with a config.json"
# Attributes that classes declare, or that every trainer leaves, and that say nothing about the forward pass.
IGNORED_KEYS = {
    "_attn_implementation", "_attn_implementation_autoset", "_name_or_path", "architectures", "attention_dropout",
    "attn_pdrop", "bos_token_id", "cache_implementation", "chunk_size_feed_forward", "classifier_dropout", "dtype",
    "embd_pdrop", "embedding_dropout", "eod_token_id", "eos_token_id", "hidden_dropout", "id2label",
    "initializer_range", "is_decoder", "is_encoder_decoder", "label2id", "model_type", "output_attentions",
    "output_hidden_states", "output_router_logits", "pad_token_id", "pretraining_tp", "problem_type", "resid_pdrop",
    "residual_dropout", "return_dict", "router_aux_loss_coef", "router_jitter_noise", "summary_activation",
    "summary_first_dropout", "summary_proj_to_labels", "summary_type", "summary_use_proj", "torch_dtype",
    "transformers_version", "use_cache",
}  # fmt: skip


# Lists with an entry for each layer that a config's class makes of each layer's number where the config lacks them.
LAYER_LISTS = ("layer_types", "no_rope_layers")


def _neutral(head_dim: int, hidden: int, layers: int) -> dict[str, tuple[float, ...]]:
    """Attributes of other families that change a forward pass, with the values that leave it unchanged."""
    one = (1.0,)
    off = (0.0,)
    return {
        # Granite, MiniCPM, Falcon-H1, Cohere and others of maximal update parametrisation
        "attention_in_multiplier": one, "attention_multiplier": (1.0, head_dim**-0.5), "attention_out_multiplier": one,
        "dim_model_base": (1.0, float(hidden)), "embedding_multiplier": one, "embedding_scale": one,
        "embeddings_multiplier": one, "key_multiplier": one, "lm_head_multiplier": one, "logit_scale": one,
        "logits_multiplier": one, "logits_scaling": one, "mlp_multipliers": one, "mup_attn_multiplier": one,
        "mup_embedding_multiplier": one, "mup_width_multiplier": one, "residual_multiplier": one,
        "residual_scale": one, "scale_depth": (1.0, layers**0.5), "scale_emb": one,
        # Gemma, Grok, OLMo, SmolLM3, Qwen-VL, nanotron
        "attn_logit_softcapping": off, "clip_qkv": off, "final_logit_softcapping": off, "logits_soft_cap": off,
        "no_rope_layer_interval": off, "no_rope_layers": one, "query_pre_attn_scalar": (float(head_dim),),
        "rope_interleaved": off, "rotary_pct": one, "use_mrope": off,
    }  # fmt: skip


# Multimodal models that read a text exactly like their text decoder alone. The decoder's settings are their
# `text_config`, or, in earlier files, stand beside those of the other modules.
MULTIMODAL_MODEL_TYPES = {
    "gemma3", "got_ocr2", "idefics3", "internvl", "llava", "llava_next", "llava_next_video", "llava_onevision",
    "mistral3", "qwen2_5_vl", "qwen2_vl", "qwen3_5", "qwen3_5_moe", "qwen3_vl", "qwen3_vl_moe", "smolvlm",
    "video_llava", "vipllava",
}  # fmt: skip
# The text decoder's prefix in transformers' memory, whatever the files use: in these models, and in all others.
DECODER_PREFIXES = {"idefics3": "model.text_model.", "smolvlm": "model.text_model."}
DECODER_PREFIX = "model.language_model."


def is_larger_model(config: Mapping[str, Any]) -> bool:
    """Return whether a config.json is that of a model with a text decoder and other modules."""
    kind = config.get("model_type")
    return isinstance(kind, str) and kind in MULTIMODAL_MODEL_TYPES


def decoder_settings(config: dict[str, Any]) -> dict[str, Any]:
    """The settings of a config.json's decoder: all of it, or a larger model's settings of its text decoder."""
    if not is_larger_model(config):
        return config
    nested = config.get("text_config")
    return nested if isinstance(nested, dict) else config | {"model_type": f"{config['model_type']}_text"}


def comparable(config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a decoder's config that describe the layers themselves, with unchanged values: without the number of
    layers, the number of tokens and the tied head."""
    sizes = {"num_hidden_layers", "tie_word_embeddings", "vocab_size"}
    read = set(find_architecture(config["model_type"]).keys) | set(_neutral(1, 1, 1))
    return {key: value for key, value in config.items() if key in read - sizes}


def trained_positions(settings: Mapping[str, Any]) -> int:
    """The number of positions that a decoder's settings name; NO_WINDOW where they name none, or what no architecture
    takes: some do not read the key."""
    value: Any = settings.get("max_position_embeddings")
    return value if CONTEXT.accepts(value) else NO_WINDOW


def unread_keys(config: Mapping[str, Any]) -> list[str]:
    """The keys of a decoder's config that its architecture does not read, without `IGNORED_KEYS`; sorted."""
    keys = find_architecture(config["model_type"]).keys
    unread = [key for key in config if key not in keys and key not in IGNORED_KEYS]
    return sorted([*unread, *(name for name, _, expected in _nested("", config, keys) if expected is None)])


def _nested(
    above: str, values: Mapping[str, Any], keys: Mapping[str, Expected]
) -> Iterator[tuple[str, Any, Expected | None]]:
    """The keys of the mappings among the values: the path, the value, and the expected one; None: the key is unread."""
    for name, expected in keys.items():
        inner = (values.get(name) or {}) if expected.keys else {}
        yield from ((f"{above}{name}.{key}", value, expected.keys.get(key)) for key, value in inner.items())
        yield from _nested(f"{above}{name}.", inner, expected.keys)


def layer_lists(path: object, config: Mapping[str, Any]) -> dict[str, list[Any]]:
    """The lists of `LAYER_LISTS` that the config's architecture reads, with an entry for each layer; empty unless the
    architecture is known. Where the config lacks a list, its class in transformers gives it. `path`: that of the
    config."""
    architecture = known_architecture(config.get("model_type"))
    if architecture is None or architecture.keys.keys().isdisjoint(LAYER_LISTS):
        return {}
    values = config_values(path, config, architecture)
    lists = {key: values[key] for key in LAYER_LISTS if key in architecture.keys and values.get(key)}
    return {key: entries[: values["num_hidden_layers"]] for key, entries in lists.items()}


def check_unquantised(path: object, config: Mapping[str, Any]) -> None:
    """Raises InputError where a config says that the weights are quantised. `path`: that of the config."""
    for key in ("quantization_config", "compression_config"):
        if config.get(key):
            how = config[key].get("quant_method") if isinstance(config[key], dict) else None
            by = "" if how is None else f" ({shown(how)})"
            raise InputError(
                path,
                f"{key}: a quantised checkpoint{by} cannot be merged; use the unquantised model, or dequantise it "
                "with transformers (model.dequantize(), then save_pretrained; remove the key)",
            )


def check_values(path: object, config: Mapping[str, Any]) -> None:
    """Raises InputError for an invalid value of a decoder's config, naming its key. `path`: that of the config.

    Allocates nothing that grows with a value.
    """
    keys = find_architecture(config["model_type"]).keys
    read = {key: keys[key] for key in config if key in keys and keys[key].read_if(config)}
    for key, expected in read.items():
        expected.check(path, key, config[key])
    for name, value, inner in _nested("", config, read):
        if inner is not None:
            inner.check(path, name, value)


def decoder_config(path: Path) -> DecoderConfig:
    """Read the decoder's settings in a `config.json`. Raises InputError as `read_decoder_config` does."""
    config = read_json_object(path, missing=NO_CONFIG)
    return read_decoder_config(path, decoder_settings(config))


def read_decoder_config(path: object, raw: Mapping[str, Any]) -> DecoderConfig:
    """The config that a decoder's settings mean. Raises InputError for an unknown architecture, an invalid value, or an
    attribute that matters and is not supported. `path`: the place of the settings, for messages."""
    try:
        architecture = find_architecture(raw.get("model_type"))
    except ValueError as error:
        raise InputError(path, "; ".join(filter(None, (torch_hint(raw), str(error))))) from None
    check_unquantised(path, raw)
    check_values(path, raw)
    if architecture.config_class is not None:
        import transformers

        fields = dataclasses.fields(getattr(transformers, architecture.config_class))
        declared = {field.name: field.default for field in fields}
        for key, value in raw.items():
            is_handled = key in architecture.keys or key in IGNORED_KEYS
            # transformers reads per_layer_config whatever the family, and declares it nowhere.
            if (key in declared and not is_handled) or key == "per_layer_config":
                default = declared.get(key)
                if value != default and value not in (None, [], {}):
                    raise InputError(path, f"{key}: {shown(value)} is not supported (expected {default!r})")
    values = config_values(path, raw, architecture)
    try:
        config = architecture.read_config(values)
    except ValueError as error:
        raise InputError(path, str(error)) from None
    if not isinstance(config, DecoderConfig):
        raise InputError(
            path, f"the architecture {architecture.model_type} read it as {shown(config)}; expected a DecoderConfig"
        )
    for key, neutral in _neutral(config.head_dim, config.hidden, config.layers).items():
        if key not in architecture.keys and not _is_neutral(raw.get(key), neutral):
            raise InputError(
                path,
                f"{key}: {shown(raw[key])} changes the forward pass of another family; a {config.architecture} does "
                f"not read it (expected {neutral[0]:g}, or no such key)",
            )
    return config


def torch_hint(config: Mapping[str, Any]) -> str:
    """The clause of a message on a model of no registered architecture that `backend: torch` opens it. Empty where
    transformers does not open it."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    kind, classes = config.get("model_type"), config.get("architectures")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING_NAMES or not isinstance(classes, list) or not classes:
        return ""
    # The names that transformers exports, by which the class itself is not imported.
    return f"a search with backend: torch opens a {classes[0]}" if classes[0] in dir(transformers) else ""


def config_values(path: object, raw: Mapping[str, Any], architecture: Architecture) -> dict[str, Any]:
    """The values of the keys that an architecture reads, with defaults filled in. Its class in transformers, where
    there is one, fills them in and also brings RoPE's settings into one form."""
    keys = architecture.keys
    if architecture.config_class is None:
        values = {**architecture.defaults, **{key: value for key, value in raw.items() if key in keys}}
        missing = next((key for key in keys if key not in values), None)
        if missing is not None:
            raise InputError(path, f"{missing}: missing; expected {keys[missing].words}")
        return values
    import transformers

    check_dtype(path, raw)
    config_class = getattr(transformers, architecture.config_class)
    try:
        # An undeclared key is not passed on: transformers would set whatever attribute a stranger's file names.
        read = keys.keys() | {field.name for field in dataclasses.fields(config_class)}
        hf = config_class(**{key: _with_infinities(value) for key, value in raw.items() if key in read})
        # transformers does the same when it makes a model: only now an outer `original_max_position_embeddings` counts.
        hf.standardize_rope_params()
    except Exception as error:  # whatever transformers' own validation raises is about the file
        raise InputError(
            path, f"not a valid {architecture.model_type} config: {' '.join(str(error).split())[:300]}"
        ) from None
    return {key: getattr(hf, key) for key in keys if hasattr(hf, key)}


def _with_infinities(value: Any) -> Any:
    """A copy of a value of config.json, with the numbers that transformers writes as mappings."""
    if value == INFINITY:
        return math.inf
    if isinstance(value, dict):
        return {key: _with_infinities(inner) for key, inner in value.items()}
    return [_with_infinities(inner) for inner in value] if isinstance(value, list) else value


def check_dtype(path: object, config: Mapping[str, Any]) -> None:
    """Raises InputError where a config.json names a dtype that torch does not have: transformers would take any
    attribute of torch by that name."""
    for key in ("dtype", "torch_dtype"):
        dtype = config.get(key)
        if not (dtype is None or (isinstance(dtype, str) and dtype in TORCH_DTYPES)):
            raise InputError(path, f"{key}: unknown dtype {shown(dtype)}{did_you_mean(str(dtype), TORCH_DTYPES)}")


def _is_neutral(value: Any, neutral: tuple[float, ...]) -> bool:
    if isinstance(value, list):
        return all(_is_neutral(item, neutral) for item in value)
    if value is None:
        return True
    return isinstance(value, int | float) and any(
        math.isclose(value, neutral_value, abs_tol=1e-12) for neutral_value in neutral
    )
