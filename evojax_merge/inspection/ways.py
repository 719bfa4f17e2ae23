"""How a search takes a model: the backend, the kind of a first task, and the data that it reads."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from evojax_merge.checkpoints.config_file import torch_hint
from evojax_merge.checkpoints.folder import Folder
from evojax_merge.checkpoints.generator_keys import scheme_of
from evojax_merge.checkpoints.pipelines import Pipeline, is_pipeline
from evojax_merge.checkpoints.single_file_lora import factor_ranks

# The backends; of state dicts and pytrees the user's code decides which.
DECODER, TORCH, FILES = "decoder", "torch", "files"
# The file that says which modules a sentence transformer has.
SENTENCE_FILE = "modules.json"
PICTURES = "a folder of pictures by class, or records with `image` and `label`"
TEXTS = "records with `text` and `label`"
# The ends of the names of transformers' classes -> the kind of a first task, and its data.
BY_CLASS = {
    "ForImageClassification": ("classification", PICTURES),
    "ForSequenceClassification": ("classification", TEXTS),
    "ForSpeechSeq2Seq": ("transcription", "records with `audio` (.wav files) and `text`"),
    "WhisperForConditionalGeneration": ("transcription", "records with `audio` (.wav files) and `text`"),
    "ForConditionalGeneration": ("text_to_text", "records with `text` and `target`"),
    "ForCausalLM": ("likelihood", "records with `prompt` and `target`"),
    "LMHeadModel": ("likelihood", "records with `prompt` and `target`"),
    "CLIPModel": ("classification", PICTURES),
    "SiglipModel": ("classification", PICTURES),
    "Model": ("similarity", "records with `sentence1`, `sentence2` and `score`, or with `query` and `document`"),
}


@dataclass(frozen=True)
class Way:
    """How a search takes a model. backend: DECODER, TORCH or FILES; model: what it is, in words; task: the kind of a
    first task, empty where the data decides; data: what `init --data` takes, in words; options: what `init` needs
    beside it."""

    backend: str
    model: str
    task: str
    data: str
    options: str = ""


def way_of(folder: Folder, unsearchable: str | None) -> Way | None:
    """The way of an opened model; None where no search takes it. unsearchable: why the search over language models does
    not; None: it does."""
    path, config = folder.path, folder.config
    if unsearchable is None:
        return Way(DECODER, "a language model", "", "records with a prompt and its answer, or texts")
    if is_pipeline(path):
        return Way(
            TORCH, f"a {Pipeline(path).class_name} of diffusers", "image_generation", "records with `prompt`",
            " --function FILE.py:NAME (which scores pictures)",
        )  # fmt: skip
    if (path / SENTENCE_FILE).is_file():
        return Way(TORCH, "a sentence transformer", *BY_CLASS["Model"])
    if torch_hint(config):
        return _of_class(config)
    if config or scheme_of(folder.entries) is not None or (path.is_file() and factor_ranks(path)):
        return None
    return Way(
        FILES, "a file of tensors", "", "an .npz of arrays",
        " --backend FILE.py:NAME (a function that makes the torch module of this state dict), or --function "
        "FILE.py:NAME (a JAX function that scores the arrays)",
    )  # fmt: skip


def _of_class(config: Mapping[str, Any]) -> Way:
    name = str(config["architectures"][0])
    end = next((end for end in BY_CLASS if name.endswith(end)), None)
    kind, data = ("network", "records with `image` or `text`") if end is None else BY_CLASS[end]
    labels = config.get("id2label")
    is_regression = config.get("problem_type") == "regression" or (isinstance(labels, dict) and len(labels) == 1)
    if kind == "classification" and end != "CLIPModel" and is_regression:
        kind = "regression"
    options = " --function FILE.py:NAME (which scores its outputs)" if end is None else ""
    return Way(TORCH, f"a {name} of transformers", kind, data, options)
