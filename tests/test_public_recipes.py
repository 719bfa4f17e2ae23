"""Recipes as strangers publish them, by the command line: what mergekit merges is merged, to the same weights, and
what it passes over is told."""

import contextlib
import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import yaml
from helpers.commands import command, refusal, run_here
from helpers.files import edit_json, read_json, write_json, write_yaml
from helpers.mergekit import assert_same_tensors, assert_same_weights, merge_by_mergekit, merge_files_by_mergekit
from helpers.models import finetune, random_model, save, state, tiny_config
from helpers.sampling import sample
from safetensors.torch import load_file, save_file

from evojax_merge.checkpoints.derived import ignored_revisions
from evojax_merge.checkpoints.folder import open_folder
from evojax_merge.checkpoints.references import resolve
from evojax_merge.checkpoints.tokens import load_tokenizer
from evojax_merge.cli import cli
from evojax_merge.errors import InputError
from evojax_merge.mergekit.plan import layout, plan
from evojax_merge.mergekit.schema import parse_recipe
from evojax_merge.mergekit.unused_keys import without_unused_keys
from evojax_merge.schema.yaml_reader import parse_documents

MODELS = "models: [{model: a, parameters: {weight: 0.5}}, {model: b, parameters: {weight: 0.3}}]\n"
LINEAR = f"merge_method: linear\n{MODELS}"
# The text, and what is told of it: a key each, in the order of the recipe.
PUBLIC: dict[str, tuple[str, tuple[str, ...]]] = {
    "slerp of a generator": (
        """
slices:
  - sources:
      - model: a
        layer_range: [0, 2]
        parameters: {weight: 0.3}
      - model: b
        layer_range: [0, 2]
    merge_method: slerp
merge_method: slerp
base_model: a
parameters:
  t:
    - filter: self_attn
      value: [0, 0.5, 0.3]
    - value: 0.5 # fallback for rest of tensors
  int8_mask: true
dtype: float32
int_space: 1
""",
        ("int_space", "merge_method", "weight", "int8_mask"),
    ),
    "ties as mergekit writes it": (
        """
base_model: {model: {path: base}}
dtype: torch.float32
merge_method: ties
modules:
  default:
    slices:
    - sources:
      - layer_range: [0, '2']
        model: {model: {path: a, revision: main}, lora: null}
        parameters: {density: '0.5', weight: [9e-1, 0.2]}
      - {layer_range: [0.0, 2], model: b@main, parameters: {density: 1}}
      - {layer_range: [0, 2], model: base}
    parameters: {weight: 0.7}
parameters: {lambda: 1e0, normalize: 1.0, int8_mask: 1.0, weight: 0.1}
tokenizer: {}
""",
        (),
    ),
    "switches as lists": (
        f"merge_method: ties\nbase_model: base\n{MODELS}parameters: {{normalize: [1, 'no'], density: 0.5}}\n", (),
    ),
    "karcher with weights": (
        f"merge_method: karcher\n{MODELS}parameters: {{max_iter: 20, tol: 1e-9}}\ndtype: float32\n", ("weight",),
    ),
    "whole models with layers": (
        "merge_method: linear\nmodels:\n- {model: a, layer_range: [0, 32], weight: 2, parameters: {weight: 1}}\n"
        "- {model: b, revision: v1, parameters: {weight: 1, density: 0.5}}\nslices: []\npad_to_multiple_of: 8\n",
        ("pad_to_multiple_of", "layer_range", "weight", "revision", "density"),
    ),
    "filters with notes": (
        "merge_method: linear\nmodels:\n- model: a\n  parameters:\n    weight: [{filter: mlp, value: 0.5, note: hi}]\n"
        "- {model: b, parameters: {weight: 1}}\nparameters: {weight: 0.25}\n",
        ("note",),
    ),
    "a base and nothing else": (
        "base_model: a\ndtype: bfloat16\nmerge_method: task_arithmetic\nparameters: {normalize: false}\n"
        "slices:\n- sources:\n  - {layer_range: [0, 2], model: a, parameters: {weight: 1.0}}\n",
        (),
    ),
    "repeated layers": (
        "merge_method: passthrough\nslices:\n- sources: [{model: a, layer_range: [0, 2]}]\n  residual_weight: 0.5\n"
        "- sources: [{model: a, layer_range: [1, 2]}]\n",
        ("residual_weight",),
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `base`, and `a` and `b` that were made of it, of two layers. Read only, but for recipes."""
    root = tmp_path_factory.mktemp("models")
    base = random_model(tiny_config(num_hidden_layers=2))
    for model, name in ((base, "base"), (finetune(base, 1), "a"), (finetune(base, 2), "b")):
        save(model, root / name)
    return root


def merged(root: Path, text: str, out: Path, *options: str) -> Path:
    """`evojax-merge merge` of a recipe that lies in `root`."""
    recipe = out.with_suffix(".yaml")
    recipe.write_text(text)
    with contextlib.chdir(root):
        assert command("merge", recipe, out, *options) == 0
    return out


def mergekits(root: Path, text: str, out: Path, **options: Any) -> Path:
    return merge_by_mergekit(yaml.safe_load(text), out, root, **options)


def warnings_in(stderr: str) -> list[str]:
    lines = stderr.splitlines()
    assert all(line.startswith("warning: ") for line in lines), stderr
    return [line.removeprefix("warning: ") for line in lines]


# ---------------------------------------------------------------------------------------------------------------
# Keys


@pytest.mark.parametrize("case", sample(PUBLIC, 8))
def test_public_recipes_are_merged_as_in_mergekit(
    case: str, models: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    text, keys = PUBLIC[case]
    found = merged(models, text, tmp_path / "found")
    told = warnings_in(capfd.readouterr().err)
    assert [line.partition(": ignored; ")[0].rpartition(".")[2].split(": ")[-1] for line in told] == list(keys)
    assert all(line.startswith(f"{tmp_path / 'found.yaml'}: ") for line in told)
    assert_same_weights(found, mergekits(models, text, tmp_path / "expected"))
    assert (found / "mergekit_config.yml").read_text() == text
    # With --strict the first of them is an error, and nothing is written.
    with contextlib.chdir(models):
        assert command("merge", tmp_path / "found.yaml", tmp_path / "strict", "--strict") == (2 if keys else 0)
    assert (tmp_path / "strict").exists() == (not keys)


def test_a_key_that_is_near_another_is_told_with_it() -> None:
    """And one that means something to another method is not taken for a typo; each is told once."""
    rows = "[{model: a, parameters: {weight: 1, T: 2}}, {model: b, parameters: {weight: 1}}]"
    text = f"merge_method: slerp\nmodels: {rows}\n"
    (document,), lines = without_unused_keys(Path("r.yaml"), parse_documents("r", f"{text}dtyp: float16\n"))
    assert document == {
        "merge_method": "slerp",
        "models": [{"model": "a", "parameters": {}}, {"model": "b", "parameters": {}}],
    }
    assert lines[0] == "r.yaml: dtyp: ignored; a recipe has no such key (did you mean 'dtype'? --strict refuses it)"
    assert lines[1] == "r.yaml: models[0].parameters.weight: ignored; slerp does not use it"
    assert [line.split(":")[1].split(".")[-1].strip() for line in lines] == ["dtyp", "weight", "T"]


def test_a_parameter_outside_of_parameters_is_pointed_to() -> None:
    text = "merge_method: ties\nbase_model: a\nmodels: [{model: b, weight: 1}]\nparameters: {weight: 0.4}\ndensity: 1\n"
    _, lines = without_unused_keys(Path("r.yaml"), parse_documents("r", text))
    assert lines == [
        "r.yaml: density: ignored; a recipe has no such key (did you mean 'parameters.density'? --strict refuses it)",
        "r.yaml: models[0].weight: ignored; a model has no such key here (did you mean 'parameters.weight'? "
        "--strict refuses it)",
    ]


def test_what_a_stranger_writes_is_told_in_few_lines_that_a_terminal_shows_as_they_are() -> None:
    keys = {f"note {i}": 0 for i in range(30)}
    _, lines = without_unused_keys(Path("r"), [{"merge_method": "linear", "\x1b[31mred\n": 1, **keys}])
    assert lines[0].startswith(r"r: \x1b[31mred\n: ignored")
    assert len(lines) == 21 and lines[-1].startswith("r: 11 more keys are ignored")


def test_a_parameter_of_all_models_is_told_where_one_model_has_it() -> None:
    text = "merge_method: slerp\nmodels: [{model: a, parameters: {t: 0.3}}]\nparameters: {t: 0.4}\n"
    (document,), lines = without_unused_keys(Path("r.yaml"), parse_documents("r", text))
    assert lines == ["r.yaml: models[0].parameters.t: ignored; slerp has one for all models"]
    assert document["parameters"] == {"t": 0.4}


def test_local_models_may_have_an_at_sign_and_need_no_revision(models: Path, tmp_path: Path) -> None:
    (tmp_path / "a@b").symlink_to(models / "a")
    for reference in ("a@b", "a@b@main", "./a@b@refs/pr/1"):
        assert resolve("r", reference, tmp_path) == (models / "a").resolve()
    with pytest.raises(InputError, match="no such folder"):
        resolve("r", "@b", tmp_path)


def test_a_revision_of_what_lies_here_is_told(models: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    merged_equally = "merge_method: linear\nmodels: [{model: a@v2}, {model: b@main}]\nparameters: {weight: 1}\n"
    merged(models, merged_equally, tmp_path / "out")
    said = " ".join(capfd.readouterr().err.split())
    assert "a@v2: a is a folder here, which has no revisions; v2 is ignored" in said and said.count("revisions") == 1


def test_revisions_are_those_of_the_base_and_of_the_adapter(models: Path, tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(models / "a")
    (tmp_path / "lora").mkdir()
    told = ignored_revisions(["a@v2", None, "a@main", "owner/a@v2", "a@v2+lora@v3", "a"], tmp_path)
    assert [line.partition(":")[0] for line in told] == ["a@v2", "lora@v3"]


@pytest.mark.parametrize("strict", [True, False])
def test_a_path_alone_is_a_model(strict: bool) -> None:
    paths = [{"path": "a"}, {"path": "owner/b", "revision": "v2"}]
    rows = [{"model": path, "parameters": {"weight": 1}} for path in paths]
    document: Any = {"merge_method": "linear", "base_model": {"path": "a"}, "models": rows}
    if not strict:
        (document,), told = without_unused_keys(Path("recipe.yaml"), [document])
        assert told == []
    assert parse_recipe(Path("recipe.yaml"), document).models == ["a", "owner/b@v2"]


def test_the_revision_is_asked_of_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = []
    monkeypatch.setattr(
        "evojax_merge.checkpoints.references._download",
        lambda name, revision, weights: asked.append((name, revision)) or tmp_path,
    )
    for reference in ("owner/name", "owner/name@v2", "owner/name@refs/pr/1"):
        assert resolve("r", reference, tmp_path) == tmp_path
    assert asked == [("owner/name", None), ("owner/name", "v2"), ("owner/name", "refs/pr/1")]


# ---------------------------------------------------------------------------------------------------------------
# Values

TUNED = "base_model: base\nmodels: [{model: a, parameters: {density: %s}}, {model: b, parameters: {weight: true}}]\n"
# The text, and the warnings without the recipe's name.
BENT: dict[str, tuple[str, tuple[str, ...]]] = {
    "a key twice": (
        f"merge_method: linear\n{MODELS}dtype: float16\nparameters: {{normalize: false}}\ndtype: float32\n",
        ("5: dtype: is on line 3 already; the last counts",),
    ),
    "ties with all and none": (
        f"merge_method: ties\n{TUNED % 1.5}parameters:\n  weight: 0.5\n"
        "  density: [{filter: mlp, value: -1}, {value: 7}]\n",
        (
            "models[0].parameters.density: 1.5 is read as 1",
            "models[1].parameters.weight: True is read as 1",
            "parameters.density[0].value: -1 is read as 0",
            "parameters.density[1].value: 7 is read as 1",
        ),
    ),
    "breadcrumbs with none": (
        f"merge_method: breadcrumbs\n{TUNED % -0.5}parameters: {{weight: ['0.5', true]}}\n",
        ("models[0].parameters.density: -0.5 is read as 0", "models[1].parameters.weight: True is read as 1"),
    ),
    "della with all and none": (
        f"merge_method: della\n{TUNED % 1.01}parameters: {{weight: 1, density: -2, epsilon: 0.1}}\n",
        (
            "models[0].parameters.density: 1.01 is read as 1",
            "models[1].parameters.weight: True is read as 1",
            "parameters.density: -2 is read as 0",
        ),
    ),
    "dare with all": (
        f"merge_method: dare_ties\n{TUNED % 'true'}parameters: {{weight: 1, density: '53'}}\n",
        (
            "models[0].parameters.density: True is read as 1",
            "models[1].parameters.weight: True is read as 1",
            "parameters.density: '53' is read as 1",
        ),
    ),
    "sce with all": (
        "merge_method: sce\nbase_model: base\nmodels: [{model: a}, {model: b}]\nparameters: {select_topk: 2}\n",
        ("parameters.select_topk: 2 is read as 1",),
    ),
    "a template of no name": (
        f"{LINEAR}chat_template: chatml2\n",
        ("chat_template: ignored; no template is called 'chatml2' (did you mean 'chatml'?)",),
    ),
    "tokens": (
        f"{LINEAR}tokenizer:\n  source: a\n  pad_to_multiple_of: '16'\n  tokens:\n    <s>: {{source: null}}\n"
        "    </s>: {source: {kind: model_token, model: b, token_id: '5'}, force: 'yes'}\n",
        (
            "tokenizer.tokens.</s>.source.token_id: '5' is read as 5",
            "tokenizer.tokens.</s>.force: 'yes' is read as True",
            "tokenizer.tokens.<s>: ignored; it names no source",
            "tokenizer.pad_to_multiple_of: '16' is read as 16",
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", sample(BENT, 5))
def test_values_are_read_as_mergekit_reads_them(
    case: str, models: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    text, said = BENT[case]
    found = merged(models, text, tmp_path / "found")
    told = [line.removeprefix(f"{tmp_path / 'found.yaml'}:").strip() for line in warnings_in(capfd.readouterr().err)]
    assert sorted(told) == sorted(said)
    assert_same_weights(found, mergekits(models, text, tmp_path / "expected"))
    with contextlib.chdir(models):
        assert command("merge", tmp_path / "found.yaml", tmp_path / "strict", "--strict") == 2
    assert not (tmp_path / "strict").exists()


OF_A_AND_B = "merge_method: slerp\nbase_model: a\nmodels: [{model: a}, {model: b}]\n"
# The text, and what mergekit says of it.
REFUSED = {
    "t of one model": (
        "merge_method: slerp\nbase_model: a\nmodels: [{model: a}, {model: b, parameters: {t: 0.3}}]\n",
        "Missing required parameter t",
    ),
    "no t": (OF_A_AND_B, "Missing required parameter t"),
    "t of some tensors": (
        f"{OF_A_AND_B}parameters: {{t: [{{filter: mlp, value: 0.5}}]}}\n", "Missing required parameter t",
    ),
    "a probability below 0": (
        f"merge_method: dare_linear\n{TUNED % -0.5}parameters: {{weight: 1}}\n", "p_in >= 0",
    ),
    "a token of no source": (f"{LINEAR}tokenizer: {{source: a, tokens: {{<s>: {{force: true}}}}}}\n", "source=None"),
    "a tokenizer of no source": (f"{LINEAR}tokenizer: {{source: null}}\n", "validation error"),
}  # fmt: skip


@pytest.mark.parametrize("case", sample(REFUSED, 6))
def test_what_mergekit_refuses_is_refused(
    case: str, models: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    text, said = REFUSED[case]
    with pytest.raises((ValueError, RuntimeError, NotImplementedError), match=said):
        mergekits(models, text, tmp_path / "expected")
    (tmp_path / "recipe.yaml").write_text(text)
    with contextlib.chdir(models):
        assert command("merge", tmp_path / "recipe.yaml", tmp_path / "found") == 2
    assert not (tmp_path / "found").exists()
    assert ("t: missing for the merge" in capfd.readouterr().err) == ("slerp" in text)


def test_slerp_has_its_t_where_mergekit_reads_it(models: Path, tmp_path: Path) -> None:
    """At the top or at a slice; one of a source is passed over."""
    sources = "{model: a, layer_range: [0, 1], parameters: {t: 0.9}}, {model: b, layer_range: [0, 1]}"
    later = "{model: a, layer_range: [1, 2]}, {model: b, layer_range: [1, 2]}"
    text = (
        f"merge_method: slerp\nbase_model: a\nslices:\n- sources: [{sources}]\n  parameters: {{t: 0.2}}\n"
        f"- sources: [{later}]\nparameters: {{t: 0.7}}\n"
    )
    assert_same_weights(merged(models, text, tmp_path / "found"), mergekits(models, text, tmp_path / "expected"))


def test_a_gradient_reaches_every_numbered_tensor() -> None:
    """As in mergekit, to which the projection behind Qwen's vision tower is its last layer; what has no number has the
    first value."""
    expected = {
        "visual.blocks.0.norm1.weight": 1, "visual.blocks.1.norm1.weight": 3, "visual.merger.ln_q.weight": 1,
        "visual.merger.mlp.0.bias": 3, "visual.merger.mlp.2.bias": 3, "convolutions.0.weight": 1,
        "convolutions.1.weight": 2, "convolutions.2.weight": 3, "alone.0.weight": 3, "norm.weight": 1,
    }  # fmt: skip
    rows = [{"model": "a", "parameters": {"weight": [1, 3]}}, {"model": "b", "parameters": {"weight": 1}}]
    recipe = parse_recipe(Path("r.yaml"), {"merge_method": "linear", "models": rows})
    planned = plan(recipe, [layout([*expected])] * 2)
    assert {row.name: float(row.parameters["weight"][0]) for row in planned} == expected


def test_configs_that_differ_are_told(models: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """As those of a model and of one that was tuned to longer texts."""
    (tmp_path / "a").symlink_to(models / "a")
    shutil.copytree(models / "b", tmp_path / "b")
    edit_json(tmp_path / "b/config.json", lambda config: config["rope_parameters"].update(rope_theta=5e5))
    found = merged(tmp_path, LINEAR, tmp_path / "found")
    (line,) = warnings_in(capfd.readouterr().err)
    assert "b/config.json: rope.theta is 500000.0, but 10000.0 in the first model" in line
    assert_same_weights(found, mergekits(tmp_path, LINEAR, tmp_path / "expected"))
    assert read_json(found / "config.json")["rope_parameters"]["rope_theta"] == 10000.0
    with contextlib.chdir(tmp_path):
        assert command("merge", "found.yaml", "strict", "--strict") == 2
    assert not (tmp_path / "strict").exists()


def test_other_architectures_of_the_same_tensors_are_merged_if_asked_for(
    models: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Llama's and Mistral's decoders have the same tensors."""
    (tmp_path / "a").symlink_to(models / "a")
    shutil.copytree(models / "b", tmp_path / "other")
    config = read_json(tmp_path / "other/config.json")
    assert config["model_type"] == "llama"
    config |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
    write_json(tmp_path / "other/config.json", config)
    text = "merge_method: ties\nbase_model: a\nmodels: [{model: other, parameters: {weight: 0.5, density: 0.5}}]\n"
    with pytest.raises(RuntimeError, match="allow-crimes"):
        mergekits(tmp_path, text, tmp_path / "refused")
    (tmp_path / "recipe.yaml").write_text(text)
    with contextlib.chdir(tmp_path):
        assert command("merge", "recipe.yaml", "refused-too") == 2
    assert "--allow-crimes" in capfd.readouterr().err
    found = merged(tmp_path, text, tmp_path / "found", "--allow-crimes")
    assert_same_weights(found, mergekits(tmp_path, text, tmp_path / "expected", allow_crimes=True))
    assert read_json(found / "config.json")["model_type"] == "llama"


# ---------------------------------------------------------------------------------------------------------------
# Options


def test_mergekits_options_are_taken(models: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """All of the installed one; those without a meaning are named in one line."""
    from mergekit.scripts.run_yaml import main as theirs

    values = {"out-shard-size": "20K", "random-seed": "3", "num-threads": "2", "write-threads": "1", "device": "cpu"}
    options = []
    for parameter in theirs.params:
        name = max(parameter.opts, key=len)
        if name.startswith("-") and name not in ("--quiet", "--no-copy-tokenizer"):
            takes = not (parameter.is_flag or parameter.count)
            options += [name, values.get(name[2:], str(tmp_path / "cache"))] if takes else [name]
    found = merged(models, LINEAR, tmp_path / "found", *options)
    (line,) = warnings_in(capfd.readouterr().err)
    assert line.endswith(": mergekit's, without a meaning here; ignored")
    named = line.partition(": ")[0].split(", ")
    assert {"--cuda", "--lazy-unpickle", "--clone-tensors", "--num-threads"} < set(named)
    assert not {"--allow-crimes", "--out-shard-size", "--random-seed", "--copy-tokenizer"} & set(named)
    shards = sorted(found.glob("*.safetensors"))
    assert len(shards) > 3
    assert all(
        sum(t.nbytes for t in load_file(file).values()) <= 20_000 or len(load_file(file)) == 1 for file in shards
    )
    assert (found / "tokenizer.json").exists() and (found / "README.md").exists()


def test_tokenizer_card_and_progress_can_be_left_out(
    models: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = merged(models, LINEAR, tmp_path / "out", "--no-copy-tokenizer", "--no-write-model-card", "--quiet")
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""
    assert {file.name for file in out.iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "evojax_merge.json",
    }  # fmt: skip
    # It is ours all the same.
    assert command("merge", tmp_path / "out.yaml", out, "--overwrite") == 2  # the models lie elsewhere
    merged(models, LINEAR, tmp_path / "out", "--overwrite")
    assert (out / "mergekit_config.yml").read_text() == LINEAR


def test_options_of_mergekits_other_programs_are_named() -> None:
    from mergekit.scripts import bakllama, extract_lora, layershuffle, legacy, moe, multimerge, run_yaml, tokensurgeon

    own = [one for one in cli.commands["merge"].params if not getattr(one, "hidden", False)]
    known = {"--lazy"}.union(*(one.opts for one in (*own, *run_yaml.main.params)))
    tried = 0
    for program in (bakllama, extract_lora, layershuffle, legacy, moe, multimerge, tokensurgeon):
        name = program.__name__.rpartition(".")[2].replace("_", "-").replace("multimerge", "multi")
        for parameter in program.main.params:
            option = max(parameter.opts, key=len)
            if not option.startswith("--") or option in known:
                continue
            line = refusal("merge", "r.yaml", "out", option, *([] if parameter.is_flag else ["1"]))
            assert line.startswith(f"error: {option}"), line
            assert "an option of mergekit" in line and (name in line or parameter.name in ("weight", "fp16")), (
                name,
                line,
            )
            tried += 1
    assert tried > 30


@pytest.mark.parametrize("size", ["0", "5X", "-3", "B", ""])
def test_sizes_that_are_none_are_refused(size: str, tmp_path: Path) -> None:
    assert "500M" in run_here("merge", "recipe.yaml", tmp_path / "out", "--out-shard-size", size, status=2).stderr


# ---------------------------------------------------------------------------------------------------------------
# Chat templates

TURNS = [
    {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Two and\n two?"},
    {"role": "assistant", "content": "Four."}, {"role": "user", "content": "Thanks."},
]  # fmt: skip
# What the makers' own descriptions give for the two turns in the middle.
EXPECTED = {
    "alpaca": "### Instruction:\nTwo and\n two?\n\n### Response:\nFour.\n\n",
    "chatml": "<|im_start|>user\nTwo and\n two?<|im_end|>\n<|im_start|>assistant\nFour.<|im_end|>\n",
    "exaone": "[|system|][|endofturn|]\n[|user|]Two and\n two?\n[|assistant|]Four.[|endofturn|]\n",
    "llama3": "<s><|start_header_id|>user<|end_header_id|>\n\nTwo and\n two?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nFour.<|eot_id|>",
    "mistral": "<s>[INST] Two and\n two? [/INST] Four.</s>",
}


@pytest.mark.parametrize("name", sample(EXPECTED, 2))
def test_named_chat_templates(name: str, models: Path, tmp_path: Path) -> None:
    """The makers' formats, and mergekit's but for white space that the makers' formats do not have."""
    text = f"{LINEAR}chat_template: {name}\n"
    mine = load_tokenizer(merged(models, text, tmp_path / "found"))
    theirs = load_tokenizer(mergekits(models, text, tmp_path / "expected"))
    assert mine.apply_chat_template(TURNS[1:3], tokenize=False) == EXPECTED[name]
    for turns in (TURNS, TURNS[1:], TURNS[1:3]):
        for prompt in (False, True):
            texts = [
                "".join(one.apply_chat_template(turns, tokenize=False, add_generation_prompt=prompt).split())
                for one in (mine, theirs)
            ]
            assert texts[0] == texts[1]


# ---------------------------------------------------------------------------------------------------------------
# Modules

SMALL = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}


def vision_language_models(root: Path) -> None:
    """Two tiny Mistral 3 models, which have a vision tower, `vlm-a` and `vlm-b`."""
    config = transformers.Mistral3Config(
        text_config={**SMALL, "model_type": "mistral", "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 64},
        vision_config={**SMALL, "model_type": "pixtral", "head_dim": 8, "image_size": 28, "patch_size": 14},
    )
    for seed, name in enumerate(("vlm-a", "vlm-b")):
        torch.manual_seed(seed)
        transformers.Mistral3ForConditionalGeneration(config).save_pretrained(root / name)


MODULES = """
merge_method: linear
modules:
  text_decoder:
    slices:
    - sources:
      - {model: vlm-a, layer_range: [0, 2], parameters: {weight: [0.2, 0.9]}}
      - {model: vlm-b, layer_range: [0, 2]}
    - sources: [{model: vlm-b, layer_range: [1, 2]}]
  vision_tower:
    models: [{model: vlm-a}, {model: vlm-b, parameters: {weight: 3}}]
    parameters: {weight: 1}
  multi_modal_projector:
    models: [{model: vlm-b}]
parameters: {weight: 0.5}
dtype: float32
"""


def test_modules_are_merged_each_by_its_own(models: Path, tmp_path: Path) -> None:
    vision_language_models(tmp_path)
    found = merged(tmp_path, MODULES, tmp_path / "found")
    expected = mergekits(tmp_path, MODULES, tmp_path / "expected")
    assert_same_weights(found, expected)
    config = read_json(found / "config.json")
    assert config["text_config"]["num_hidden_layers"] == 3
    assert config["vision_config"]["num_hidden_layers"] == 2
    # A part of the model that no module has would be missing.
    partial = yaml.safe_load(MODULES)
    del partial["modules"]["multi_modal_projector"]
    write_yaml(tmp_path / "partial.yaml", partial)
    assert "modules: none has " in run_here("merge", tmp_path / "partial.yaml", tmp_path / "partial", status=2).stderr
    partial["modules"]["multi_modal_projectr"] = {"models": [{"model": "vlm-b"}]}
    said = run_here("merge", write_yaml(tmp_path / "partial.yaml", partial), tmp_path / "partial", status=2).stderr
    assert (
        "modules.multi_modal_projectr: the models have no tensor of it (did you mean 'multi_modal_projector'?)" in said
    )
    # A name that is none of mergekit's is how tensors' names begin.
    layers = "model.layers"
    modules = f"{{{layers}: {{models: [{{model: a}}]}}, default: {{models: [{{model: b}}]}}}}"
    own = f"merge_method: linear\nmodules: {modules}\n"
    made, a, b = (
        state(one)
        for one in (merged(models, f"{own}parameters: {{weight: 1}}\n", tmp_path / "own"), models / "a", models / "b")
    )
    for name, values in made.items():
        np.testing.assert_array_equal(values, (a if name.startswith(f"{layers}.") else b)[name])


T5_MODULES = """\
merge_method: linear
modules:
  encoder:
    slices:
    - sources: [{model: t5-a, layer_range: [0, 2]}, {model: t5-b, layer_range: [1, 3]}]
    - sources: [{model: t5-a, layer_range: [1, 4]}, {model: t5-b, layer_range: [1, 4]}]
  decoder:
    slices: [{sources: [{model: t5-a, layer_range: [0, 2]}, {model: t5-b, layer_range: [0, 2]}]}]
parameters: {weight: 0.5}
dtype: float32
"""


def in_memory_names(source: Path, target: Path) -> None:
    """A model with the names that transformers has in memory."""
    kind = getattr(transformers, read_json(source / "config.json")["architectures"][0])
    kind.from_pretrained(source).save_pretrained(target, save_original_format=False)


def older_names(source: Path, target: Path) -> None:
    """A model with the names that vision towers had before."""
    shutil.copytree(source, target)
    tensors = load_file(source / "model.safetensors")
    names = {name: name.replace("vision_tower.", "vision_tower.vision_model.") for name in tensors}
    save_file({names[name]: values for name, values in tensors.items()}, target / "model.safetensors", {"format": "pt"})


def qwen_models(root: Path) -> None:
    """Models whose text decoder has no prefix of its own in files, `vlm-a` and `vlm-b`."""
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2, "patch_size": 14}
    text = {**SMALL, "num_key_value_heads": 2, "vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2}
    config = transformers.Qwen2VLConfig(text_config=text, vision_config=vision)
    for seed, name in enumerate(("vlm-a", "vlm-b")):
        torch.manual_seed(seed)
        transformers.Qwen2VLForConditionalGeneration(config).save_pretrained(root / name)


@pytest.mark.parametrize(
    ("build", "rename"),
    [(vision_language_models, in_memory_names), (vision_language_models, older_names), (qwen_models, in_memory_names)],
)
def test_tensors_of_older_and_newer_names_are_one(
    build: Callable[[Path], None], rename: Callable[[Path, Path], None], tmp_path: Path
) -> None:
    """The result has the names of the first model. mergekit refuses such models, or leaves the other's tensors out."""
    build(tmp_path)
    rename(tmp_path / "vlm-b", tmp_path / "vlm-c")

    def merge_of(first: str, second: str) -> dict[str, np.ndarray]:
        text = (
            f"merge_method: linear\nmodels: [{{model: {first}, parameters: {{weight: 1}}}}, {{model: {second}}}]\n"
            "parameters: {weight: 3}\n"
        )
        return state(merged(tmp_path, text, tmp_path / f"{first}-{second}"))

    expected, found = merge_of("vlm-a", "vlm-b"), merge_of("vlm-a", "vlm-c")
    assert expected.keys() == found.keys() == state(tmp_path / "vlm-a").keys() != state(tmp_path / "vlm-c").keys()
    assert_same_tensors(found, expected)
    assert merge_of("vlm-c", "vlm-a").keys() == state(tmp_path / "vlm-c").keys()


def test_an_encoder_and_a_decoder_are_made_of_slices(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A T5's first layers alone have the bias of positions, which stays the first model's where another model gives
    another layer."""
    config = transformers.T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_heads=4, num_layers=4, num_decoder_layers=3,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False,
    )  # fmt: skip
    for seed, name in enumerate(("t5-a", "t5-b")):
        torch.manual_seed(seed)
        transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path / name)
    document = yaml.safe_load(T5_MODULES)
    # mergekit leaves the embedding out.
    document["modules"]["shared"] = {"models": [{"model": "t5-a"}, {"model": "t5-b"}]}
    assert command("merge", write_yaml(tmp_path / "refused.yaml", document), tmp_path / "refused") == 2
    assert "encoder.block.1.layer.0.SelfAttention.relative_attention_bias" in capfd.readouterr().err
    found = merged(tmp_path, yaml.safe_dump(document | {"on_mismatch": "first"}), tmp_path / "found")
    own, expected = state(found), state(mergekits(tmp_path, T5_MODULES, tmp_path / "expected"))
    assert set(own) - set(expected) == {"shared.weight"} and set(expected) < set(own)
    assert_same_tensors({name: own[name] for name in expected}, expected, rtol=1e-6, atol=1e-7)
    model, report = transformers.T5ForConditionalGeneration.from_pretrained(found, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert (model.config.num_layers, model.config.num_decoder_layers) == (5, 2)


# ---------------------------------------------------------------------------------------------------------------
# Tensors of anything


def raw(root: Path, name: str, seed: int, **changes: tuple[int, ...] | None) -> dict[str, torch.Tensor]:
    """A safetensors file of tensors that have no model; `changes`: other shapes, None: not there."""
    shapes = {"one": (3, 4), "two": (5,), "three": (2, 2, 2)} | changes
    torch.manual_seed(seed)
    tensors = {key: torch.randn(shape) for key, shape in shapes.items() if shape is not None}
    save_file(tensors, root / name)
    return tensors


def test_files_of_any_tensors_are_merged_as_by_mergekit_pytorch(tmp_path: Path) -> None:
    for seed, name in enumerate(("base.safetensors", "a.safetensors", "b.safetensors")):
        raw(tmp_path, name, seed)
    text = (
        "merge_method: ties\nbase_model: base.safetensors\nparameters: {density: 0.6}\nmodels:\n"
        "- {model: a.safetensors, parameters: {weight: 0.5}}\n- {model: b.safetensors, parameters: {weight: 0.8}}\n"
    )
    found = merged(tmp_path, text, tmp_path / "found")
    with contextlib.chdir(tmp_path), contextlib.redirect_stderr(io.StringIO()):
        expected = merge_files_by_mergekit(yaml.safe_load(text), tmp_path / "expected")
    assert_same_weights(found, expected)
    assert {file.name for file in found.iterdir()} == {
        "model.safetensors", "README.md", "mergekit_config.yml", "evojax_merge.json",
    }  # fmt: skip


def test_a_file_and_a_model_are_not_merged_unasked(models: Path, tmp_path: Path) -> None:
    (tmp_path / "file.safetensors").symlink_to(models / "b" / "model.safetensors")
    for rows in ("[{model: a}, {model: FILE}]", "[{model: FILE}, {model: a}]"):
        text = f"merge_method: linear\nmodels: {rows}\nparameters: {{weight: 1}}\n"
        recipe = models / "of-a-file.yaml"
        recipe.write_text(text.replace("FILE", str(tmp_path / "file.safetensors")))
        said = refusal("merge", recipe, tmp_path / "out")
        assert "model.safetensors: is of weights alone" in said and "--allow-crimes" in said


def test_a_folder_of_files_without_a_config_is_one_model(tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    first = raw(tmp_path / "parts", "first.safetensors", 0)
    second = {f"{name}.more": values for name, values in raw(tmp_path / "parts", "second.safetensors", 1).items()}
    save_file(second, tmp_path / "parts" / "second.safetensors")
    assert set(open_folder(tmp_path / "parts").entries) == {*first, *second}
    shutil.copy(tmp_path / "parts" / "first.safetensors", tmp_path / "parts" / "third.safetensors")
    with pytest.raises(InputError, match=r"third.safetensors: holds \w+, which first.safetensors holds as well"):
        open_folder(tmp_path / "parts")


MISMATCHED = """
merge_method: {}
base_model: base.safetensors
models: [{{model: a.safetensors}}, {{model: b.safetensors}}]
parameters: {{weight: 0.5}}
"""


@pytest.mark.parametrize("holders", [("a",), ("b",)], ids=str)
def test_what_no_forward_pass_reads_is_left_out_where_not_all_models_have_it(
    holders: tuple[str, ...], models: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A value head that training has left, as mergekit leaves it out; a bias is not."""
    for name in ("a", "b"):
        shutil.copytree(models / name, tmp_path / name)

    def hold(name: str) -> None:
        for holder in holders:
            tensors = load_file(models / holder / "model.safetensors") | {name: torch.ones(48)}
            save_file(tensors, tmp_path / holder / "model.safetensors", {"format": "pt"})

    hold("v_head.summary.weight")
    found = merged(tmp_path, LINEAR, tmp_path / "found")
    (told,) = warnings_in(capfd.readouterr().err)
    assert told.startswith(f"{tmp_path / holders[0]}: v_head.summary.weight: not all models have this")
    assert_same_weights(found, mergekits(tmp_path, LINEAR, tmp_path / "expected"))
    hold("model.layers.0.self_attn.q_proj.bias")
    assert command("merge", tmp_path / "found.yaml", tmp_path / "refused") == 2
    assert "does not hold the same tensors" in capfd.readouterr().err


def test_heads_of_other_trainings_are_left_out_of_any_architecture(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """As mergekit leaves them out; of models that classify, the head of one that is there is none to leave out."""
    config = transformers.PhiConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=16, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    base = random_model(config)
    for model, name in ((base, "a"), (finetune(base, 1), "b")):
        save(model, tmp_path / name)
    file, heads = tmp_path / "b" / "model.safetensors", ("score.weight", "v_head.summary.weight")
    mask = "model.layers.0.attn.bias"
    tables = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4), mask: torch.ones(1, 1, 4, 4)}
    save_file(load_file(file) | {name: torch.ones(2, 16) for name in heads} | tables, file, {"format": "pt"})
    capfd.readouterr()
    found = merged(tmp_path, LINEAR, tmp_path / "found")
    (told,) = warnings_in(capfd.readouterr().err)
    assert told.startswith(f"{tmp_path / 'b'}: {mask}, model.layers.0.self_attn.rotary_emb.inv_freq, score.weight …"), (
        told
    )
    assert_same_weights(found, mergekits(tmp_path, LINEAR, tmp_path / "expected"))
    edit_json(tmp_path / "a/config.json", lambda config: config.update(architectures=["PhiForSequenceClassification"]))
    assert command("merge", tmp_path / "found.yaml", tmp_path / "refused") == 2
    assert ": score.weight; expected the same" in capfd.readouterr().err
    save_file({**load_file(file), mask: torch.ones(16)}, file, {"format": "pt"})
    assert mask in run_here("merge", tmp_path / "found.yaml", tmp_path / "refused", status=2).stderr


def test_tensors_that_not_all_models_have_alike(tmp_path: Path) -> None:
    base = raw(tmp_path, "base.safetensors", 0)
    a = raw(tmp_path, "a.safetensors", 1, two=(6,), four=(2,))
    b = raw(tmp_path, "b.safetensors", 2, three=None)

    def made(on_mismatch: Any, method: str = "task_arithmetic") -> dict[str, np.ndarray]:
        text = MISMATCHED.format(method) + yaml.safe_dump({"on_mismatch": on_mismatch})
        return state(merged(tmp_path, text, tmp_path / f"out{len(list(tmp_path.glob('out*')))}"))

    def arithmetic(name: str, *tuned: dict[str, torch.Tensor]) -> torch.Tensor:
        return base[name] + sum((0.5 * (one[name] - base[name]) for one in tuned), torch.zeros(()))

    expected = {"one": arithmetic("one", a, b), "two": base["two"], "three": base["three"]}
    for name, values in made("first").items():
        np.testing.assert_allclose(values, expected.pop(name), atol=1e-6, err_msg=name)
    assert not expected
    skipped = {"one": arithmetic("one", a, b), "two": arithmetic("two", b), "three": arithmetic("three", a)}
    assert_same_tensors(made("skip"), skipped, rtol=1e-7, atol=1e-6)
    filtered = made([{"filter": "two", "value": "first"}, {"value": "skip"}])
    np.testing.assert_array_equal(filtered["two"], base["two"])
    np.testing.assert_allclose(filtered["three"], skipped["three"], atol=1e-6)
    # Model Stock needs two models besides the base: with one of them a tensor is the base's.
    np.testing.assert_array_equal(made("skip", "model_stock")["three"], base["three"])
    # By default, and where no filter fits, the first tensor ends the merge.
    for rows in (None, [{"filter": "three", "value": "first"}, {"filter": "four", "value": "skip"}]):
        (tmp_path / "recipe.yaml").write_text(MISMATCHED.format("ties") + yaml.safe_dump({"on_mismatch": rows}))
        said = run_here("merge", tmp_path / "recipe.yaml", tmp_path / "refused", status=2).stderr
        assert ("four" in said) if rows is None else ("two has shape [6], but [5]" in said), said
    assert not (tmp_path / "refused").exists()
