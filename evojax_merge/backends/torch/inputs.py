"""Examples of networks' tasks as arrays, by the model's own processor: each example once."""

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from evojax_merge.backends.torch.network import Network
from evojax_merge.checkpoints.allowed_classes import check_folder
from evojax_merge.checkpoints.json_files import read_json_object
from evojax_merge.checkpoints.network_checks import check_processor, processor_settings
from evojax_merge.checkpoints.tokens import load_tokenizer
from evojax_merge.errors import InputError, did_you_mean, library_errors, shown
from evojax_merge.tasks.entropy import EntropyTask
from evojax_merge.tasks.images import read_rgb
from evojax_merge.tasks.networks import NEGATIVE_ENTROPY, WRITTEN, NetworkExample, NetworkTask, image_file
from evojax_merge.tasks.text import TextTask

# The target of a token that is none.
NO_TOKEN = -100
# More labels than any network has.
MOST_LABELS = 10**9
# A tokenizer that names no length has this one, or a larger number.
NO_LENGTH = 10**6


def example_arrays(task: NetworkTask, network: Network, folder: Path) -> dict[str, Any]:
    """All examples of a task's file: `inputs`, the network's arguments by name, and `target`, with a leading axis of
    examples. folder: of the processor. Raises InputError, with the file and line, for an example that cannot be
    read."""
    examples = task.examples
    first, value = next(iter(examples[0].inputs.items()))
    if task.kind == "similarity":
        first_texts, second_texts = ([example.inputs[name] for example in examples] for name in ("first", "second"))
        return {
            "inputs": embedded_texts(network, folder, first_texts), "target": _numbers(examples)[:, 0],
            "second": embedded_texts(network, folder, second_texts),
        }  # fmt: skip
    if task.kind == "retrieval":
        numbers = {text: number for number, text in enumerate(documents(task))}
        relevant = np.zeros((len(examples), len(numbers)), bool)
        for row, example in zip(relevant, examples, strict=True):
            row[[numbers[text] for text in example.target]] = True
        queries = [example.inputs["query"] for example in examples]
        target = np.arange(len(examples), dtype=np.int32)
        return {"inputs": embedded_texts(network, folder, queries, "query"), "relevant": relevant, "target": target}
    # An array's name is an argument of the network, whatever it is.
    are_arrays = isinstance(value, np.ndarray | np.generic)
    if are_arrays:
        inputs = {name: np.stack([example.inputs[name] for example in examples]) for name in examples[0].inputs}
    elif first == "image":
        inputs = _images(examples, folder)
    elif first == "audio":
        inputs = _recordings(examples, folder)
    else:
        inputs = _tokens(load_tokenizer(folder), _texts(examples), _length(network, folder))
    unlabelled = task.metric == NEGATIVE_ENTROPY
    strict = are_arrays and task.function is None and not unlabelled
    inputs = _accepted(network, inputs, examples[0].where, strict)
    if task.function is not None:
        # The function is given the records by their numbers.
        return {"inputs": inputs, "target": np.arange(len(examples), dtype=np.int32)}
    if unlabelled:
        if is_zero_shot(task, network) and not task.config.classes:
            what = f"missing; {network.name} compares images with texts: expected those of the classes"
            raise InputError(f"{task.section}.choices", what)
        return {"inputs": inputs, "target": np.zeros(len(examples), np.int32)}
    if is_zero_shot(task, network):
        return {"inputs": inputs, "target": _class_numbers(task)}
    if task.kind in ("classification", "regression"):
        target = _labels(examples, network, folder) if task.kind == "classification" else _numbers(examples)
        return {"inputs": inputs, "target": target}
    target = _target_tokens(task, network, folder)
    if task.metric in WRITTEN:
        # Texts are compared with the target by its number.
        return {"inputs": inputs, "target": np.arange(len(examples), dtype=np.int32)}
    return {"inputs": inputs | {"decoder_input_ids": _shifted(target, network, folder)}, "target": target}


def _accepted(network: Network, inputs: Mapping[str, Any], where: str, strict: bool) -> dict[str, Any]:
    """The arrays that the network has arguments for. strict: raises InputError for one that it has none for."""
    arguments = inspect.signature(_method(network, inputs)).parameters
    unknown = next((name for name in inputs if name not in arguments), None)
    if strict and unknown is not None:
        raise InputError(
            where, f"array {unknown!r} is no argument of {network.name}{did_you_mean(unknown, list(arguments))}"
        )
    return {name: _as_jax_dtype(array) for name, array in inputs.items() if name in arguments}


def _method(network: Network, inputs: Mapping[str, Any]) -> Any:
    """The method of a network's module that takes some inputs."""
    if network.compares_images:
        return getattr(network.module, "get_image_features" if "pixel_values" in inputs else "get_text_features")
    return network.module.forward


def _as_jax_dtype(array: np.ndarray) -> np.ndarray:
    """An array in the dtype that JAX has of its kind."""
    return array.astype(np.float32 if array.dtype.kind == "f" else bool if array.dtype.kind == "b" else np.int32)


# ---------------------------------------------------------------------------------------------------------------
# Inputs


def _opened(folder: Path, loader: Any, what: str) -> Any:
    """The folder's image processor or feature extractor, by transformers' class for all of them."""
    check_folder(folder)
    check_processor(folder)
    with library_errors(folder, f"has no {what} that transformers opens"):
        return loader.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def _images(examples: Sequence[NetworkExample], folder: Path) -> dict[str, np.ndarray]:
    """`pixel_values` of images, by the model's image processor."""
    import transformers

    processor, (file, _) = (
        _opened(folder, transformers.AutoImageProcessor, "image processor"),
        processor_settings(folder),
    )
    arrays = []
    for example in examples:
        if "image" not in example.inputs:
            raise InputError(example.where, "has no image; expected one, as in the first example")
        where, content = image_file(example)
        pixels = read_rgb(where, content)
        with library_errors(file, f"its image processor fails on {where}"):
            arrays.append(np.asarray(processor(images=pixels, return_tensors="np")["pixel_values"][0], np.float32))
        if not np.isfinite(arrays[-1]).all():
            raise InputError(
                file, f"its image processor makes numbers of {where} that are not "
                "finite (image_mean, image_std, rescale_factor)",
            )  # fmt: skip
    shapes = {array.shape for array in arrays}
    if len(shapes) > 1:
        raise InputError(
            folder, f"its image processor makes arrays of {len(shapes)} sizes, such as {sorted(shapes)[:2]}; expected "
            "one that resizes images to one size",
        )  # fmt: skip
    return {"pixel_values": np.stack(arrays)}


def _texts(examples: Sequence[NetworkExample]) -> list[str]:
    for example in examples:
        if "text" not in example.inputs:
            raise InputError(example.where, "has no text; expected one, as in the first example")
    return [example.inputs["text"] for example in examples]


def _length(network: Network, folder: Path) -> int | None:
    """The most tokens that a network takes; None: any number."""
    limits = [
        getattr(getattr(network.module, "config", None), "max_position_embeddings", None),
        read_json_object(folder / "tokenizer_config.json", missing={}).get("model_max_length"),
    ]
    return min((int(limit) for limit in limits if isinstance(limit, int) and 0 < limit < NO_LENGTH), default=None)


def _tokens(tokenizer: Any, texts: list[str], length: int | None, pad_all: bool = False) -> dict[str, np.ndarray]:
    """Tokens of texts, cut at `length` and padded to the longest, or with `pad_all` to `length`."""
    limit = {} if length is None else {"truncation": True, "max_length": length}
    padding: Any = "max_length" if pad_all else tokenizer.pad_token is not None and len(texts) > 1
    with library_errors(tokenizer.name_or_path, "its tokenizer fails on the examples' texts"):
        return dict(tokenizer(texts, padding=padding, return_tensors="np", **limit))


def embedded_texts(network: Network, folder: Path, texts: list[str], role: str = "") -> dict[str, np.ndarray]:
    """The tokens of texts whose embeddings are asked for. role: query or document, before which a sentence transformer
    may put a prompt of its own."""
    module = network.module
    if not hasattr(module, "encode"):
        length = _length(network, folder)
        # SigLIP's texts end where its positions do: what it embeds is the state of the last, that of padding mostly.
        pad_all = network.compares_images and network.name.startswith("Siglip")
        if pad_all:
            length = module.config.text_config.max_position_embeddings
        tokens = _tokens(load_tokenizer(folder), texts, length, pad_all)
        return _accepted(network, tokens, str(folder), strict=False)
    prompts = module.prompts or {}
    prompt = prompts.get(role or module.default_prompt_name) or prompts.get(module.default_prompt_name) or ""
    with library_errors(folder, f"{network.name} fails on the examples' texts"):
        features = module.preprocess([prompt + text for text in texts])
    return {name: _as_jax_dtype(value.numpy()) for name, value in features.items() if hasattr(value, "numpy")}


def documents(task: NetworkTask) -> list[str]:
    """The documents of a retrieval, each once: those of the queries, and the corpus."""
    return list(dict.fromkeys([text for example in task.examples for text in example.target] + list(task.corpus)))


def is_zero_shot(task: NetworkTask, network: Network) -> bool:
    """Return whether a task classifies images by the texts that name their classes."""
    return task.kind == "classification" and network.compares_images


def class_names(task: NetworkTask) -> list[str]:
    """The names of the classes of a zero-shot classification."""
    return task.config.classes or sorted({str(example.target) for example in task.examples})


def class_prompts(task: NetworkTask) -> list[str]:
    """The prompts of all classes, class by class."""
    return [prompt.replace("{label}", name) for name in class_names(task) for prompt in task.config.prompts]


def _class_numbers(task: NetworkTask) -> np.ndarray:
    """int32[N]: the number of each example's class. Raises InputError for a label that is none of the classes."""
    names = class_names(task)
    numbers = {name: number for number, name in enumerate(names)}
    for example in task.examples:
        if str(example.target) not in numbers:
            hint = did_you_mean(str(example.target), names)
            raise InputError(example.where, f"label {shown(example.target)} is none of the {len(names)} classes{hint}")
    return np.array([numbers[str(example.target)] for example in task.examples], np.int32)


def _recordings(examples: Sequence[NetworkExample], folder: Path) -> dict[str, np.ndarray]:
    """Arrays of recordings, by the model's feature extractor."""
    import transformers
    from scipy.io import wavfile

    extractor = _opened(folder, transformers.AutoFeatureExtractor, "feature extractor")
    waves = []
    for example in examples:
        path = example.inputs["audio"]
        try:
            rate, wave = wavfile.read(path)
        # The reader raises errors of many kinds for a damaged file.
        except Exception as error:
            what = " ".join(str(error).split())[:200] or type(error).__name__
            raise InputError(example.where, f"{path.name} cannot be read as a .wav file ({what})") from None
        if rate != extractor.sampling_rate:
            raise InputError(
                example.where, f"{path.name} has {rate:,} Hz; the model takes {extractor.sampling_rate:,}: resample it"
            )
        if wave.dtype.kind == "i":
            wave = wave / np.iinfo(wave.dtype).max
        waves.append(wave.astype(np.float32).mean(-1) if wave.ndim > 1 else wave.astype(np.float32))
    with library_errors(processor_settings(folder)[0], "its feature extractor fails on the recordings"):
        return dict(extractor(waves, sampling_rate=extractor.sampling_rate, return_tensors="np"))


def _target_tokens(task: NetworkTask, network: Network, folder: Path) -> np.ndarray:
    """int32[N, T]: the tokens of the target texts. Raises InputError for a network that writes none."""
    config: Any = getattr(network.module, "config", None)
    if not getattr(config, "is_encoder_decoder", False):
        raise InputError(
            task.section, f"{task.name}: {network.name} is no encoder-decoder; a decoder takes kind: likelihood"
        )
    for example in task.examples:
        if not isinstance(example.target, str) or not example.target.strip():
            raise InputError(example.where, f"target: {shown(example.target)}; expected a text")
    texts = [str(example.target) for example in task.examples]
    labels = _tokens(load_tokenizer(folder), texts, _length(network, folder))
    target = np.where(labels["attention_mask"] > 0, labels["input_ids"], NO_TOKEN).astype(np.int32)
    # The decoder's first input, which some tokenizers begin texts with, is no token to score.
    return target[:, 1:] if (target[:, 0] == config.decoder_start_token_id).all() else target


def _shifted(target: np.ndarray, network: Network, folder: Path) -> np.ndarray:
    """The decoder's inputs: the target behind the token that begins a text."""
    config = network.module.config
    if config.decoder_start_token_id is None:
        raise InputError(folder / "config.json", "decoder_start_token_id: missing; expected the first token of a text")
    first = np.full((len(target), 1), config.decoder_start_token_id, np.int32)
    return np.concatenate([first, np.where(target[:, :-1] < 0, config.pad_token_id or 0, target[:, :-1])], axis=1)


def likelihood_arrays(task: TextTask | EntropyTask, network: Network, folder: Path) -> dict[str, Any]:
    """The rows of a task of targets or prompts, as a decoder is given them, and the next token of each scored place."""
    length = _length(network, folder) or NO_LENGTH
    rows = task.requests(load_tokenizer(folder), length).scored
    shape = len(rows), max(len(row.tokens) for row in rows)
    tokens, mask, target = (np.full(shape, value, np.int32) for value in (0, 0, NO_TOKEN))
    for number, row in enumerate(rows):
        count = len(row.tokens)
        if count > length:
            raise InputError(row.where, f"has {count:,} tokens; {network.name} takes {length:,}")
        tokens[number, :count], mask[number, :count] = row.tokens, 1
        target[number, row.start - 1 : count - 1] = row.tokens[row.start :]
    inputs = {"input_ids": tokens, "attention_mask": mask}
    return {"inputs": _accepted(network, inputs, rows[0].where, strict=False), "target": target}


# ---------------------------------------------------------------------------------------------------------------
# Targets


def _labels(examples: Sequence[NetworkExample], network: Network, folder: Path) -> np.ndarray:
    """int32[N]: the labels' numbers. Raises InputError for a label that the model does not have."""
    names = getattr(getattr(network.module, "config", None), "id2label", None) or {}
    numbers = {str(name): int(number) for number, name in names.items()}
    count = len(numbers) or MOST_LABELS
    labels = []
    for example in examples:
        label = example.target
        number: Any = numbers.get(label) if isinstance(label, str) else label
        if number is None and isinstance(label, str) and label.strip().isascii() and label.strip().isdigit():
            number = int(label)
        is_number = isinstance(number, (int, np.integer)) and not isinstance(number, (bool, np.bool_))
        if not is_number or not 0 <= int(number) < count:
            if not numbers:
                raise InputError(example.where, f"label {shown(label)}; expected the number of a label, from 0")
            named = did_you_mean(label, list(numbers)) if isinstance(label, str) else ""
            raise InputError(
                example.where, f"label {shown(label)} is none of the {count} of {folder / 'config.json'}{named}; "
                f"expected a number from 0 to {count - 1}, or a name of id2label",
            )  # fmt: skip
        labels.append(int(number))
    return np.array(labels, np.int32)


def _numbers(examples: Sequence[NetworkExample]) -> np.ndarray:
    """float32[N, D]: the right numbers. Raises InputError for anything else, and where examples have different D."""
    rows: list[np.ndarray] = []
    for example in examples:
        try:
            row = np.atleast_1d(np.asarray(example.target, np.float32))
        except (TypeError, ValueError):
            row = np.zeros((0, 0), np.float32)
        if (
            (row.ndim != 1 and not isinstance(example.target, np.ndarray))
            or not row.size
            or not np.isfinite(row).all()
            or (rows and row.shape != rows[0].shape)
        ):
            expected = "a finite number, or a list of such" if not rows else f"{len(rows[0])}, as before"
            raise InputError(example.where, f"target: {shown(example.target)}; expected {expected}")
        rows.append(row)
    return np.stack(rows)
