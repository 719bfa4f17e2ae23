"""How a search takes a model: the backend, the kind of a first task, and the data that it reads."""

from dataclasses import dataclass

from evojax_merge.checkpoints.config_file import torch_hint
from evojax_merge.checkpoints.folder import Folder
from evojax_merge.checkpoints.generator_keys import scheme_of
from evojax_merge.checkpoints.generator_lora import factor_ranks
from evojax_merge.checkpoints.pipelines import Pipeline, is_pipeline

# The backends; of files of tensors the user's code decides which.
DECODER, TORCH, FILES = "decoder", "torch", "files"
# The file that says which modules a sentence transformer has.
SENTENCE_FILE = "modules.json"
# The data of a first task, by its kind; `function` stands for what a user's function scores.
DATA = {
    "language": "records with a prompt and its answer, or texts",
    "classification": "a folder of pictures by class, or records with `image` or `text`, and `label`",
    "regression": "records with `image` or `text`, and `label`, a number",
    "transcription": "records with `audio` (.wav files) and `text`", "text_to_text": "records with `text` and `target`",
    "likelihood": "records with `prompt` and `target`",
    "similarity": "records with `sentence1`, `sentence2` and `score`, or with `query` and `document`",
    "network": "records with `image` or `text`", "image_generation": "records with `prompt`",
    "arrays": "an .npz of arrays",
}  # fmt: skip
# The options of `init` that the user's code needs.
OPTIONS = {
    "network": " --function FILE.py:NAME (which scores outputs)",
    "image_generation": " --function FILE.py:NAME (which scores pictures)",
    "arrays": " --backend FILE.py:NAME (a function that makes the torch module of a state dict), or --function "
    "FILE.py:NAME (a JAX function that scores the arrays)",
}
# The ends of the names of transformers' classes -> the kind of a first task.
BY_CLASS = {
    "ForImageClassification": "classification", "ForSequenceClassification": "classification",
    "CLIPModel": "classification", "SiglipModel": "classification", "ForSpeechSeq2Seq": "transcription",
    "WhisperForConditionalGeneration": "transcription", "ForConditionalGeneration": "text_to_text",
    "ForCausalLM": "likelihood", "LMHeadModel": "likelihood", "Model": "similarity", "": "network",
}  # fmt: skip


@dataclass(frozen=True)
class Way:
    """How a search takes a model. backend: DECODER, TORCH or FILES; model: what it is, in words; task: a key of DATA,
    the kind of a first task."""

    backend: str
    model: str
    task: str


def way_of(folder: Folder, unsearchable: str | None) -> Way | None:
    """The way of an opened model; None where no search takes it. unsearchable: why the search over language models does
    not; None: it does."""
    path = folder.path
    if unsearchable is None:
        return Way(DECODER, "a language model", "language")
    if is_pipeline(path):
        return Way(TORCH, f"a {Pipeline(path).class_name} of diffusers", "image_generation")
    if (path / SENTENCE_FILE).is_file():
        return Way(TORCH, "a sentence transformer", "similarity")
    if torch_hint(folder.config):
        name, labels = str(folder.config["architectures"][0]), folder.config.get("id2label")
        task = next(BY_CLASS[end] for end in BY_CLASS if name.endswith(end))
        is_number = folder.config.get("problem_type") == "regression" or (isinstance(labels, dict) and len(labels) == 1)
        is_regression = is_number and task == "classification" and "For" in name
        return Way(TORCH, f"a {name} of transformers", "regression" if is_regression else task)
    if folder.config or scheme_of(folder.entries) is not None or (path.is_file() and factor_ranks(path)):
        return None
    return Way(FILES, "a file of tensors", "arrays")
