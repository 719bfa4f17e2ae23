"""Libraries open strangers' folders without running their code and without reading pickles: every call of the package
that can do either is listed with its arguments, and no other is there. Classes and files that folders name are those
that the libraries have."""

import ast
import re
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from helpers.files import write_json

import evojax_merge
from evojax_merge.checkpoints.allowed_classes import COMPONENTS, check_folder, library_class
from evojax_merge.errors import InputError

ROOT = Path(evojax_merge.__file__).parent
# Functions and methods of other libraries that may run code, or read pickles, by the last part of their names.
LOADING = {
    "from_pretrained", "from_single_file", "from_pipe", "load_lora_weights", "lora_state_dict", "load_adapter",
    "load_attn_procs", "load_textual_inversion", "load_ip_adapter", "load_dataset", "load_dataset_builder",
    "SentenceTransformer", "CrossEncoder", "SparseEncoder", "PeftModel", "AutoPeftModel", "load_peft_weights",
    "torch.load", "np.load", "numpy.load", "pickle.load", "pickle.loads", "joblib.load", "dill.load", "read_pickle",
    "get_class_from_dynamic_module", "transformers.pipeline", "load_state_dict_from_url", "hub.load", "evaluate.load",
    "unpickle", "Unpickler", "load_checkpoint_and_dispatch", "load_sharded_checkpoint",
}  # fmt: skip
NO_CODE = {"trust_remote_code": "False", "local_files_only": "True"}
SAFE = NO_CODE | {"use_safetensors": "True"}
# Each call, by its module and function, and the arguments that it must have.
CALLS: list[tuple[str, dict[str, str]]] = [
    ("backends/decoder/vision.py: _config: AutoConfig.from_pretrained", NO_CODE),
    # It is given its tensors, and no folder.
    ("backends/decoder/vision.py: _module: MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)].from_pretrained",
     {"trust_remote_code": "False", "use_safetensors": "True", "state_dict": "tensors"}),
    ("backends/decoder/vision.py: _processor: AutoProcessor.from_pretrained", NO_CODE),
    ("backends/torch/folders.py: open_module: SentenceTransformer",
     NO_CODE | {"model_kwargs": "{'use_safetensors': True}"}),
    ("backends/torch/folders.py: open_module: kind.from_pretrained", SAFE),
    ("backends/torch/inputs.py: _opened: loader.from_pretrained", NO_CODE),
    ("checkpoints/bank.py: gathered: np.load", {"allow_pickle": "False"}),
    ("checkpoints/generator_lora.py: _fused: opened.load_lora_weights",
     {"local_files_only": "True", "use_safetensors": "True"}),
    # Tokenizers, schedulers and processors, which have no weights.
    ("checkpoints/pipelines.py: open_component: kind.from_pretrained", NO_CODE),
    ("checkpoints/pipelines.py: open_component: kind.from_pretrained", SAFE),
    ("checkpoints/tokens.py: load_tokenizer: loader.from_pretrained", NO_CODE),
    ("tasks/arrays.py: read_npz: np.load", {"allow_pickle": "False"}),
    # Configs of models that the package itself has written.
    ("zoo/evovlm.py: save_small_files: LlamaConfig.from_pretrained", {}),
]  # fmt: skip


@cache
def modules() -> dict[str, ast.Module]:
    return {str(file.relative_to(ROOT)): ast.parse(file.read_text()) for file in sorted(ROOT.rglob("*.py"))}


def calls() -> list[tuple[str, dict[str, str]]]:
    """The calls of the package, with their arguments by name; `**` for arguments that are not in sight."""
    places = []

    def visit(node: ast.AST, module: str, function: str) -> None:
        if isinstance(node, ast.FunctionDef):
            function = node.name
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if any(called == name or called.endswith(f".{name}") for name in LOADING):
                arguments = {keyword.arg or "**": ast.unparse(keyword.value) for keyword in node.keywords}
                places.append((f"{module}: {function}: {called}", arguments))
        for child in ast.iter_child_nodes(node):
            visit(child, module, function)

    for module, tree in modules().items():
        visit(tree, module, "")
    return places


def test_every_call_that_loads_says_that_it_runs_no_code_and_reads_no_pickle() -> None:
    present = calls()
    assert Counter(place for place, _ in present) == Counter(place for place, _ in CALLS)
    for (place, given), (_, expected) in zip(sorted(present, key=_place), sorted(CALLS, key=_place), strict=True):
        assert given.items() >= expected.items() and "**" not in given, (place, given)


def _place(call: tuple[str, dict[str, str]]) -> tuple[str, int]:
    return call[0], len([name for name in call[1] if name in SAFE])


def test_nothing_unpickles() -> None:
    for module, tree in modules().items():
        imported = [
            name.name if isinstance(node, ast.Import) else str(node.module)
            for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom) for name in node.names
        ]  # fmt: skip
        assert not {"pickle", "joblib", "dill", "cloudpickle", "shelve", "marshal"} & set(imported), module


# ---------------------------------------------------------------------------------------------------------------
# Classes that folders name

AUTO = ["AutoModelForImageClassification", "AutoModel", "AutoModelForCausalLM", "AutoTokenizer", "AutoProcessor"]
NO_MODELS = ["pipeline", "Trainer", "PreTrainedModel", "ViTConfig", "CLIPTokenizer", "models", "__name__", "", "os", 7]


@pytest.mark.parametrize("name", [*AUTO, *NO_MODELS], ids=repr)
def test_a_model_has_a_class_of_its_own(name: Any) -> None:
    with pytest.raises(InputError, match=r"^config.json: architectures: .* code that comes with a model is not run$"):
        library_class("config.json", "architectures", "transformers", name, ("PreTrainedModel",))


COMPONENT = {
    "transformers": [*AUTO, *NO_MODELS[:3]],
    "diffusers": ["AutoModel", "AutoPipelineForText2Image", "DiffusionPipeline", "StableDiffusionPipeline",
                  "ModelMixin", "pipelines", "utils", "ConfigMixin"],
}  # fmt: skip


@pytest.mark.parametrize(("library", "name"), [(key, name) for key, names in COMPONENT.items() for name in names])
def test_a_component_has_a_class_of_its_own(library: str, name: str) -> None:
    with pytest.raises(InputError, match="code that comes with a model is not run"):
        library_class("model_index.json", "unet", library, name, COMPONENTS[library])


def test_classes_of_the_libraries_are_taken() -> None:
    for library, names in {
        "diffusers": ["UNet2DModel", "AutoencoderKL", "DDPMScheduler"],
        "transformers": ["CLIPTextModel", "CLIPTokenizer", "CLIPImageProcessor", "WhisperFeatureExtractor"],
    }.items():
        for name in names:
            assert library_class("model_index.json", name, library, name, COMPONENTS[library]).__name__ == name


TOKENIZER, PROCESSOR, IMAGES = "tokenizer_config.json", "processor_config.json", "preprocessor_config.json"
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    *((TOKENIZER, {"tokenizer_class": name}, "tokenizer_class") for name in (
        "AutoTokenizer", "AutoTokenizerFast", "AutoProcessor", "AutoProcessorFast", "AutoModel", "LlavaProcessor",
        "pipeline", "Trainer", "LlamaForCausalLM")),
    ("config.json", {"tokenizer_class": "AutoProcessor"}, "tokenizer_class"),
    ("config.json", {"text_config": {"tokenizer_class": "AutoProcessor"}}, "tokenizer_class"),
    (TOKENIZER, {"processor_class": "AutoProcessor"}, "processor_class"),
    (PROCESSOR, {"processor_class": "AutoImageProcessor"}, "processor_class"),
    (IMAGES, {"processor_class": "AutoTokenizer"}, "processor_class"),
    (IMAGES, {"image_processor_type": "AutoImageProcessor"}, "image_processor_type"),
    (IMAGES, {"image_processor_type": "LlavaProcessor"}, "image_processor_type"),
    (PROCESSOR, {"image_processor": {"image_processor_type": "AutoProcessor"}}, "image_processor_type"),
    (IMAGES, {"feature_extractor_type": "AutoFeatureExtractor"}, "feature_extractor_type"),
    ("video_preprocessor_config.json", {"video_processor_type": "AutoVideoProcessor"}, "video_processor_type"),
    (PROCESSOR, {"audio_tokenizer": {"audio_tokenizer_class": "DacModel"}}, "audio_tokenizer"),
    *(("config.json", {"transformers_weights": name}, "pickle") for name in (
        "pytorch_model.bin", "weights.PT", "a.ckpt", "a.pkl", "a.pickle", "sub/a.pth", "a.joblib")),
    *(("config.json", {"transformers_weights": name}, "outside") for name in (
        "../other/model.safetensors", "/etc/passwd", "", 7)),
    (TOKENIZER, {"fast_tokenizer_files": ["tokenizer.4.0.0.json", "../x/tokenizer.5.0.0.json"]}, "outside"),
    (TOKENIZER, {"chat_template": [{"name": "../../thesis", "template": "x"}]}, "outside"),
    (TOKENIZER, {"chat_template": [{"name": "a/b", "template": "x"}]}, "outside"),
    (TOKENIZER, {"chat_template": {"/etc/cron.d/x": "x"}}, "outside"),
    ("config.json", {"dtype": "Tensor"}, "dtype"),
    *(("model.safetensors.index.json", {"weight_map": {"a": name}}, says) for name, says in (
        ("../one/model.safetensors", "outside"), ("/a.safetensors", "outside"), ("a.bin", "safetensors file"),
        ("a.pickle", "safetensors file"), ("", "outside"), (7, "outside"))),
    ("diffusion_pytorch_model.safetensors.index.json", {"weight_map": {"a": "../a.safetensors"}}, "outside"),
]  # fmt: skip


@pytest.mark.parametrize(("file", "document", "says"), REFUSED, ids=lambda value: str(value)[:60])
def test_files_that_name_more_than_a_model(file: str, document: dict[str, Any], says: str, tmp_path: Path) -> None:
    write_json(tmp_path / file, document)
    with pytest.raises(InputError, match=re.escape(says)) as caught:
        check_folder(tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_files_of_usual_folders_are_taken(tmp_path: Path) -> None:
    for file, document in {
        "config.json": {"tokenizer_class": None, "transformers_weights": "a.safetensors", "dtype": "bfloat16"},
        TOKENIZER: {
            "tokenizer_class": "CLIPTokenizerFast", "processor_class": "CLIPProcessor",
            "chat_template": [{"name": "default", "template": "x"}, {"name": "tool_use", "template": "x"}],
            "fast_tokenizer_files": ["tokenizer.4.0.0.json"],
        },
        # Names of old, and of code that is not run.
        IMAGES: {"image_processor_type": "ViTImageProcessor", "feature_extractor_type": "CLIPFeatureExtractor"},
        PROCESSOR: {"processor_class": "NobodysProcessor", "image_processor": {"image_processor_type": None}},
        "model.safetensors.index.json": {"weight_map": {"a": "model-1.safetensors", "b": "onnx/model.safetensors"}},
    }.items():  # fmt: skip
        write_json(tmp_path / file, document)
    check_folder(tmp_path)


POOLING = {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Pooling"}
MODULES: list[tuple[Any, str]] = [
    *(([POOLING | {"type": name}], "code that comes with a model is not run") for name in (
        "os.system", "subprocess.Popen", "modeling.Mine", "torch.nn.Linear", "transformers.AutoModel", "builtins.eval",
        "sentence_transformers", "sentence_transformers.", "sentence_transformers..Pooling", "", None, 7,
        "sentence_transformersx.Pooling", "sentence_transformers.models.Pooling\n")),
    *(([POOLING | {"path": name}], "lies outside of its folder") for name in (
        "../pooling", "/etc", "1_Pooling/../../x", "~", ".", None, 7, "a\\b")),
    (["1_Pooling"], "type"), ({"0": POOLING}, "type"), (7, "type"),
]  # fmt: skip


@pytest.mark.parametrize(("modules", "says"), MODULES, ids=lambda value: str(value)[:70])
def test_modules_of_a_sentence_transformer(modules: Any, says: str, tmp_path: Path) -> None:
    from evojax_merge.backends.torch.folders import open_module

    write_json(tmp_path / "modules.json", modules)
    with pytest.raises(InputError, match=says) as caught:
        open_module(tmp_path)
    assert "modules.json: [0]" in str(caught.value)


SETTINGS: list[dict[str, Any]] = [
    {"model_args": {"use_safetensors": False}}, {"model_args": {"weights_only": False}},
    {"model_kwargs": {"attn_implementation": "owner/kernel"}}, {"model_args": {"kernel_config": {"a": "b"}}},
    {"model_args": {"trust_remote_code": True}}, {"model_args": {"gguf_file": "x"}}, {"model_args": ["a"]},
    {"model_args": "a"}, {"config_args": {"transformers_weights": "pytorch_model.bin"}},
    {"config_kwargs": {"a": 1}}, {"tokenizer_args": {"vocab_file": "/etc/passwd"}},
    {"processor_kwargs": {"tokenizer_file": "../tokenizer.json"}}, {"tokenizer_args": {"a": {"b": 1}}},
]  # fmt: skip


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_settings_of_a_sentence_transformers_module(settings: dict[str, Any], tmp_path: Path) -> None:
    from evojax_merge.backends.torch.folders import open_module

    write_json(tmp_path / "modules.json", [POOLING])
    write_json(tmp_path / "sentence_bert_config.json", {"max_seq_length": 8} | settings)
    with pytest.raises(InputError, match=f"sentence_bert_config.json: {next(iter(settings))}: "):
        open_module(tmp_path)
