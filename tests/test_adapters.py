"""Adapters as parents: as peft merges them, wherever a model may stand, and refused where they cannot be merged."""

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import peft
import pytest
import torch
import yaml
from helpers.commands import assert_refused, command, refusal, run_here
from helpers.families import Family
from helpers.files import edit_json, read_json, write_lines
from helpers.mergekit import assert_same_tensors, merge_by_mergekit
from helpers.models import (
    even_records,
    finetune,
    random_model,
    random_records,
    save,
    state,
    tiny_config,
    word_tokenizer,
    words,
)
from helpers.sampling import sample
from helpers.searches import search_config, task_section
from hostile import changing
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, GPT2Config, GptOssConfig, NemotronHConfig

import evojax_merge as em
from evojax_merge.checkpoints.adapter_writer import AdapterWriter
from evojax_merge.checkpoints.adapters import ADAPTER_FILE
from evojax_merge.checkpoints.derived import open_model, reference_to, resolve_model
from evojax_merge.checkpoints.tokens import chat_template, load_tokenizer
from evojax_merge.errors import InputError
from evojax_merge.mergekit.as_adapter import AdapterOptions, prepare_adapter, write_as_adapter
from evojax_merge.mergekit.execute import merge_to, prepare
from evojax_merge.mergekit.schema import parse_recipe
from evojax_merge.mergekit.stages import prepare_stream
from evojax_merge.mergekit.streams import parse_stream
from evojax_merge.models.sources import LazyMerge

ATTENTION = ["q_proj", "v_proj"]
LORA: dict[str, dict[str, Any]] = {
    "a list of modules": {"target_modules": [*ATTENTION, "down_proj"]},
    "a pattern": {"target_modules": r".*\.layers\.[12]\.mlp\.(up|down)_proj"},
    "all linear modules": {"target_modules": "all-linear"},
    "rank-stabilised": {"target_modules": ATTENTION, "use_rslora": True},
    "ranks and alphas of their own": {
        "target_modules": ATTENTION,
        "rank_pattern": {"q_proj": 2, r"layers\.1\.self_attn\.v_proj": 6},
        "alpha_pattern": {"v_proj": 3},
    },
    "DoRA": {"target_modules": [*ATTENTION, "up_proj"], "use_dora": True},
    "an embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "a DoRA embedding": {"target_modules": ["embed_tokens"], "use_dora": True},
    "saved modules": {"target_modules": ATTENTION, "modules_to_save": ["norm", "lm_head"]},
    "rows of the embedding": {"trainable_token_indices": [3, 9, 7]},
    "rows of embedding and head": {"trainable_token_indices": {"embed_tokens": [3, 7], "lm_head": [5]}},
}


def adapter(
    base: Path, folder: Path, seed: int = 0, onto: Path | None = None, embeddings: Any = "auto", **settings: Any
) -> tuple[Path, Path]:
    """An adapter of random values, saved by peft, and what its merge_and_unload makes of it, of the base or `onto`
    another one. embeddings: peft's `save_embedding_layers`."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    torch.manual_seed(seed)
    settings = {"r": 4, "lora_alpha": 6, "target_modules": ATTENTION, **settings}
    tuned = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    for name, values in tuned.named_parameters():
        if values.requires_grad:
            values.data += (0.02 if "magnitude" in name else 0.1) * torch.randn_like(values)
    tuned.save_pretrained(folder, save_embedding_layers=embeddings)
    merged = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(onto or base, dtype="auto"), folder)
    merged.merge_and_unload().save_pretrained(folder.with_name(f"{folder.name}-merged"))
    return folder, folder.with_name(f"{folder.name}-merged")


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with a head of its own and with biases."""
    return save(random_model(tiny_config("qwen2", tie_word_embeddings=False)), tmp_path_factory.mktemp("untied") / "b")


@pytest.fixture
def lora(family: Family, tmp_path: Path) -> tuple[Path, Path]:
    return adapter(family.base, tmp_path / "lora")


def read(reference: str, relative_to: Path = Path()) -> dict[str, np.ndarray]:
    folder = open_model(resolve_model("test", reference, relative_to))
    return {name: np.array(folder.read(name)) for name in folder.entries}


@pytest.mark.parametrize("case", sample(LORA, 5))
def test_an_adapter_is_merged_as_peft_merges_it(case: str, untied: Path, tmp_path: Path) -> None:
    folder, merged = adapter(untied, tmp_path / "lora", **LORA[case])
    found, expected, base = read(f"{untied}+{folder}"), state(merged), state(untied)
    assert_same_tensors(found, expected, rtol=2e-6, atol=2e-7)
    assert any(not np.array_equal(found[name], base[name]) for name in base)


# What peft saves where the vocabulary was resized: the embedding and the head as they are, beside their adapters.
WITH_EMBEDDINGS: dict[str, tuple[bool, dict[str, Any]]] = {
    "nothing": (False, {}),
    "both saved": (False, {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "rows": (False, {"trainable_token_indices": [3, 9]}),
    "both adapted": (False, {"target_modules": ["embed_tokens", "lm_head"]}),
    "nothing, tied": (True, {}),
    "the embedding saved, tied": (True, {"modules_to_save": ["embed_tokens"]}),
    "the head saved, tied": (True, {"modules_to_save": ["lm_head"]}),
    "both saved, tied": (True, {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "both saved as one, tied": (True, {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
    "rows, tied": (True, {"trainable_token_indices": [3, 9]}),
    "the embedding adapted, tied": (True, {"target_modules": ["embed_tokens"]}),
}


@pytest.mark.parametrize("case", WITH_EMBEDDINGS)
def test_embeddings_that_peft_saves_beside_an_adapter_are_the_models(case: str, tmp_path: Path) -> None:
    """Whatever the rows of the base are."""
    is_tied, settings = WITH_EMBEDDINGS[case]
    model = random_model(tiny_config("llama", tie_word_embeddings=is_tied))
    base, other = save(model, tmp_path / "base"), save(finetune(model, 1), tmp_path / "other")
    folder, merged = adapter(base, tmp_path / "lora", onto=other, embeddings=True, **settings)
    found, expected = read(f"{other}+{folder}"), state(merged)
    assert_same_tensors(found, expected, rtol=2e-6, atol=2e-7)
    assert not np.array_equal(found["model.embed_tokens.weight"], state(other)["model.embed_tokens.weight"])


EXPERTS = {
    "all": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    "half of them": ["experts.down_proj"],
    "with the router": ["mlp.experts.gate_up_proj", "mlp.gate.weight"],
}


@pytest.mark.parametrize(
    ("kind", "parameters"), sample([("qwen3_moe", "all"), ("mixtral", "with the router"), ("qwen3_moe", "half of them"),
                                    ("gpt_oss", "all"), ("gpt_oss", "half of them")], 3)
)  # fmt: skip
def test_experts_that_are_one_parameter_are_adapted_as_by_peft(kind: str, parameters: str, tmp_path: Path) -> None:
    """Whether a file holds experts one by one or together, as [in, out] or as [out, in]."""
    if kind == "gpt_oss":
        config = GptOssConfig(
            vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
            head_dim=16, num_key_value_heads=2, max_position_embeddings=96, num_local_experts=3, num_experts_per_tok=2,
        )  # fmt: skip
    base = save(random_model(tiny_config(kind) if kind != "gpt_oss" else config), tmp_path / "base")
    pattern = {"experts.gate_up_proj": 2} if parameters == "all" else {}
    folder, merged = adapter(
        base,
        tmp_path / "lora",
        target_parameters=EXPERTS[parameters],
        rank_pattern=pattern,
        use_rslora=kind == "mixtral",
    )
    found, expected, before = read(f"{base}+{folder}"), state(merged), state(base)
    assert_same_tensors(found, expected, rtol=2e-6, atol=2e-7)
    changed = [name for name in before if "experts" in name and (found[name] != before[name]).any()]
    each = sum("experts" in name and "bias" not in name for name in before)
    assert (
        len(changed) == each * {"all": 6, "half of them": 2 + (kind == "gpt_oss"), "with the router": 4}[parameters] / 6
    )


def test_names_in_memory_are_those_of_a_base_whose_files_have_others(tmp_path: Path) -> None:
    """`backbone.` in Nemotron-H's files is `model.` in transformers, and in what peft saves."""
    config = NemotronHConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        layers_block_type=["mlp", "full_attention"],
    )  # fmt: skip
    base = save(random_model(config), tmp_path / "base")
    settings = {"target_modules": ["q_proj", "down_proj", "lm_head"], "trainable_token_indices": [3, 9]}
    folder, merged = adapter(base, tmp_path / "lora", **settings)
    assert_same_tensors(read(f"{base}+{folder}"), state(merged), rtol=2e-6, atol=2e-7)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_that_were_trained_take_the_place_of_the_bases(bias: str, untied: Path, tmp_path: Path) -> None:
    folder, merged = adapter(untied, tmp_path / "lora", bias=bias)
    found, name = read(f"{untied}+{folder}"), "model.layers.0.self_attn.q_proj.bias"
    np.testing.assert_array_equal(found[name], state(merged)[name])
    assert not np.array_equal(found[name], state(untied)[name])


@pytest.mark.parametrize("modules", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]], ids=" + ".join)
def test_a_head_that_was_trained_apart_from_the_embedding_is_one_of_its_own(modules: list[str], tmp_path: Path) -> None:
    """As peft makes it, whose merged model is no longer tied."""
    base = save(random_model(tiny_config("qwen2", tie_word_embeddings=True)), tmp_path / "base")
    folder, merged = adapter(base, tmp_path / "lora", modules_to_save=modules)
    found, expected = read(f"{base}+{folder}"), state(merged)
    assert "lm_head.weight" in expected
    assert_same_tensors(found, expected, rtol=2e-6, atol=2e-7)
    rows: Any = [
        {"model": f"{base}+{folder}", "parameters": {"weight": 0.5}},
        {"model": f"{base}", "parameters": {"weight": 1.5}},
    ]
    merge_plan = prepare(parse_recipe(tmp_path / "recipe.yaml", {"merge_method": "linear", "models": rows}))
    merge_to(merge_plan, tmp_path / "out", card=None)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    head, embedding = expected["lm_head.weight"], state(base)["model.embed_tokens.weight"]
    np.testing.assert_allclose(model.lm_head.weight.detach(), 0.25 * head + 0.75 * embedding, rtol=1e-5, atol=1e-6)


def test_values_are_rounded_to_a_narrow_bases_dtype_once(family: Family, tmp_path: Path) -> None:
    model = random_model(tiny_config(tie_word_embeddings=True)).to(torch.bfloat16)
    base = save(model, tmp_path / "base")
    folder, merged = adapter(base, tmp_path / "lora", target_modules="all-linear")
    found, expected = read(f"{base}+{folder}"), state(merged)
    for name, values in expected.items():
        assert found[name].dtype == ml_dtypes.bfloat16
        own = found[name].astype(np.float32)
        # Another order of summation moves a value across a boundary once in some thousands.
        assert np.mean(own != values) < 2e-3, name
        np.testing.assert_allclose(own, values, rtol=2**-7, err_msg=name)


def test_a_transposed_base_is_adapted_in_its_own_orientation(tmp_path: Path) -> None:
    """GPT-2 keeps its weights as [in, out], and its checkpoints leave out the first part of their modules' names."""
    from transformers import GPT2Config

    model = AutoModelForCausalLM.from_config(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=16, n_positions=16))
    model.save_pretrained(tmp_path / "base")
    folder, merged = adapter(tmp_path / "base", tmp_path / "lora", target_modules=["c_attn"], fan_in_fan_out=True)
    found, expected = read(f"{tmp_path / 'base'}+{folder}"), state(merged)
    assert_same_tensors(found, expected, rtol=2e-6, atol=2e-7)


# ---------------------------------------------------------------------------------------------------------------
# References


def test_an_adapter_alone_stands_for_its_base_with_it(lora: tuple[Path, Path], family: Family) -> None:
    alone, named = (
        resolve_model("test", str(lora[0]), Path()),
        resolve_model("test", f"{family.base}+{lora[0]}", Path()),
    )
    assert alone == named
    assert reference_to(alone) == f"{family.base}+{lora[0]}"
    assert (alone / "config.json").read_bytes() == (family.base / "config.json").read_bytes()


def test_an_adapter_beside_a_config_is_one_and_beside_weights_a_warning(
    lora: tuple[Path, Path], family: Family, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(family.base / "config.json", lora[0])
    assert reference_to(resolve_model("test", str(lora[0]), Path())) == f"{family.base}+{lora[0]}"
    shutil.copy(family.base / "model.safetensors", lora[0])
    assert resolve_model("test", str(lora[0]), Path()) == lora[0]
    assert f"{lora[0]}: holds an adapter beside its weights, which is not applied" in capsys.readouterr().err
    assert_same_tensors(read(f"{lora[0]}+{lora[0]}"), state(lora[1]), rtol=2e-6, atol=2e-7)


def with_tokens(tokens: list[str]) -> Callable[[Path], Any]:
    def write(folder: Path) -> None:
        tokenizer = word_tokenizer(tokens)
        tokenizer.chat_template = "mine"
        tokenizer.save_pretrained(folder)

    return write


# What an adapter's folder holds: the chat template and the last token of the model, and the words of a warning.
TOKENIZERS: dict[str, tuple[Callable[[Path], Any], str | None, str, tuple[str, ...]]] = {
    "tokens of its own": (with_tokens([*words()[:-1], "<|im_end|>"]), "mine", "<|im_end|>", ()),
    "fewer tokens than the model has rows": (with_tokens(words()[:-1]), "mine", "w62", ()),
    "a template alone": (lambda folder: (folder / "chat_template.jinja").write_text("mine"), "mine", "w63", ()),
    "more tokens than the model has rows": (
        with_tokens([*words(), "<|im_end|>"]), None, "w63", ("'<|im_end|>'", "number 64", "64 rows", "resized"),
    ),
    "a damaged tokenizer": (
        lambda folder: (folder / "tokenizer.json").write_text("{"), None, "w63", ("cannot be loaded", "repair"),
    ),
    "a tokenizer of a link to nothing": (
        lambda folder: (folder / "tokenizer.json").symlink_to(folder / "nothing"), None, "w63", (),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", TOKENIZERS)
def test_a_model_has_the_tokenizer_of_its_adapter_where_the_tokens_fit(
    case: str, lora: tuple[Path, Path], family: Family, capsys: pytest.CaptureFixture[str]
) -> None:
    change, template, last, says = TOKENIZERS[case]
    plain = resolve_model("test", f"{family.base}+{lora[0]}", Path())
    change(lora[0])
    for weights in (True, False):
        model = resolve_model("test", f"{family.base}+{lora[0]}", Path(), weights=weights)
        numbers = load_tokenizer(model).get_vocab()
        assert (chat_template(model), max(numbers, key=numbers.__getitem__)) == (template, last)
        assert (model == plain) == (template is None)
    if template is not None:
        (lora[0] / "chat_template.jinja").write_text("another")
        changed = resolve_model("test", f"{family.base}+{lora[0]}", Path())
        assert changed != model and chat_template(changed) == "another"
    warned = capsys.readouterr().err
    assert warned.count("warning: ") == bool(says) and all(part in warned for part in says), warned
    assert f"{plain.parent}" not in warned


def test_folders_with_a_plus_in_their_names_are_found(lora: tuple[Path, Path], family: Family, tmp_path: Path) -> None:
    shutil.copytree(family.base, tmp_path / "a+b")
    assert resolve_model("test", "a+b", tmp_path) == (tmp_path / "a+b").resolve()
    shutil.copytree(lora[0], tmp_path / "c+d")
    assert reference_to(resolve_model("test", "a+b+c+d", tmp_path)) == f"{tmp_path / 'a+b'}+{tmp_path / 'c+d'}"


def test_random_masks_are_named_by_content(lora: tuple[Path, Path], family: Family, tmp_path: Path) -> None:
    """The same adapter elsewhere has the same digests, another one has not; what it leaves alone is the base's."""
    name, norm = "model.layers.0.self_attn.q_proj.weight", "model.norm.weight"
    moved = Path(shutil.copytree(lora[0], tmp_path / "moved"))
    other, _ = adapter(family.base, tmp_path / "other", seed=1)
    first, again, another, base = (
        open_model(resolve_model("test", reference, Path()))
        for reference in (*(f"{family.base}+{one}" for one in (lora[0], moved, other)), str(family.base))
    )
    assert first.digest(name) == again.digest(name)
    assert len({one.digest(name) for one in (first, another, base)}) == 3
    assert first.digest(norm) == base.digest(norm)


# ---------------------------------------------------------------------------------------------------------------
# The bank


def expanded(reference: str, folder: Path) -> Path:
    """The model of a reference as a folder of its own."""
    model = resolve_model("test", reference, Path())
    folder.mkdir()
    for file in model.iterdir():
        shutil.copyfile(file, folder / file.name)
    save_file(read(reference), folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("method", "dtype"),
    sample([("linear", torch.float32), ("task_arithmetic", torch.bfloat16), ("ties", torch.float32)], 1),
)
def test_adapters_of_one_base_are_held_as_factors(method: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Scores and merges are those of the models that they stand for, to the bit, from the base held once."""
    base = save(random_model(tiny_config(tie_word_embeddings=True)).to(dtype), tmp_path / "base")
    tasks = write_lines(tmp_path / "tasks.jsonl", random_records(6))
    for seed, (name, modules) in enumerate({"one": ATTENTION, "two": ["embed_tokens", "up_proj"]}.items()):
        adapter(base, tmp_path / name, seed, target_modules=modules, r=3 + seed)
    references = [f"{base}+{tmp_path / name}" for name in ("one", "two")]
    folders = [str(expanded(one, tmp_path / f"whole-{k}")) for k, one in enumerate(references)]

    def opened(parents: list[str]) -> em.Evaluator:
        config = search_config(base=str(base), parents=parents, space={"method": method}, tasks=[task_section(tasks)])
        config["search"] = {"generations": 1}
        return em.Evaluator(config)

    def whole(evaluator: em.Evaluator) -> Any:
        problem, bank = evaluator._problem, evaluator._evaluator.evaluator.bank
        recipe = problem.space.recipe(jnp.asarray(genomes[0]))
        return jax.jit(lambda bank, one: LazyMerge.of(bank, one, problem.backend.candidates.spec).materialise())(
            bank, recipe
        )

    small, large = opened(references), opened(folders)
    genomes = np.random.default_rng(0).random((3, small.dims)).astype(np.float32)
    banks = [one._evaluator.evaluator.bank for one in (small, large)]
    low_rank = {name for name, leaf in banks[0].stacks["layers"].items() if leaf.factors is not None}
    assert low_rank == {"q", "k", "v", "o", "gate", "up", "down"}
    assert banks[0].shared["embed"].sources.shape[0] == 1
    assert all(leaf.factors is None for leaf in banks[1].shared.values())
    held = [sum(leaf.nbytes for leaf in jax.tree.leaves(one)) for one in banks]
    assert held[0] < 0.75 * held[1]
    planned = [one._problem.backend.planner().sizes.held for one in (small, large)]
    assert planned[0] - planned[1] == held[0] - held[1]
    np.testing.assert_array_equal(small.scores(genomes).values, large.scores(genomes).values)
    for first, second in zip(jax.tree.leaves(whole(small)), jax.tree.leaves(whole(large)), strict=True):
        np.testing.assert_array_equal(np.asarray(first, np.float32), np.asarray(second, np.float32))


# ---------------------------------------------------------------------------------------------------------------
# Commands


def write(path: Path, document: Any) -> Path:
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    return path


def test_a_recipe_of_adapters_is_merged_as_by_mergekit(lora: tuple[Path, Path], family: Family, tmp_path: Path) -> None:
    reference = f"{family.base}+{lora[0]}"
    given = {"weight": 0.6, "density": 0.5}
    rows = [{"model": model, "parameters": given} for model in (reference, str(family.parents[0]))]
    recipe = {"merge_method": "ties", "base_model": str(family.base), "models": rows, "dtype": "float32"}
    assert command("merge", write(tmp_path / "recipe.yaml", recipe), tmp_path / "ours") == 0
    theirs = merge_by_mergekit(recipe, tmp_path / "theirs", lora_merge_cache=str(tmp_path / "cache"))
    found, expected = state(tmp_path / "ours"), state(theirs)
    for name, values in expected.items():
        # An entry whose rank the two expansions' last bits change may be trimmed by one and not by the other.
        close = np.isclose(found[name], values, rtol=1e-5, atol=1e-6)
        assert close.mean() > 0.999, name
    assert reference in (tmp_path / "recipe.yaml").read_text()
    card = (tmp_path / "ours" / "README.md").read_text()
    assert "base+lora" in card
    assert str(tmp_path) not in card


def test_a_search_over_adapters_exports_what_it_scored(
    lora: tuple[Path, Path], family: Family, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    other, _ = adapter(family.base, tmp_path / "other", seed=1, target_modules=["up_proj", "q_proj"])
    heldout = write_lines(tmp_path / "heldout.jsonl", even_records(6, seed=9))
    space = {"method": "task_arithmetic", "parameters": {"weight": {"low": 0.0, "high": 1.0}}}
    parents = [f"{family.base}+lora", str(other)]
    config = search_config(family, heldout=str(heldout), parents=parents, space=space)
    path = write(tmp_path / "config.yaml", config)
    assert command("search", path, "--out", tmp_path / "run") == 0
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert saved["parents"] == [f"{family.base}+{lora[0]}", f"{family.base}+{other}"]
    files = [family.base / "model.safetensors", family.base / "config.json", other / ADAPTER_FILE]
    assert {str(file) for file in files} <= set(saved["inputs"])
    # All models have the scores that the search's table gives them, and the winner's recipe makes the same bytes again.
    table = read_json(tmp_path / "run" / "result.json")["table"]
    found = {row["role"] + row["name"]: row["heldout_fitness"] for row in table}
    models = (tmp_path / "run", lora[0], other)
    assert command("evaluate", *models, "--tasks", path, "--json", tmp_path / "scores.json") == 0
    scores = [row["fitness"] for row in read_json(tmp_path / "scores.json")]
    names = ("winnerevolved task_arithmetic", "parentbase+lora", "parentbase+other")
    assert scores == pytest.approx([found[name] for name in names], abs=1e-6)
    assert command("merge", tmp_path / "run/best/recipe.yaml", tmp_path / "again") == 0
    model = "model.safetensors"
    assert (tmp_path / "again" / model).read_bytes() == (tmp_path / "run/best/model" / model).read_bytes()
    # A sum of two adapters of rank 4 is one of rank 8, in which nothing is left out.
    winner = state(tmp_path / "run/best/model")
    for rank, closest in ((8, 0.0), (1, 0.1)):
        capfd.readouterr()
        out = tmp_path / f"rank-{rank}"
        said = run_here("export", tmp_path / "run", out, "--as", "adapter", "--rank", rank).stdout
        total = float(said.partition("(Frobenius norm): ")[2].partition("%")[0]) / 100
        assert "worst" in said and closest <= total < closest + 0.9
        assert (total < 1e-4) == (rank == 8)
        # The card says that it is of an adapter, and whose scores it shows.
        card = (out / "README.md").read_text()
        assert f"**A LoRA adapter of `base`, of rank {rank}" in card and f"leaves out {total:.1%} of it" in card
        assert "Scores in this card are those of the whole merge. The adapter was not scored.**" in card
        header = yaml.safe_load(card.split("---\n")[1])
        assert header["library_name"] == "peft" and "base_model" not in header
        base = AutoModelForCausalLM.from_pretrained(family.base, dtype=torch.float32)
        merged = peft.PeftModel.from_pretrained(base, out).merge_and_unload().state_dict()
        own, start = read(str(out)), state(family.base)
        left_out, whole = 0.0, 0.0
        for name, values in winner.items():
            np.testing.assert_allclose(own[name], merged[name].numpy(), rtol=1e-5, atol=1e-6, err_msg=name)
            left_out += float(((own[name] - values) ** 2).sum())
            whole += float(((values - start[name]) ** 2).sum())
        assert (left_out / whole) ** 0.5 == pytest.approx(total, abs=1e-4)
    more = ("--resume", "--set", "search.generations=3")
    assert command("search", path, "--out", tmp_path / "run", *more) == 0
    assert len((tmp_path / "run" / "history.jsonl").read_text().splitlines()) == 3


def test_factors_are_those_of_the_singular_value_decomposition() -> None:
    rng = np.random.default_rng(0)
    for shape in ((9, 14), (14, 9)):
        matrix = rng.normal(size=shape).astype(np.float32)
        u, sizes, v = np.linalg.svd(matrix.astype(np.float64))
        for rank in (1, 4, 9):
            a, b = AdapterOptions(rank).factors(matrix)
            assert (a.shape, b.shape) == ((rank, shape[1]), (shape[0], rank))
            np.testing.assert_allclose(b @ a, (u[:, :rank] * sizes[:rank]) @ v[:rank], rtol=1e-4, atol=1e-5)
    a, b = AdapterOptions(2).factors(np.zeros((3, 4), np.float32))
    assert not len(a) and not (b @ a).any()


def written_as_adapter(base: Path, parent: Path, out: Path, rank: int, **recipe: Any) -> None:
    """The adapter of a merge of one parent with its base; its progress is told to the end."""
    models = [{"model": str(parent), "parameters": {"weight": 0.5}}]
    document = {"merge_method": "task_arithmetic", "base_model": str(base), "models": models, "dtype": "float32"}
    with prepare_stream(parse_stream(out.with_suffix(".yaml"), [document | recipe]), out) as stream_plan:
        prepare_adapter(stream_plan, rank)
        told: list[int] = []
        write_as_adapter(
            stream_plan.result,
            out,
            options=AdapterOptions(rank),
            card="",
            describe=lambda card, error: card,
            progress=told.append,
        )
        assert sum(told) == stream_plan.result.nbytes


GPT2_SIZES = {"n_embd": 24, "n_head": 2, "n_layer": 2, "n_positions": 32, "vocab_size": 64}


@pytest.mark.parametrize("kind", sample(["gpt2", "gpt2, untied", "mixtral", "qwen3_moe"], 2))
def test_adapters_of_other_layouts_are_what_peft_reads(kind: str, tmp_path: Path) -> None:
    """Transposed weights and positions of GPT-2, experts of mixtures."""
    tied = {} if kind == "gpt2" else {"tie_word_embeddings": False}
    config = GPT2Config(**GPT2_SIZES, **tied) if kind.startswith("gpt2") else tiny_config(kind)
    model = random_model(config)
    base, parent = save(model, tmp_path / "base"), save(finetune(model, 1), tmp_path / "parent")
    written_as_adapter(base, parent, tmp_path / "out", rank=20)
    with warnings.catch_warnings():
        # Of keys that the model lacks, or that it has and the adapter lacks.
        warnings.filterwarnings("error", message=".*(missing|unexpected).*keys.*")
        torch_base = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        merged = peft.PeftModel.from_pretrained(torch_base, tmp_path / "out").merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    own, theirs, start, other = read(str(tmp_path / "out")), state(tmp_path / "merged"), state(base), state(parent)
    assert set(own) == set(start)
    for name, values in own.items():
        np.testing.assert_allclose(values, theirs[name], rtol=1e-5, atol=2e-6, err_msg=name)
        # What is left out of a matrix is less than what is in.
        half = (start[name] + other[name]) / 2
        assert np.linalg.norm(values - half) < 0.7 * np.linalg.norm(half - start[name]) or np.array_equal(
            half, start[name]
        )


@pytest.mark.parametrize("kind", sample(["mixtral", "qwen3_moe"], 1))
def test_adapters_of_experts_fit_bases_that_have_them_packed(kind: str, tmp_path: Path) -> None:
    """Files have the experts of a layer in one tensor, or each by itself; modules of adapters are an expert's."""
    model = random_model(tiny_config(kind, num_hidden_layers=1))
    plain, packed = save(model, tmp_path / "plain"), save(model, tmp_path / "packed", save_original_format=False)
    start, rng = state(plain), np.random.default_rng(0)
    adapted = [name for name in start if ".experts.1." in name or "q_proj" in name]
    factors = {}
    for name in adapted:
        outputs, inputs = start[name].shape
        factors[name] = rng.normal(size=(2, inputs)).astype("f4"), rng.normal(size=(outputs, 2)).astype("f4")
    (tmp_path / "lora").mkdir()
    with AdapterWriter(tmp_path / "lora", str(plain)) as writer:
        for name, (a, b) in factors.items():
            writer.add_factors(name, a, b)
    expected, found = (read(f"{base}+{tmp_path / 'lora'}") for base in (plain, packed))
    assert len(adapted) == 4 and set(found) == set(expected) == set(start)
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)
        assert np.array_equal(values, start[name]) == (name not in adapted)


def test_experts_that_do_not_differ_are_in_no_adapter(tmp_path: Path) -> None:
    base = save(random_model(tiny_config("mixtral")), tmp_path / "base")
    shutil.copytree(base, tmp_path / "parent")
    weights, name = load_file(base / "model.safetensors"), "model.layers.1.self_attn.o_proj"
    save_file(weights | {f"{name}.weight": weights[f"{name}.weight"] + 1}, tmp_path / "parent" / "model.safetensors")
    written_as_adapter(base, tmp_path / "parent", tmp_path / "out", rank=1)
    assert read_json(tmp_path / "out" / "adapter_config.json")["target_modules"] == [name]
    np.testing.assert_allclose(
        read(str(tmp_path / "out"))[f"{name}.weight"], weights[f"{name}.weight"] + 0.5, atol=1e-6
    )


@pytest.mark.parametrize("kind", sample(["llava", "smolvlm", "qwen2_5_vl"], 1))
def test_an_adapter_of_a_larger_model_changes_its_text_decoder(kind: str, tmp_path: Path) -> None:
    from test_text_decoders import larger_model, save_with_noise

    model = larger_model(kind)
    base, parent = (save_with_noise(model, tmp_path / name, seed) for seed, name in enumerate(("base", "parent")))
    written_as_adapter(base, parent, tmp_path / "out", rank=8, other_modules=str(base))
    torch_base = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
    merged = peft.PeftModel.from_pretrained(torch_base, tmp_path / "out").merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    own, theirs, start = read(str(tmp_path / "out")), state(tmp_path / "merged"), state(base)
    changed = {name for name in own if not np.array_equal(own[name], start[name])}
    assert_same_tensors(own, theirs, rtol=1e-5, atol=2e-6)
    assert changed and not any("vision" in name or "visual" in name for name in changed)
    assert {name.rpartition("layers.")[2] for name in changed if "layers.1." in name} == {
        name.rpartition("layers.")[2]
        for name in start
        if "layers.1." in name and not ("vision" in name or "visual" in name)
    }


def test_an_export_that_can_be_no_adapter_is_refused(family: Family, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "best").mkdir(parents=True)
    (run / "config.yaml").write_text("inputs: {}")
    (run / "history.jsonl").write_text("")
    models = [{"model": str(parent), "parameters": {"weight": 0.5}} for parent in family.parents]
    linear, based = {"merge_method": "linear", "models": models}, {"base_model": str(family.base)}
    moe = str(save(random_model(tiny_config("qwen2_moe")), tmp_path / "moe"))
    of_moe = {"merge_method": "linear", "base_model": moe, "models": [{"model": moe, "parameters": {"weight": 1}}]}
    adapted = f"{family.base}+{adapter(family.base, tmp_path / 'lora')[0]}"
    for recipe, options, says in (
        (linear, ("--as", "adapter", "--rank", 4), "base_model"),
        (linear | based | {"merge_method": "ties"}, ("--as", "adapter", "--rank", 25), "at most 24"),
        (
            linear | {"base_model": adapted, "merge_method": "ties"},
            ("--as", "adapter", "--rank", 4),
            f"the base is {adapted}",
        ),
        (of_moe, ("--as", "adapter", "--rank", 2), "qwen2_moe: PEFT cannot tell its shared expert"),
        (linear, ("--as", "adapter"), "--rank: missing"),
        (linear, ("--rank", 4), "--rank: only --as adapter"),
    ):
        write(run / "best" / "recipe.yaml", recipe)
        line = refusal("export", run, tmp_path / "out", *options)
        assert says in line, line
        assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------------------------
# Adapters that cannot be merged


def settings(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "adapter_config.json", lambda config: config.update(changes))


@changing
def tensors(folder: Path, change: Callable[[dict[str, np.ndarray]], Any]) -> None:
    own = load_file(folder / ADAPTER_FILE)
    change(own)
    save_file(own, folder / ADAPTER_FILE)


EMBEDDED = "base_model.model.model.embed_tokens"
Q = "base_model.model.model.layers.0.self_attn.q_proj"
WRONG: dict[str, tuple[Callable[[Path], Any], tuple[str, ...]]] = {
    "another kind of adapter": (settings(peft_type="LOHA"), ("adapter_config.json", "peft_type", "LOHA", "LORA")),
    "parameters that are no names": (settings(target_parameters=[3]), ("target_parameters", "names")),
    "rows that are no numbers": (settings(trainable_token_indices=["w5"]), ("trainable_token_indices", "numbers")),
    "rows that the config does not name": (
        tensors(lambda own: own.update({f"{EMBEDDED}.token_adapter.trainable_tokens_delta": np.zeros((2, 48), "f4")})),
        (f"{EMBEDDED}.token_adapter", "[2, 48]", "expected [0, 48]", "trainable_token_indices"),
    ),
    "a start that changes the base": (settings(init_lora_weights="pissa"), ("init_lora_weights", "pissa")),
    "a rank of nothing": (settings(r=0), ("r: 0", "whole number")),
    "an alpha that is no number": (settings(lora_alpha="much"), ("lora_alpha", "much", "number")),
    "another rank than its tensors have": (settings(r=3), ("lora_A has shape [4, 48]", "expected [3, 48]")),
    "modules that are not targets": (settings(target_modules=["o_proj"]), ("target_modules", "q_proj")),
    "targets that are no pattern": (settings(target_modules="(q_proj"), ("target_modules", "'(q_proj'", "expression")),
    "targets of a pattern without end": (
        settings(target_modules=r"(\w|\.|[a-z])*\d\d"), ("target_modules", "[a-z])*", "too many ways"),
    ),
    "ranks of a pattern of a billion parts": (
        settings(rank_pattern={"((.{999}){999}){999}": 2}), ("rank_pattern", "repeats more than"),
    ),
    "another base": (
        tensors(lambda own: own.update({f"{Q}.lora_A.weight": np.zeros((4, 50), np.float32)})),
        (ADAPTER_FILE, f"{Q}.lora_A has shape [4, 50]", "expected [4, 48]"),
    ),
    "the embedding of a larger base": (
        tensors(lambda own: own.update({f"{EMBEDDED}.weight": np.zeros((70, 48), np.float32)})),
        (f"{EMBEDDED}.weight has shape [70, 48]", "resize_token_embeddings(70)", "name COPY+ADAPTER"),
    ),
    "a module that the base lacks": (
        tensors(lambda own: own.update({Q.replace("q_proj", "qkv") + ".lora_A.weight": np.zeros((4, 48), "f4")})),
        (ADAPTER_FILE, "self_attn.qkv", "has no tensor"),
    ),
    "a misspelt module": (
        tensors(lambda own: own.update({Q.replace("q_proj", "q_porj") + ".lora_A.weight": np.zeros((4, 48), "f4")})),
        (ADAPTER_FILE, "self_attn.q_porj", "did you mean 'model.layers.0.self_attn.q_proj.weight'"),
    ),
    "half of an adapter": (tensors(lambda own: own.pop(f"{Q}.lora_B.weight")), (Q, "lora_B")),
    "a part that is not known": (
        tensors(lambda own: own.update({f"{Q}.lora_C.weight": np.zeros((4, 4), np.float32)})), ("lora_C",),
    ),
    "whole numbers": (
        tensors(lambda own: own.update({f"{Q}.lora_A.weight": np.zeros((4, 48), np.int8)})), (Q, "int8", "float"),
    ),
    "a head that is the embedding": (
        tensors(lambda own: own.update({"base_model.model.lm_head.weight": np.zeros((64, 48), np.float32)})),
        ("lm_head.weight: changes the head, which is the embedding", "tie_word_embeddings"),
    ),
    "an adapter of a head that is the embedding": (
        tensors(lambda own: own.update({"base_model.model.lm_head.lora_A.weight": np.zeros((4, 48), np.float32)})),
        ("lm_head: changes the head, which is the embedding", "tie_word_embeddings"),
    ),
    "not a number": (
        tensors(lambda own: own[f"{Q}.lora_A.weight"].fill(np.nan)), (ADAPTER_FILE, "q_proj", "NaN or Inf"),
    ),
    "no file": (lambda folder: (folder / ADAPTER_FILE).unlink(), (ADAPTER_FILE, "is missing")),
    "a pickle": (
        lambda folder: (folder / ADAPTER_FILE).rename(folder / "adapter_model.bin"), ("pickle", "safetensors"),
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def one_lora(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return adapter(family.base, tmp_path_factory.mktemp("adapter") / "lora")[0]


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_merged_is_refused_by_name(case: str, one_lora: Path, family: Family, tmp_path: Path) -> None:
    change, says = WRONG[case]
    folder = Path(shutil.copytree(one_lora, tmp_path / "lora"))
    change(folder)
    recipe = {"merge_method": "linear", "models": [{"model": str(folder), "parameters": {"weight": 1.0}}]}
    path = write(tmp_path / "recipe.yaml", recipe)
    assert_refused(says, "merge", path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_references_that_name_no_adapter_are_refused(lora: tuple[Path, Path], family: Family, tmp_path: Path) -> None:
    for step in (1000, 500):
        shutil.copytree(lora[0], tmp_path / f"steps/checkpoint-{step}")
    for reference, says in (
        (f"{family.base}+{tmp_path / 'steps'}", rf"did you mean {family.base}\+{tmp_path}/steps/checkpoint-1000\?"),
        (f"{family.base}+{tmp_path / 'nothing'}", "no such folder"),
        (f"{family.base}+{family.base}", "holds no adapter_config.json"),
        (f"{lora[0]}+{lora[0]}", "is an adapter"),
        (f"{family.base}+{lora[0]}+{lora[0]}", "expected one adapter behind a base"),
        ("owner/base+owner/one+owner/two", "expected one adapter behind a base"),
    ):
        with pytest.raises(InputError, match=says) as caught:
            resolve_model("recipe.yaml", reference, Path())
        assert str(caught.value).startswith(f"recipe.yaml: {reference}")
    for named, says in ((None, "missing"), (str(lora[0]), "is an adapter")):
        settings(base_model_name_or_path=named)(lora[0])
        with pytest.raises(InputError, match=f"base_model_name_or_path: .*{says}"):
            resolve_model("recipe.yaml", str(lora[0]), Path())
