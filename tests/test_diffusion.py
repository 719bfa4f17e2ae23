"""Image generators: files of tensors merge as sd-mecha merges them, and diffusers folders are merged and searched."""

import itertools
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
import yaml
from helpers.commands import output_of, run_here
from helpers.files import read_json, write_json, write_lines, write_yaml
from helpers.sampling import ALL, sample
from helpers.searches import open_problem, problem_of
from reference.generators import blocks_of_sd_mecha, diffusers_name, of_sd_mecha, tensor_names
from reference.merging import DIFFUSION
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from tiny_generators import SIZE, file_tensors, make_ddpm, make_sdxl, make_stable_diffusion, save_file_of

from evojax_merge.checkpoints.generator_keys import Blocks, blocks_of
from evojax_merge.checkpoints.pipelines import Pipeline, open_pipeline
from evojax_merge.commands.merge import MergeOptions, write_merge
from evojax_merge.errors import InputError

KINDS = ("sd1", "sdxl", "sd3", "flux")
FUNCTION = """
import numpy as np

def grey(records, images):
    assert images.dtype == np.float32 and images.shape[1:] == (8, 8, 1) and len({r["seed"] for r in records}) > 0
    return -np.abs(images.mean((1, 2, 3)) - 0.4)

def first(records, latents):
    assert latents.shape[1:] == (4, 4, 4) and all("prompt" in record for record in records)
    return latents[:, 0, 0, 0]
"""

JUDGE = """
def darker(record, left, right):
    assert left.shape == right.shape == (8, 8, 1) and 0 <= left.min() <= left.max() <= 1 and "seed" in record
    return "left" if left.mean() < right.mean() else "right"
"""


def merged(recipe: dict[str, Any], out: Path, **options: Any) -> list[str]:
    """Merge, and return the warnings."""
    warnings: list[str] = []
    write_merge([recipe], out, MergeOptions(**options), lambda line: None, warnings.append)
    return warnings


def linear(models: Sequence[Path], weights: Sequence[Any], **more: Any) -> dict[str, Any]:
    rows = [{"model": str(model), "parameters": {"weight": w}} for model, w in zip(models, weights, strict=True)]
    return {"merge_method": "linear", "models": rows} | more


# ---------------------------------------------------------------------------------------------------------------
# Blocks


@pytest.mark.parametrize(("kind", "config"), [("sd1", "sd1-ldm"), ("sdxl", "sdxl-sgm")])
def test_blocks_are_those_of_sd_mecha(kind: str, config: str) -> None:
    assert dict(blocks_of(tensor_names(config)).of) == blocks_of_sd_mecha(kind)


def test_diffusers_names_have_the_same_blocks() -> None:
    names = {name: diffusers_name(name) for name in tensor_names("sdxl-sgm") if "diffusion_model" in name}
    assert sum(name is not None for name in names.values()) > 1500
    expected = {theirs: blocks_of_sd_mecha("sdxl")[name] for name, theirs in names.items() if theirs is not None}
    assert dict(blocks_of(list(expected)).of) == expected


def test_blocks_stand_in_the_order_of_the_network() -> None:
    names = blocks_of(list(file_tensors("sdxl", 0))).names
    assert names == ["BASE", *(f"IN{i:02}" for i in range(9)), "M00", *(f"OUT{i:02}" for i in range(9)), "VAE"]
    flux = blocks_of(list(file_tensors("flux", 0))).names
    assert flux == ["BASE", *(f"double_blocks.{i}" for i in range(12)), *(f"single_blocks.{i}" for i in range(3))]
    sd3 = blocks_of(list(file_tensors("sd3", 0))).names
    assert sd3 == ["BASE", *(f"joint_blocks.{i}" for i in range(12)), "VAE"]
    assert blocks_of(["model.layers.0.mlp.up_proj.weight"]) == Blocks()


# ---------------------------------------------------------------------------------------------------------------
# Single files


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", sample(DIFFUSION, 3))
def test_files_merge_as_sd_mecha_merges_them(kind: str, name: str, tmp_path: Path) -> None:
    files = [save_file_of(kind, k, tmp_path / f"{k}.safetensors") for k in range(3)]
    parameters: dict[str, Any] = {"alpha": 0.4}
    if "tensor_sum" in name:
        parameters = {"width": 0.3, "offset": 0.25}
    if name == "geometric_median":
        parameters = {"eps": 1e-6, "maxiter": 100, "ftol": 1e-20}
    has_base = name in ("add_difference", "train_difference_mask")
    recipe = {
        "merge_method": name, "models": [{"model": str(file)} for file in files[1:]], "parameters": parameters,
    } | ({"base_model": str(files[0])} if has_base else {})  # fmt: skip
    merged(recipe, tmp_path / "out")
    sources, written = [load_file(file) for file in files], load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == sources[1].keys()
    for key, values in written.items():
        if values.dtype == np.int64:
            np.testing.assert_array_equal(values, sources[1][key])
            continue
        expected = of_sd_mecha(name, [source[key] for source in sources], parameters)
        np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-6, err_msg=key)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_a_file_stays_a_file_with_its_keys_dtypes_and_metadata(dtype: Any, tmp_path: Path) -> None:
    files = [save_file_of("sd1", k, tmp_path / f"{k}.safetensors", dtype) for k in range(2)]
    merged(linear(files, [0.5, 0.5]), tmp_path / "out", max_shard_bytes=1000)
    assert sorted(path.name for path in (tmp_path / "out").glob("*.safetensors*")) == ["model.safetensors"]
    with safe_open(files[0], "np") as first, safe_open(tmp_path / "out" / "model.safetensors", "np") as result:
        # A hash of the first model's tensors is not one of the merge's.
        assert result.metadata() == {"format": "pt", "modelspec.title": "number 0"}
        assert set(result.keys()) == set(first.keys())
        for key in first.keys():  # noqa: SIM118
            assert result.get_slice(key).get_dtype() == first.get_slice(key).get_dtype()


def test_a_file_is_merged_into_a_folder_and_where_another_has_fewer_tensors_if_the_recipe_says_so(
    tmp_path: Path,
) -> None:
    files = [save_file_of("sd1", k, tmp_path / f"{k}.safetensors") for k in range(2)]
    recipe = linear(files, [0.5, 0.5])
    for name in ("out.safetensors", "out.ckpt"):
        with pytest.raises(InputError, match=r"and a folder is written \(with model\.safetensors in it\)"):
            merged(recipe, tmp_path / name)
    with pytest.raises(InputError, match=r"has no config\.json; a GGUF file is made of language models"):
        merged(recipe, tmp_path / "out.gguf")
    lacking = load_file(files[1])
    missing = next(name for name in lacking if name.startswith("first_stage_model."))
    save_file({name: values for name, values in lacking.items() if name != missing}, files[1])
    with pytest.raises(InputError, match=r"the same tensors as .*; expected the same, or on_mismatch: first"):
        merged(recipe, tmp_path / "out")
    merged(recipe | {"on_mismatch": "first"}, tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    np.testing.assert_array_equal(written[missing], load_file(files[0])[missing])


def test_recipes_set_values_by_block(tmp_path: Path) -> None:
    """A filter that is a block's name means that block alone, and a gradient goes over the numbered blocks."""
    for kind, wanted, within in (("sd1", "OUT11", "output_blocks.11"), ("flux", "double_blocks.1", "double_blocks.1.")):
        files = [save_file_of(kind, k, tmp_path / f"{kind}{k}.safetensors") for k in range(2)]
        rows = [{"filter": wanted, "value": 1.0}, {"filter": "BASE", "value": 0.5}, {"value": 0.0}]
        recipe = {"merge_method": "weighted_sum", "models": [{"model": str(file)} for file in files]}
        merged(recipe | {"parameters": {"alpha": rows}}, tmp_path / kind)
        a, b, written = (load_file(file) for file in (*files, tmp_path / kind / "model.safetensors"))
        for key, block in blocks_of(list(a)).of.items():
            share = 1.0 if within in key or ".out." in key else 0.5 if block == "BASE" else 0.0
            if a[key].dtype == np.float32:
                np.testing.assert_allclose(written[key], a[key] + share * (b[key] - a[key]), atol=1e-6, err_msg=key)
    values = [i / 24 for i in range(25)]
    files = [tmp_path / f"sd1{k}.safetensors" for k in range(2)]
    recipe = {"merge_method": "weighted_sum", "models": [{"model": str(file)} for file in files]}
    merged(recipe | {"parameters": {"alpha": values}}, tmp_path / "gradient")
    a, b, written = (load_file(file) for file in (*files, tmp_path / "gradient" / "model.safetensors"))
    key = "model.diffusion_model.output_blocks.5.0.in_layers.2.weight"
    np.testing.assert_allclose(written[key], a[key] + 18 / 24 * (b[key] - a[key]), atol=1e-6)


@pytest.mark.parametrize(
    ("wanted", "meant"), [("OUT15", "'OUT11'"), ("in04", "'IN04'"), ("mid_block", "known: BASE, IN00"), ("M0", "")]
)
def test_a_block_that_there_is_not_is_named_with_those_that_there_are(wanted: str, meant: str, tmp_path: Path) -> None:
    files = [save_file_of("sd1", k, tmp_path / f"{k}.safetensors") for k in range(2)]
    rows = [{"filter": wanted, "value": 1.0}, {"value": 0.0}]
    recipe = {"merge_method": "weighted_sum", "models": [{"model": str(file)} for file in files]}
    (warning,) = merged(recipe | {"parameters": {"alpha": rows}}, tmp_path / "out")
    assert f"alpha: the filter '{wanted}' means no tensor" in warning and meant in warning
    with pytest.raises(InputError, match="means no tensor"):
        merged(recipe | {"parameters": {"alpha": rows}}, tmp_path / "strict", strict=True)
    assert not (tmp_path / "strict").exists()


# ---------------------------------------------------------------------------------------------------------------
# Diffusers folders


@pytest.fixture(scope="module")
def ddpm(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three generators without texts: a base, and two that differ from it, one with another scheduler. Read only."""
    folder = tmp_path_factory.mktemp("ddpm")
    base = make_ddpm(folder / "zero", 0)
    models = [base, make_ddpm(folder / "one", 1, base=base), make_ddpm(folder / "two", 2, steps=500, base=base)]
    (folder / "functions.py").write_text(FUNCTION)
    return models


@pytest.fixture(scope="module")
def stable(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two generators with texts. Read only."""
    folder = tmp_path_factory.mktemp("stable")
    models = [make_stable_diffusion(folder / name, k) for k, name in enumerate(("one", "two"))]
    (folder / "functions.py").write_text(FUNCTION)
    write_lines(folder / "prompts.jsonl", [{"prompt": text} for text in ("a cat", "a dog", "a sea", "a tree")])
    return models


def unet(folder: Path) -> dict[str, np.ndarray]:
    return dict(load_file(folder / "unet" / "diffusion_pytorch_model.safetensors"))


def test_folders_merge_and_diffusers_opens_the_result(ddpm: list[Path], tmp_path: Path) -> None:
    from diffusers import DDPMPipeline

    _, one, two = ddpm
    weights = [[{"filter": "IN00", "value": value}, {"value": other}] for value, other in ((1.0, 0.25), (0.0, 0.75))]
    (warning,) = merged(linear([one, two], weights), tmp_path / "out")
    assert "scheduler: not as in" in warning and str(one) in warning
    pipeline = DDPMPipeline.from_pretrained(tmp_path / "out")
    assert pipeline.scheduler.config.num_train_timesteps == 1000
    a, b = unet(one), unet(two)
    for name, tensor in pipeline.unet.state_dict().items():
        share = 0.0 if name.startswith("conv_in.") else 0.75
        np.testing.assert_allclose(tensor.numpy(), (1 - share) * a[name] + share * b[name], atol=1e-6, err_msg=name)
    for file in ("unet/config.json", "scheduler/scheduler_config.json", "model_index.json"):
        assert read_json(tmp_path / "out" / file) == read_json(one / file), file
    run_here("merge", write_recipe(tmp_path, linear([one, two], [0.5, 0.5])), tmp_path / "out", "--overwrite")


def write_recipe(folder: Path, recipe: dict[str, Any]) -> Path:
    return write_yaml(folder / "recipe.yaml", recipe)


def test_a_filter_of_one_merged_component_is_none_of_the_others(stable: list[Path], tmp_path: Path) -> None:
    weight = [{"filter": "token_embedding", "value": 1.0}, {"filter": "IN00", "value": 0.25}, {"value": 0.5}]
    recipe = linear(stable, [weight, 0.5], components={"text_encoder": "merge", "unet": "merge"})
    assert not any("means no tensor" in line for line in merged(recipe, tmp_path / "out", strict=True))
    recipe["models"][0]["parameters"]["weight"].insert(0, {"filter": "in99", "value": 0})
    with pytest.raises(InputError, match="the filter 'in99' means no tensor"):
        merged(recipe, tmp_path / "none", strict=True)


def test_components_are_merged_or_kept_from_a_named_model(stable: list[Path], tmp_path: Path) -> None:
    one, two = stable
    recipe = linear([one, two], [0.5, 0.5], components={"text_encoder": str(two), "vae": "merge"})
    assert merged(recipe, tmp_path / "out") == []
    files = {"vae": "diffusion_pytorch_model", "unet": "diffusion_pytorch_model", "text_encoder": "model"}
    for name, stem in files.items():
        a, b, written = (load_file(folder / name / f"{stem}.safetensors") for folder in (one, two, tmp_path / "out"))
        assert written.keys() == a.keys()
        for key in written:
            expected = b[key] if name == "text_encoder" else (a[key] + b[key]) / 2
            np.testing.assert_allclose(written[key], expected, atol=1e-6)
    assert (tmp_path / "out" / "tokenizer" / "tokenizer.json").read_bytes() == (
        two / "tokenizer" / "tokenizer.json"
    ).read_bytes()


@pytest.mark.parametrize("sharded", [False, True])
def test_variants_and_safety_checkers_of_the_hub_are_opened(sharded: bool, stable: list[Path], tmp_path: Path) -> None:
    """Folders that hold the files of one variant alone, with a component that is in diffusers' pipeline."""
    copies = [Path(shutil.copytree(folder, tmp_path / folder.name)) for folder in stable]
    for folder in copies if sharded else ():
        for file in list(folder.rglob("*.safetensors")):
            tensors, names = load_file(file), [f"{file.stem}.fp16-0000{k}-of-00002.safetensors" for k in (1, 2)]
            file.unlink()
            for k, name in enumerate(names):
                save_file(dict(list(tensors.items())[k::2]), file.with_name(name), {"format": "pt"})
            places = {key: names[i % 2] for i, key in enumerate(tensors)}
            index = {"metadata": {"total_size": 1}, "weight_map": places}
            write_json(file.with_name(f"{file.stem}.safetensors.index.fp16.json"), index)
    for folder in copies:
        for file in [] if sharded else folder.rglob("*.safetensors"):
            file.rename(file.with_name(f"{file.stem}.fp16.safetensors"))
        (folder / "safety_checker").mkdir()
        classes = ["stable_diffusion", "StableDiffusionSafetyChecker"]
        write_json(folder / "model_index.json", read_json(folder / "model_index.json") | {"safety_checker": classes})
    merged(linear(copies, [0.5, 0.5]), tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*fp16*")) and (tmp_path / "out" / "safety_checker").is_dir()
    for folder in (copies[0], tmp_path / "out"):
        assert open_pipeline(Pipeline(folder), {}).safety_checker is None


LORA = {
    "unet": (
        "up_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
        "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_v",
    ),
    "text_encoder": ("encoder.layers.0.self_attn.q_proj", "encoder.layers.0.self_attn.out_proj"),
}


def weights_of(folder: Path, component: str) -> dict[str, np.ndarray]:
    return dict(load_file(next((folder / component).glob("*.safetensors"))))


def save_lora(base: Path, file: Path, keys: str) -> dict[str, np.ndarray]:
    """Save a LoRA of rank 2 and alpha 3 by the names of diffusers or of kohya's trainer; the change of each weight, by
    `component.weight`."""
    rng = np.random.default_rng(0)
    tensors: dict[str, np.ndarray] = {}
    changes = {}
    for component, modules in LORA.items():
        state = weights_of(base, component)
        for module in modules:
            outputs, inputs = state[f"{module}.weight"].shape
            down, up = (rng.normal(size=size).astype(np.float32) for size in ((2, inputs), (outputs, 2)))
            changes[f"{component}.{module}.weight"] = up @ down * (1.5 if keys == "kohya" else 1.0)
            # Trainers name the module that text encoders had around their layers.
            module = module if component == "unet" else f"text_model.{module}"
            if keys == "kohya":
                name = f"lora_{'te' if component == 'text_encoder' else 'unet'}_{module.replace('.', '_')}"
                tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
                tensors[f"{name}.alpha"] = np.array(3.0, np.float32)
            else:
                tensors |= {f"{component}.{module}.lora_A.weight": down, f"{component}.{module}.lora_B.weight": up}
    save_file(tensors, file)
    return changes


@pytest.mark.parametrize("keys", ["diffusers", "kohya"])
def test_a_lora_is_fused_into_the_generator_before_it(keys: str, stable: list[Path], tmp_path: Path) -> None:
    one, two = stable
    changes = save_lora(one, tmp_path / "lora.safetensors", keys)
    fused = f"{one}+{tmp_path / 'lora.safetensors'}"
    rows = [{"model": model, "parameters": {"weight": 0.5}} for model in (fused, str(two))]
    recipe = {"merge_method": "linear", "models": rows, "components": {"unet": "merge", "text_encoder": fused}}
    merged(recipe, tmp_path / "out")
    for component in LORA:
        a, b, written = (weights_of(folder, component) for folder in (one, two, tmp_path / "out"))
        assert written.keys() == a.keys()
        for name, values in written.items():
            adapted = a[name] + changes.get(f"{component}.{name}", 0.0)
            expected = (adapted + b[name]) / 2 if component == "unet" else adapted
            np.testing.assert_allclose(values, expected, atol=1e-5, err_msg=name)
    document = config(tmp_path, [Path(fused), two], tasks=[{
        "name": "first", "kind": "image_generation", "function": str(one.parent / "functions.py:first"),
        "file": str(one.parent / "prompts.jsonl"), "inputs": "latents", "steps": 1, "heldout": 0.5,
    }])  # fmt: skip

    backend = problem_of(tmp_path / "config.yaml", document).backend
    name = f"unet.{LORA['unet'][0]}.weight"
    expected = weights_of(one, "unet")[name.removeprefix("unet.")] + changes[name]
    np.testing.assert_allclose(np.asarray(backend.merge.tree.source(0)[name]), expected, atol=1e-5)


@pytest.mark.parametrize("fault", ["other", "more", "none", "pickle", "takes none"])
def test_a_lora_that_does_not_fit_is_refused_in_a_line(
    fault: str, stable: list[Path], ddpm: list[Path], tmp_path: Path
) -> None:
    file, base = tmp_path / "lora.safetensors", stable[0]
    factors = {"lora_A.weight": np.zeros((2, 8), np.float32), "lora_B.weight": np.zeros((8, 2), np.float32)}
    modules = (LORA["unet"][0], "mid_block.no.such.to_q") if fault == "more" else ("mid_block.no.such.to_q",)
    save_file({f"unet.{one}.{name}": values for one in modules for name, values in factors.items()}, file)
    message = "Target modules {'mid_block.no.such.to_q'} not found in the base model"
    if fault == "more":
        message = "lora.safetensors has factors of 2 modules, of which"
    elif fault == "none":
        save_file({"weight": np.zeros(1, np.float32)}, file)
        message = "holds no factors of a LoRA"
    elif fault == "pickle":
        file = file.rename(tmp_path / "lora.bin")
        message = "expected a LoRA in safetensors"
    elif fault == "takes none":
        base, message = ddpm[0], "a DDPMPipeline takes no LoRA"
    with pytest.raises(InputError) as caught:
        merged(linear([Path(f"{base}+{file}"), stable[1]], [0.5, 0.5]), tmp_path / "out")
    assert message in str(caught.value) and "\n" not in str(caught.value)


# ---------------------------------------------------------------------------------------------------------------
# Search


def config(folder: Path, models: Sequence[Path], **changes: Any) -> dict[str, Any]:
    task = {
        "name": "grey", "kind": "image_generation", "function": str(models[0].parent / "functions.py:grey"),
        "images": 6, "steps": 2, "heldout": 0.5,
    }  # fmt: skip
    document = {
        "backend": "torch", "parents": list(map(str, models)),
        "space": {"method": "linear", "parameters": {"weight": {}}},
        "tasks": [task], "search": {"generations": 2, "population": 4}, "seed": 1, "evaluation": {"chunk": 1},
    } | changes  # fmt: skip
    write_yaml(folder / "config.yaml", document)
    return document


def scores_by_diffusers(model: Path, seeds: Sequence[int]) -> np.ndarray:
    """The scores of a generator's pictures, by diffusers alone."""
    from diffusers import DDPMPipeline

    pipeline = DDPMPipeline.from_pretrained(model)
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    images = pipeline(len(seeds), generators, num_inference_steps=2, output_type="np").images
    assert images.shape == (len(seeds), SIZE, SIZE, 1)
    return -np.abs(images.mean((1, 2, 3)) - 0.4)


def test_generators_are_planned_searched_resumed_and_exported(ddpm: list[Path], tmp_path: Path) -> None:

    document, run, whole = config(tmp_path, ddpm[1:]), tmp_path / "run", tmp_path / "whole"
    file = tmp_path / "config.yaml"
    output = output_of("search", file, "--out", whole)
    assert output.count("DDPMPipeline: draws pictures of one candidate at a time") == 1
    assert output.count("scheduler: not as in") == 1 and "plan: " in output
    run_here("search", file, "--out", run, "--set", "search.generations=1")
    run_here("search", file, "--out", run, "--resume")
    assert (run / "history.jsonl").read_bytes() == (whole / "history.jsonl").read_bytes()
    result = read_json(run / "result.json")
    assert [row["role"] for row in result["table"]] == ["parent", "parent", "uniform", "winner"]

    # Every model of the table has the scores that its pictures have, drawn by diffusers alone from the same noise.
    problem = problem_of(file, document)
    heldout, searched = problem.splits.heldout[0], problem.splits.search[0]
    seeds = [heldout.seeds[i] for i in heldout.indices]
    assert not set(seeds) & {searched.seeds[i] for i in searched.indices}
    model = run / "best" / "model"
    # The second parent draws by the first one's scheduler, as every candidate does.
    other = shutil.copytree(ddpm[2], tmp_path / "other")
    shutil.copytree(ddpm[1] / "scheduler", other / "scheduler", dirs_exist_ok=True)
    for number, folder in ((0, ddpm[1]), (1, other), (3, model)):
        expected = scores_by_diffusers(folder, seeds).mean()
        assert result["table"][number]["heldout_scores"]["grey/score"] == pytest.approx(expected, abs=1e-5)

    # `evaluate` draws the same pictures, of the run's winner and of any folder.
    run_here(
        "evaluate", run, model, ddpm[1], "--tasks", run / "config.yaml", "--split", "heldout", "--json",
        tmp_path / "scores.json",
    )  # fmt: skip
    scores = [row["scores"]["grey/score"] for row in read_json(tmp_path / "scores.json")]
    kept = [result["table"][number]["heldout_scores"]["grey/score"] for number in (3, 3, 0)]
    assert scores == pytest.approx(kept, abs=1e-5)

    # The sheet of pictures lies beside the winner, and stands in its card and in the run's page.
    assert (model / "contact_sheet.png").stat().st_size > 100
    assert "![contact sheet](contact_sheet.png)" in (model / "README.md").read_text()
    assert "data:image/png;base64," in (run / "report.html").read_text()
    assert "library_name: diffusers" in (model / "README.md").read_text()

    # Its recipe gives it.
    run_here("merge", next(run.glob("best/*.y*ml")), tmp_path / "again")
    for name, tensor in unet(tmp_path / "again").items():
        np.testing.assert_allclose(tensor, unet(model)[name], atol=1e-6, err_msg=name)
    if ALL:
        code = "import sys, diffusers; diffusers.DDPMPipeline.from_pretrained(sys.argv[1]); print(len(sys.argv))"
        done = subprocess.run([sys.executable, "-c", code, str(model)], capture_output=True, text=True)
        assert done.stdout.strip() == "2"


def test_pictures_that_are_compared_are_searched_replayed_and_shown(ddpm: list[Path], tmp_path: Path) -> None:
    """The judge prefers darker pictures, and is asked once."""
    (tmp_path / "judge.py").write_text(JUDGE)
    task = {
        "name": "dark", "kind": "human_images", "judge": "judge.py:darker", "images": 6, "steps": 2, "heldout": 0.5,
        "votes": 14, "heldout_votes": 3,
    }  # fmt: skip
    config(tmp_path, ddpm[1:], tasks=[task], search={"generations": 2, "population": 4})
    file, run, replay = tmp_path / "config.yaml", tmp_path / "run", tmp_path / "replay"
    run_here("search", file, "--out", run)
    rows = {row["name"]: row for row in read_json(run / "result.json")["table"]}
    assert rows.pop("evolved linear")["heldout_scores"]["dark/preference"] == 0
    assert len(rows) == 3 and all(-1 <= row["heldout_scores"]["dark/preference"] <= 1 for row in rows.values())
    assert (run / "best" / "model" / "contact_sheet.png").exists()
    votes = (run / "votes.jsonl").read_text()
    assert votes.count('"vote"') >= 14
    (tmp_path / "judge.py").write_text(JUDGE.replace("<", ">"))
    run_here("judge", file, "--out", replay, "--replay", run / "votes.jsonl")
    assert (replay / "votes.jsonl").read_text() == votes
    assert (replay / "history.jsonl").read_bytes() == (run / "history.jsonl").read_bytes()


def test_prompts_latents_and_the_groups_of_evosdxl(stable: list[Path], tmp_path: Path) -> None:
    """The U-Net alone, its attention and the rest; latents of prompts; text encoder of the second model."""

    folder = stable[0].parent
    task = {
        "name": "first", "kind": "image_generation", "function": str(folder / "functions.py:first"),
        "file": str(folder / "prompts.jsonl"), "inputs": "latents", "steps": 2, "guidance": 3.0, "heldout": 0.5,
    }  # fmt: skip
    document = config(
        tmp_path, stable, tasks=[task], components={"text_encoder": str(stable[1])},
        space={"method": "linear", "layers_per_group": "all", "components": ["attention", "other"]},
    )  # fmt: skip
    file = tmp_path / "config.yaml"
    problem = problem_of(file, document)
    assert problem.facts.space.groups == ("unet other", "unet attention")
    splits = problem.prepare()
    assert problem.facts.space.dims == 4 and splits.search[0].size == 2
    generator, backend = problem.backend.generator, problem.backend
    encoder = load_file(stable[1] / "text_encoder" / "model.safetensors")
    state = generator.pipeline.text_encoder.state_dict()
    for name, tensor in encoder.items():
        np.testing.assert_array_equal(state[name].numpy(), tensor)
    scores = splits.search[0].function(backend.merge.tree.source(0), *splits.search[0].rows)
    assert scores.shape == (2,) and np.isfinite(scores).all()


@pytest.mark.parametrize(
    ("together", "parts"),
    sample(itertools.product([1, 2, "all"], [["attention", "other"], ["attention+other"]]), 2),
)
def test_the_recipe_of_a_search_gives_what_it_scored(
    together: Any, parts: list[str], stable: list[Path], tmp_path: Path
) -> None:
    folder = stable[0].parent
    task = {
        "name": "first", "kind": "image_generation", "function": str(folder / "functions.py:first"),
        "file": str(folder / "prompts.jsonl"), "inputs": "latents", "steps": 2, "heldout": 0.5,
    }  # fmt: skip
    space = {"method": "linear", "layers_per_group": together, "components": parts}
    components = {"text_encoder": "merge"}
    document = config(tmp_path, stable, tasks=[task], space=space, components=components)
    backend = problem_of(tmp_path / "config.yaml", document).backend
    genome = np.random.default_rng(0).uniform(0.1, 0.9, backend.facts.space.dims).astype(np.float32)
    run_here("merge", write_yaml(tmp_path / "recipe.yaml", backend.recipe(genome)), tmp_path / "again")
    expected = {name: np.asarray(tensor) for name, tensor in backend.merged(genome).items()}
    for component, file in (("unet", "diffusion_pytorch_model"), ("text_encoder", "model")):
        for name, tensor in load_file(tmp_path / "again" / component / f"{file}.safetensors").items():
            if f"{component}.{name}" in expected:
                np.testing.assert_allclose(tensor, expected.pop(f"{component}.{name}"), atol=1e-6, err_msg=name)
    assert not expected


def test_the_config_of_evosdxl_is_planned_on_folders_of_its_form(tmp_path: Path) -> None:
    """configs/evosdxl.yaml beside four tiny models of SDXL's form: eight numbers, and the Japanese text encoders."""

    file = Path(shutil.copy(Path(__file__).parents[1] / "configs" / "evosdxl.yaml", tmp_path))
    for seed, name in enumerate(yaml.safe_load(file.read_text())["parents"]):
        make_sdxl(tmp_path / name, seed)
    (tmp_path / "scores.py").write_text("def score(records, images):\n    return images.mean((1, 2, 3))\n")
    write_lines(tmp_path / "prompts.jsonl", [{"prompt": letter * 3} for letter in "abcdefgh"])
    assert "StableDiffusionXLPipeline: draws pictures" in output_of("plan", file)
    problem = open_problem(file)
    assert problem.facts.space.dims == 8
    assert problem.facts.space.groups == ("unet other", "unet attention")
    for name in ("text_encoder", "text_encoder_2"):
        written = load_file(tmp_path / "jsdxl" / name / "model.safetensors")
        state = getattr(problem.backend.generator.pipeline, name).state_dict()
        for key, tensor in written.items():
            np.testing.assert_array_equal(state[key].numpy(), tensor)


# ---------------------------------------------------------------------------------------------------------------
# Bad input


@pytest.mark.parametrize("fault", ["scheme", "pickle", "index", "unknown", "nothing", "model", "kinds", "slices"])
def test_what_cannot_be_merged_is_refused_in_a_line(fault: str, ddpm: list[Path], tmp_path: Path) -> None:
    _, one, two = ddpm
    models, more, message = [one, two], {}, ""
    if fault == "scheme":
        models = [save_file_of(kind, 0, tmp_path / f"{kind}.safetensors") for kind in ("sd1", "sdxl")]
        message = "its tensors have the names of SDXL, but those of"
    elif fault == "pickle":
        models = [save_file_of("sd1", 0, tmp_path / "a.safetensors"), tmp_path / "b.ckpt"]
        models[1].write_bytes(b"PK")
        message = "b.ckpt: is a pickle, which can run code when it is read; expected a safetensors file"
    elif fault == "index":
        models = [one, shutil.copytree(two, tmp_path / "two")]
        (models[1] / "model_index.json").unlink()
        message = "has a folder unet/ but no model_index.json"
    elif fault == "unknown":
        more, message = {"components": {"unte": "merge"}}, "components.unte: no model has it (did you mean 'unet'?)"
    elif fault == "nothing":
        more, message = {"components": {"unet": str(one)}}, "none is merged"
    elif fault == "model":
        more, message = {"components": {"scheduler": "elsewhere"}}, "expected merge, or one of the models"
    elif fault == "kinds":
        models = [one, save_file_of("sd1", 0, tmp_path / "a.safetensors")]
        message = "is no diffusers folder, as the others are"
    recipe = linear(models, [0.5, 0.5], **more)
    if fault == "slices":
        sources = [{"model": str(model), "layer_range": [0, 1], "parameters": {"weight": 1}} for model in models]
        recipe, message = {"merge_method": "linear", "slices": [{"sources": sources}]}, "is for language models"
    with pytest.raises(InputError) as caught:
        merged(recipe, tmp_path / "out")
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("fault", ["prompts", "guidance", "latents", "task", "parts", "function", "missing", "random"])
def test_what_cannot_be_searched_is_refused_in_a_line(
    fault: str, ddpm: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    document = config(tmp_path, ddpm[:2])
    task: dict[str, Any] = document["tasks"][0]
    if fault == "prompts":
        del task["images"]
        task["file"], message = str(write_lines(tmp_path / "p.jsonl", [{"prompt": "a"}] * 4)), "takes no prompt"
    elif fault == "guidance":
        task["guidance"], message = 2.0, "a DDPMPipeline takes no guidance_scale"
    elif fault == "latents":
        (tmp_path / "f.py").write_text("def f(records, latents):\n    return [0] * len(records)\n")
        task |= {"inputs": "latents", "function": f"{tmp_path}/f.py:f"}
        message = "a DDPMPipeline has no latents"
    elif fault == "task":
        (tmp_path / "f.py").write_text("def f(model):\n    return 0.0\n")
        document["tasks"] = [{"name": "t", "kind": "arrays", "function": f"{tmp_path}/f.py:f"}]
        message = "asks no image generator; expected kind: image_generation or human_images"
    elif fault == "parts":
        document["space"]["components"], message = ["attention", "mlp"], "expected attention and other"
    elif fault == "function":
        (tmp_path / "f.py").write_text("def f(images):\n    return 0\n")
        task["function"], message = f"{tmp_path}/f.py:f", "inputs: images calls it with (records, images)"
    elif fault == "missing":
        find = "evojax_merge.backends.torch.opening.find_spec"
        monkeypatch.setattr(find, lambda name: None if name == "diffusers" else name)
        message = "torch: needs diffusers; pip install 'evojax-merge[diffusion]'"
    else:
        from evojax_merge.backends.torch.generator import Generator

        rng = np.random.default_rng(0)
        monkeypatch.setattr(Generator, "draw", lambda *_: rng.normal(size=(1, 8, 8, 1)).astype(np.float32))
        message = "draws another picture from the same noise"
    file = tmp_path / "config.yaml"
    with pytest.raises(InputError) as caught:
        problem_of(file, document).prepare()
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_components_are_for_diffusers_folders(tmp_path: Path) -> None:
    files = [save_file_of("sd1", k, tmp_path / f"{k}.safetensors") for k in range(2)]
    with pytest.raises(InputError, match="components: is for diffusers folders"):
        merged(linear(files, [0.5, 0.5], components={"unet": "merge"}), tmp_path / "out")
