"""`evojax-merge inspect`: every figure against NumPy in float64, the base of families, and what it says of models that
do not fit each other."""

import itertools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.commands import command, run_here
from helpers.families import Family
from helpers.files import edit_json, read_json, write_json
from helpers.models import finetune, random_model, save, state, tiny_config, word_tokenizer, words
from safetensors.torch import load_file, save_file
from tiny_generators import make_ddpm
from transformers import BertConfig, BertForSequenceClassification, BertModel, ViTConfig, ViTForImageClassification

from evojax_merge.checkpoints.adapter_writer import AdapterWriter
from evojax_merge.inspection.weights import find_base
from evojax_merge.report.inspection import distinct
from evojax_merge.system.data_packages import cache_folder
from evojax_merge.zoo import smollm2

LAYER_COMPONENTS = {"self_attn": "attention", "mlp": "mlp", "layernorm": "norm"}
OUTSIDE = {"model.embed_tokens.weight": "embed", "model.norm.weight": "final_norm", "lm_head.weight": "head"}


@pytest.fixture
def inspect(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Run the command; the JSON that it writes."""

    def call(*models: object, options: tuple[str, ...] = ()) -> dict[str, Any]:
        file = tmp_path / "report.json"
        assert command("inspect", *models, "--json", file, *options) == 0
        document: dict[str, Any] = read_json(file)
        return document

    return call


def kinds(report: dict[str, Any]) -> set[str]:
    return {finding["kind"] for finding in report["findings"]}


def sentence(report: dict[str, Any], kind: str) -> str:
    return next(finding["text"] for finding in report["findings"] if finding["kind"] == kind)


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


def place(name: str) -> tuple[int | None, str]:
    """The layer and component of a Llama's tensor."""
    if name in OUTSIDE:
        return None, OUTSIDE[name]
    return int(name.split(".")[2]), next(v for k, v in LAYER_COMPONENTS.items() if k in name)


# ---------------------------------------------------------------------------------------------------------------
# The figures


def check_figures(report: dict[str, Any], folders: list[Path], base: int) -> None:
    """Every figure of a report about models of one kind, against NumPy."""
    weights = [{name: w.astype(np.float64) for name, w in state(folder).items()} for folder in folders]
    names, flat = list(weights[0]), []
    for tensors in weights:
        flat.append(np.concatenate([tensors[name].ravel() for name in names]))
    for pair, (i, j) in zip(report["pairs"], itertools.combinations(range(len(folders)), 2), strict=True):
        cosines = [
            np.vdot(weights[i][name], weights[j][name])
            / (np.linalg.norm(weights[i][name]) * np.linalg.norm(weights[j][name]))
            for name in names
            if weights[i][name].ndim > 1
        ]
        assert pair["cosine"] == pytest.approx(np.median(cosines), rel=1e-9)
        norm = np.sqrt((flat[i] @ flat[i] + flat[j] @ flat[j]) / 2)
        assert pair["relative_distance"] == pytest.approx(np.linalg.norm(flat[i] - flat[j]) / norm, rel=1e-9)
        assert pair["equal_share"] == pytest.approx(np.mean(flat[i] == flat[j]), abs=1e-12)
        assert pair["tensors"] == len(names)
    parents = [number for number in range(len(folders)) if number != base]
    deltas = [flat[parent] - flat[base] for parent in parents]
    for vector, parent, delta in zip(report["task_vectors"], parents, deltas, strict=True):
        assert vector["norm"] == pytest.approx(np.linalg.norm(delta), rel=1e-9)
        assert vector["relative_norm"] == pytest.approx(np.linalg.norm(delta) / np.linalg.norm(flat[base]), rel=1e-9)
        assert vector["unchanged"] == pytest.approx(np.mean(delta == 0), abs=1e-12)
        cosines = [delta @ other / (np.linalg.norm(delta) * np.linalg.norm(other)) for other in deltas]
        assert list(vector["cosines"].values()) == pytest.approx(cosines, abs=1e-9)
        by_place: dict[tuple[int | None, str], list[str]] = {}
        for name in names:
            by_place.setdefault(place(name), []).append(name)
        assert {(row["layer"], row["component"]) for row in vector["by_layer"]} == set(by_place)
        for row in vector["by_layer"]:
            inside = by_place[row["layer"], row["component"]]
            change = np.sqrt(sum(np.sum((weights[parent][name] - weights[base][name]) ** 2) for name in inside))
            of_base = np.sqrt(sum(np.sum(weights[base][name] ** 2) for name in inside))
            assert row["relative_norm"] == pytest.approx(change / of_base, rel=1e-9)
    signs = np.sign(deltas)
    contested = (signs != 0).sum(axis=0) > 1
    conflicts = (signs > 0).any(axis=0) & (signs < 0).any(axis=0)
    counts = report["sign_conflicts"]
    assert (counts["size"], counts["contested"]) == (flat[0].size, contested.sum())
    assert counts["conflicts"] == conflicts.sum() and counts["share"] == pytest.approx(
        conflicts.sum() / contested.sum()
    )


def test_every_figure_is_that_of_numpy(inspect: Callable[..., Any], tmp_path: Path) -> None:
    """Three parents, one of which changes some tensors alone, in pieces that do not divide the tensors."""
    model = random_model(tiny_config(vocab_size=71))
    folders = [save(model, tmp_path / "base")]
    folders += [save(finetune(model, k, scale=0.01 * k), tmp_path / f"p{k}") for k in (1, 2, 3)]
    original = load_file(folders[0] / "model.safetensors")
    change_tensors(folders[1], lambda t: t.update({n: w for n, w in original.items() if "self_attn" in n}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("evojax_merge.inspection.weights.PIECE", 1000)
        report = inspect(*folders[1:], folders[0])
    assert report["base"] == "base" and report["base_is_clear"]
    assert [vector["model"] for vector in report["task_vectors"]] == ["p1", "p2", "p3"]
    check_figures(report, [*folders[1:], folders[0]], 3)


def test_the_demo_family_has_its_base(inspect: Callable[..., Any]) -> None:
    from evojax_merge.zoo import resolve_reference

    names = ["maths", "base", "japanese"]
    report = inspect(*(f"zoo:{name}" for name in names))
    assert report["base"] == "base" and report["base_is_clear"] and "unrelated" not in kinds(report)
    assert "nearest to all" in sentence(report, "base") and "ties" in sentence(report, "base")
    check_figures(report, [resolve_reference(f"zoo:{name}") for name in names], 1)
    (model, *_) = report["models"]
    assert (model["architecture"], model["layers"], model["parameters"]) == ("llama", 3, 337_824)
    assert model["dtypes"] == {"float32": 337_824} and not model["tied_head"] and model["differing_tokens"] == 0


def test_smollm2_is_the_base_of_its_fine_tunes(inspect: Callable[..., Any]) -> None:
    folder = cache_folder() / "zoo" / smollm2.VERSION
    if not all((folder / name).is_dir() for name in ("base", "maths", "japanese")):
        pytest.skip("SmolLM2 and its fine-tunes are not in the cache")
    report = inspect("zoo:smollm2/japanese", "zoo:smollm2/maths", "zoo:smollm2/base")
    assert report["base"] == "base" and report["base_is_clear"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_base_is_clear_in_sixteen_bits_and_in_any_order(
    inspect: Callable[..., Any], tmp_path: Path, dtype: torch.dtype
) -> None:
    model = random_model(tiny_config()).to(dtype)
    folders = [save(model, tmp_path / "base"), *(save(finetune(model, k), tmp_path / f"p{k}") for k in (1, 2))]
    for order in itertools.permutations(folders):
        report = inspect(*order)
        assert report["base"] == "base" and report["base_is_clear"]
    check_figures(report, list(order), order.index(folders[0]))


# ---------------------------------------------------------------------------------------------------------------
# The base


def test_the_margin_is_that_of_its_formula() -> None:
    """(S(p) − S(b)) / ((K − 2) ‖d_p‖²) is 1 less twice the mean product with the others over ‖d_p‖²."""
    rng = np.random.default_rng(0)
    deltas = [np.zeros(50), *(rng.standard_normal(50) + 0.3 for _ in range(3))]
    distances = np.array([[np.sum((a - b) ** 2) for a in deltas] for b in deltas])
    verdict = find_base(distances)
    margins = {
        p: 1 - 2 * sum(deltas[p] @ deltas[j] for j in (1, 2, 3) if j != p) / (2 * deltas[p] @ deltas[p])
        for p in (1, 2, 3)
    }
    assert verdict.base == 0 and verdict.rival == min(margins, key=lambda p: margins[p])
    assert verdict.margin == pytest.approx(min(margins.values()), rel=1e-9)


def test_of_two_models_neither_is_called_the_base(inspect: Callable[..., Any], family: Family) -> None:
    report = inspect(family.base, family.parents[0])
    assert report["base"] is None and "two_models" in kinds(report) and report["sign_conflicts"] is None
    assert report["compared_with"] == "base" and report["task_vectors"][0]["norm"] > 0
    named = inspect(family.parents[0], options=("--base", str(family.base)))
    assert named["base"] == "base" and named["base_is_clear"] and "as given" in sentence(named, "base")


def test_parents_that_changed_alike_leave_the_base_unclear(inspect: Callable[..., Any], tmp_path: Path) -> None:
    model = random_model(tiny_config())
    common = finetune(model, 1)
    folders = [save(model, tmp_path / "base")]
    folders += [save(finetune(common, k, scale=0.03), tmp_path / f"p{k}") for k in (2, 3)]
    report = inspect(*folders)
    assert not report["base_is_clear"] and "unsure_base" in kinds(report) and "base" not in kinds(report)
    named = inspect(*folders, options=("--base", str(folders[0])))
    assert named["base"] == "base" and "unsure_base" not in kinds(named)


def test_unrelated_models_are_called_so(inspect: Callable[..., Any], tmp_path: Path) -> None:
    folders = [save(random_model(tiny_config(), seed), tmp_path / f"m{seed}") for seed in (0, 1)]
    report = inspect(*folders)
    assert report["families"] == [["m0"], ["m1"]] and report["task_vectors"] == []
    assert abs(report["pairs"][0]["cosine"]) < 0.05 and report["base"] is None
    assert "m0 | m1" in sentence(report, "unrelated") and "noise" in sentence(report, "unrelated")


def test_a_vision_tower_that_one_model_has_is_no_obstacle_to_a_search(inspect: Callable[..., Any]) -> None:
    text = sentence(inspect("zoo:evovlm/base", "zoo:evovlm/vision"), "tensors")
    assert "beside the decoder" in text and "in vision): a search keeps them" in text


def test_a_stranger_beside_a_family_is_named(inspect: Callable[..., Any], family: Family, tmp_path: Path) -> None:
    stranger = save(random_model(tiny_config(tie_word_embeddings=True), 7), tmp_path / "stranger")
    report = inspect(stranger, *family.parents, family.base)
    assert report["families"] == [["parent0", "parent1", "base"], ["stranger"]]
    assert report["base"] == "base" and report["base_is_clear"]
    assert "stranger" in sentence(report, "unrelated")
    check_figures(
        report | {"pairs": report["pairs"][3:]}, [*family.parents, family.base], 2
    )  # without the stranger's pairs


# ---------------------------------------------------------------------------------------------------------------
# Models that do not fit


def test_low_rank_changes_are_recognised(inspect: Callable[..., Any], tmp_path: Path) -> None:
    model = random_model(tiny_config())
    base = save(model, tmp_path / "base")
    adapted, full = save(model, tmp_path / "adapted"), save(finetune(model, 1), tmp_path / "full")

    def adapt(tensors: dict[str, torch.Tensor]) -> None:
        torch.manual_seed(0)
        for name, w in tensors.items():
            if "self_attn" in name:
                tensors[name] = w + 0.01 * torch.randn(w.shape[0], 3) @ torch.randn(3, w.shape[1])

    change_tensors(adapted, adapt)
    report = inspect(adapted, full, options=("--base", str(base)))
    assert {vector["model"]: vector["rank"] for vector in report["task_vectors"]} == {"adapted": 3, "full": None}
    assert "rank 3" in sentence(report, "low_rank")
    assert "mlp" in sentence(report, "unchanged") and "attention" not in sentence(report, "unchanged")


def test_the_larger_task_vector_is_named(inspect: Callable[..., Any], tmp_path: Path) -> None:
    model = random_model(tiny_config())
    folders = [save(model, tmp_path / "base")]
    folders += [save(finetune(model, k, scale), tmp_path / f"p{k}") for k, scale in ((1, 0.05), (2, 0.005))]
    report = inspect(*folders)
    norms = [vector["norm"] for vector in report["task_vectors"]]
    assert f"{norms[0] / norms[1]:.1f} times that of p2" in sentence(report, "scale")


def test_signs_that_disagree_and_signs_that_agree(inspect: Callable[..., Any], tmp_path: Path) -> None:
    model = random_model(tiny_config())
    base, one = save(model, tmp_path / "base"), save(finetune(model, 1), tmp_path / "one")
    start, step = load_file(base / "model.safetensors"), load_file(one / "model.safetensors")
    against, along = save(model, tmp_path / "against"), save(model, tmp_path / "along")
    change_tensors(against, lambda t: t.update({n: start[n] - 0.9 * (step[n] - start[n]) for n in t}))
    change_tensors(along, lambda t: t.update({n: start[n] + 0.9 * (step[n] - start[n]) for n in t}))
    report = inspect(one, against, options=("--base", str(base)))
    assert report["sign_conflicts"]["share"] > 0.99 and "pull against" in sentence(report, "conflicts")
    report = inspect(one, along, options=("--base", str(base)))
    assert report["sign_conflicts"]["share"] < 0.01 and {"alike"} <= kinds(report)
    generator = torch.Generator().manual_seed(0)
    for share, how in ((0.4, "fewer than by chance; plain sums"), (0.5, "about as many as by chance; plain sums")):
        mixed = {
            name: t + 0.9 * (step[name] - t) * torch.sign(torch.rand(t.shape, generator=generator) - share)
            for name, t in start.items()
        }
        save_file(mixed, along / "model.safetensors")
        assert how in sentence(inspect(one, along, options=("--base", str(base))), "conflicts")


def test_other_tokens_templates_dtypes_and_heads(inspect: Callable[..., Any], tmp_path: Path) -> None:
    model = random_model(tiny_config())
    base = save(model, tmp_path / "base")
    other = save(finetune(model, 1).to(torch.bfloat16), tmp_path / "other")
    tokens = words()
    tokens[10:12] = "new", "tokens"
    tokenizer = word_tokenizer(tokens)
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(other)
    tied = save(random_model(tiny_config(tie_word_embeddings=True)), tmp_path / "tied")
    report = inspect(base, other, tied)
    assert [model["differing_tokens"] for model in report["models"]] == [0, 2, 0]
    assert [model["chat_template"] for model in report["models"]] == [None, "{{ messages }}", None]
    assert [model["tied_head"] for model in report["models"]] == [False, False, True]
    assert list(report["models"][1]["dtypes"]) == ["bfloat16"]
    assert {"tokenizer", "chat_template", "dtype", "tied", "tensors"} <= kinds(report)
    assert "tokenizer_source" in sentence(report, "tokenizer") and "other" in sentence(report, "chat_template")
    assert report["tensors"]["in_some_models_alone"] == ["lm_head.weight"]


def test_depths_widths_and_architectures_that_differ(inspect: Callable[..., Any], tmp_path: Path) -> None:
    base = save(random_model(tiny_config()), tmp_path / "base")
    deep = save(random_model(tiny_config(num_hidden_layers=4)), tmp_path / "deep")
    wide = save(random_model(tiny_config(hidden_size=96)), tmp_path / "wide")
    other = save(random_model(tiny_config("qwen2")), tmp_path / "other")
    rows = save(random_model(tiny_config(vocab_size=65)), tmp_path / "rows")
    report = inspect(base, deep)
    assert "passthrough" in sentence(report, "depth") and [m["layers"] for m in report["models"]] == [3, 4]
    tall = save(random_model(tiny_config(hidden_size=96, num_hidden_layers=4)), tmp_path / "tall")
    assert sentence(inspect(base, tall), "depth").endswith("weights cannot be merged.")
    report = inspect(base, wide)
    assert "cannot be merged" in sentence(report, "shapes") and "rows" not in kinds(report)
    assert "qwen2" in sentence(inspect(base, other), "architecture")
    report = inspect(base, rows)
    assert "tokenizer_source" in sentence(report, "rows") and "shapes" not in kinds(report)
    assert set(report["tensors"]["of_different_shapes"]) == {"model.embed_tokens.weight", "lm_head.weight"}
    for folder, tokens in ((base, 64), (rows, 65)):
        change_tensors(folder, lambda tensors, tokens=tokens: tensors.update({"lm_head.bias": torch.zeros(tokens)}))
    report = inspect(base, rows)
    assert "lm_head.bias" in report["tensors"]["of_different_shapes"] and "shapes" not in kinds(report)


def test_weights_that_are_not_finite_are_counted_and_left_out(
    inspect: Callable[..., Any], family: Family, tmp_path: Path
) -> None:
    model = random_model(tiny_config(tie_word_embeddings=True))
    broken = save(finetune(model, 5), tmp_path / "broken")

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"][0, :2] = torch.tensor([float("nan"), float("inf")])

    change_tensors(broken, spoil)
    report = inspect(family.base, family.parents[0], broken)
    text = sentence(report, "nonfinite")
    assert text.startswith("broken holds 2 numbers") and "model.layers.1.mlp.up_proj.weight" in text
    assert all(np.isfinite(vector["norm"]) for vector in report["task_vectors"]) and report["base"] == "base"


def test_an_adapter_is_compared_as_the_model_that_it_makes(
    inspect: Callable[..., Any], family: Family, tmp_path: Path
) -> None:
    name, rng = "model.layers.0.mlp.down_proj.weight", np.random.default_rng(0)
    outputs, inputs = state(family.base)[name].shape
    a, b = (rng.standard_normal(shape).astype(np.float32) for shape in ((2, inputs), (outputs, 2)))
    (tmp_path / "lora").mkdir()
    with AdapterWriter(tmp_path / "lora", str(family.base)) as writer:
        writer.add_factors(name, a, b)
    report = inspect(f"{family.base}+{tmp_path / 'lora'}", family.parents[0], family.base)
    assert report["models"][0]["stored_as"] == "adapter" and report["base"] == "base"
    assert report["task_vectors"][0]["norm"] == pytest.approx(np.linalg.norm(b @ a), rel=1e-5)
    assert report["task_vectors"][0]["rank"] == 2


def test_a_quantised_gguf_file_is_near_the_model_that_it_was_made_of(
    inspect: Callable[..., Any], tmp_path: Path
) -> None:
    from test_gguf import KIND, write_gguf

    write_gguf(tmp_path / "one.gguf", "llama", KIND.Q8_0)
    report = inspect(tmp_path / "one.gguf", tmp_path / "written")
    assert [model["stored_as"] for model in report["models"]] == ["gguf", None]
    assert 0 < report["pairs"][0]["relative_distance"] < 0.02 and report["pairs"][0]["tensors"] == 2 * 9 + 2


def test_a_single_model_is_described(inspect: Callable[..., Any], family: Family) -> None:
    report = inspect(family.base)
    assert report["pairs"] == [] and report["models"][0]["unsearchable"] is None and report["findings"] == []


def test_models_of_two_architectures_that_share_weights_begin_no_search(
    inspect: Callable[..., Any], tmp_path: Path
) -> None:
    model, other = random_model(tiny_config()), random_model(tiny_config("qwen2"))
    other.load_state_dict(model.state_dict(), strict=False)
    report = inspect(save(model, tmp_path / "llama"), save(other, tmp_path / "qwen2"))
    assert "llama and qwen2 are equal, to the bit, in the 30 tensors that both have" in sentence(report, "equal")
    assert "architecture" in kinds(report) and "begin" not in kinds(report)


def test_tensors_of_an_unknown_architecture_are_placed_by_their_names(
    inspect: Callable[..., Any], tmp_path: Path
) -> None:
    folders = [save(random_model(tiny_config(tie_word_embeddings=True)), tmp_path / f"s{k}") for k in (0, 1)]
    for folder in folders:
        edit_json(folder / "config.json", lambda config: config.update(model_type="strange"))
    change_tensors(folders[1], lambda t: t.update({n: w + 0.01 * torch.randn_like(w) for n, w in t.items()}))
    report = inspect(*folders)
    assert "strange" in report["models"][0]["unsearchable"] and "search" in kinds(report)
    components = {(row["layer"], row["component"]) for row in report["task_vectors"][0]["by_layer"]}
    assert components >= {(0, "attention"), (2, "mlp"), (1, "norm"), (None, "other")}


# ---------------------------------------------------------------------------------------------------------------
# Files that say what they are


def shown_columns(capsys: pytest.CaptureFixture[str], title: str) -> list[list[str]]:
    """The rows of a table on the terminal, as texts."""
    lines = iter(capsys.readouterr().out.splitlines())
    rows = []
    for line in itertools.dropwhile(lambda line: not line.startswith(title), lines):
        if line.startswith("└"):
            break
        rows += [[part.strip() for part in line.strip("│").split("│")]] if line.startswith("│") else []
    return rows


def test_numbers_that_differ_never_print_the_same(
    inspect: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two fine-tunes whose distances from the base agree in six digits, and change one number in ten thousand."""
    base = save(random_model(tiny_config()), tmp_path / "base")
    for name, factor in (("one", 1.0), ("two", 1.000001)):
        shutil.copytree(base, tmp_path / name)
        tensors = load_file(base / "model.safetensors")
        tensors["model.embed_tokens.weight"][3, 5 if factor == 1.0 else 7] += 0.25 * factor
        save_file(tensors, tmp_path / name / "model.safetensors", {"format": "pt"})
    capsys.readouterr()
    report = inspect(base, tmp_path / "one", tmp_path / "two")
    rows = shown_columns(capsys, "Distances of the weights")
    numbers = [pair["relative_distance"] for pair in report["pairs"]]
    assert len({*numbers}) == len({row[2] for row in rows}) == 3
    assert [f"{number:.9g}".startswith(row[2][:6]) for number, row in zip(numbers, rows, strict=True)] == [True] * 3
    assert all(row[3] != "100.0%" and row[3].startswith("99.99") for row in rows)
    assert distinct([0.5, 0.5, None, 0.50000001, 1 - 1e-9], ".4f") == [
        "0.500000000", "0.500000000", "none", "0.500000010", "0.999999999"
    ]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_have_the_rank_and_the_base_of_their_files(
    inspect: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], dtype: torch.dtype
) -> None:
    """Ranks by a pattern; merged into 16 bits a change has a full rank, which is rounding."""
    base = save(random_model(tiny_config()).to(dtype), tmp_path / "base")
    rng, tensors = np.random.default_rng(0), {}
    for name, rank in (("self_attn.q_proj", 2), ("mlp.down_proj", 5)):
        shape = load_file(base / "model.safetensors")[f"model.layers.0.{name}.weight"].shape
        for part, size in (("A", (rank, shape[1])), ("B", (shape[0], rank))):
            factor = torch.from_numpy(rng.standard_normal(size).astype(np.float32))
            tensors[f"base_model.model.model.layers.0.{name}.lora_{part}.weight"] = factor
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "adapter_model.safetensors")
        tensors = {key: 2 * value for key, value in tensors.items()}
        config = {
            "peft_type": "LORA", "base_model_name_or_path": str(base), "r": 2, "lora_alpha": 2,
            "target_modules": ["q_proj", "down_proj"], "rank_pattern": {"down_proj": 5}, "use_rslora": False,
        }  # fmt: skip
        write_json(tmp_path / name / "adapter_config.json", config)
    report = inspect(tmp_path / "x", tmp_path / "y")
    out = capsys.readouterr().out
    assert report["base"] == "base" and "base is the base, as the adapters' files say" in sentence(report, "base")
    assert [vector["rank"] for vector in report["task_vectors"]] == [5, 5]
    assert report["models"][1]["adapter"] == {"ranks": [2, 5], "base": str(base)}
    assert "rank 2 to 5, trained on" in out and out.count("≤ 5") == 2
    assert f"init --base {base} --parents {tmp_path / 'x'} {tmp_path / 'y'} --data" in sentence(report, "begin")


def test_a_lora_without_its_base_says_its_rank_and_what_to_name(inspect: Callable[..., Any], tmp_path: Path) -> None:
    name = "lora_unet_down_blocks_0_attn"
    factors = {f"{name}.lora_down.weight": torch.ones(3, 8), f"{name}.lora_up.weight": torch.ones(8, 3)}
    save_file(factors, tmp_path / "style.safetensors", {"ss_sd_model_name": "v1-5.safetensors"})
    report = inspect(tmp_path / "style.safetensors")
    assert report["models"][0]["adapter"] == {"ranks": [3], "base": "v1-5.safetensors"}
    assert "it is a LoRA without its base: name it as BASE+style.safetensors" in sentence(report, "search")
    assert report["models"][0]["backend"] is None and "begin" not in kinds(report)


def test_an_adapters_config_beside_a_model_is_no_adapter(inspect: Callable[..., Any], tmp_path: Path) -> None:
    base = save(random_model(tiny_config()), tmp_path / "base")
    (base / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    assert inspect(base)["models"][0]["adapter"] is None


def test_files_that_are_not_compared_say_what_takes_them(tmp_path: Path) -> None:
    np.savez(tmp_path / "params.npz", a=np.zeros(2))
    torch.save({"a": torch.zeros(2)}, tmp_path / "net.pt")
    for name, words_ in (("params.npz", "init --parents FILE FILE --function FILE.py:NAME"),
                         ("net.pt", "safetensors.torch.save_file of its state dict, converts it")):  # fmt: skip
        assert words_ in run_here("inspect", tmp_path / name, status=2).stderr


def write_model(kind: str, folder: Path, seed: int) -> Path:
    """A tiny model of another kind than a language model."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    if kind == "diffusers":
        return make_ddpm(folder, seed)
    if kind == "state dict":
        folder.mkdir(parents=True)
        save_file(torch.nn.Linear(3, 2).state_dict(), folder / "net.safetensors")
        return folder / "net.safetensors"
    if kind == "vision":
        ViTForImageClassification(ViTConfig(**sizes, image_size=8, patch_size=4)).save_pretrained(folder)
    else:
        module = {"embeddings": BertModel, "classifier": BertForSequenceClassification}[kind]
        module(BertConfig(**sizes, vocab_size=64, max_position_embeddings=16)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("kind", "backend", "what", "command"),
    [
        ("diffusers", "torch", "a DDPMPipeline of diffusers", "--function FILE.py:NAME"),
        ("state dict", "files", "a file of tensors", "--backend FILE.py:NAME"),
        ("vision", "torch", "a ViTForImageClassification of transformers", "a folder of pictures by class"),
        ("classifier", "torch", "a BertForSequenceClassification of transformers", "or `text`, and `label`"),
        ("embeddings", "torch", "a BertModel of transformers", "`sentence1`, `sentence2` and `score`"),
    ],
)
def test_a_model_that_is_no_language_model_says_what_searches_it(
    inspect: Callable[..., Any], tmp_path: Path, kind: str, backend: str, what: str, command: str
) -> None:
    model = write_model(kind, tmp_path / "model", 0)
    report = inspect(model)
    assert report["models"][0]["backend"] == backend and report["models"][0]["parameters"] > 0
    assert what in sentence(report, "search") and "takes it with backend: torch" in sentence(report, "search")
    begin = sentence(report, "begin")
    assert f"evojax-merge init --parents {model} MODEL --data DATA" in begin and command in begin


def test_a_layer_path_is_advised_to_language_models_alone(inspect: Callable[..., Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    decoder = random_model(tiny_config())
    for name, module in (("arrays", torch.nn.Linear(40, 40)), ("decoder", decoder)):
        for number in range(2):
            with torch.no_grad():
                for weight in module.parameters():
                    weight += number * 1.5 * weight.std() * torch.randn_like(weight) if weight.dim() > 1 else 0
            folder = tmp_path / f"{name}{number}"
            if module is decoder:
                save(decoder, folder)
            else:
                folder.mkdir()
                save_file(module.state_dict(), folder / "net.safetensors")
    ending = "/net.safetensors"
    arrays = sentence(inspect(f"{tmp_path}/arrays0{ending}", f"{tmp_path}/arrays1{ending}"), "far_apart")
    assert arrays.endswith("start from one of them (seeds: [parents]).")
    assert "search a layer path" in sentence(inspect(tmp_path / "decoder0", tmp_path / "decoder1"), "far_apart")


# ---------------------------------------------------------------------------------------------------------------
# The command


@pytest.mark.parametrize(("ending", "start"), [("png", b"\x89PNG"), ("svg", b"<svg")])
def test_the_picture(inspect: Callable[..., Any], family: Family, tmp_path: Path, ending: str, start: bytes) -> None:
    picture = tmp_path / f"picture.{ending}"
    inspect(family.base, *family.parents, options=("--picture", str(picture)))
    first = picture.read_bytes()
    assert first.startswith(start)
    # It may be drawn again, and is the same.
    inspect(family.base, *family.parents, options=("--picture", str(picture)))
    assert picture.read_bytes() == first


def test_the_terminal_shows_tables_and_sentences(family: Family) -> None:
    text = run_here("inspect", family.base, *family.parents).stdout
    for words_ in ("stored dtype", "Distances of the weights", "Task vectors from base", "Relative norm by layer"):
        assert words_ in text
    assert "- base is the base of the others" in text
