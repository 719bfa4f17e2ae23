"""Tokens of merged models, against mergekit: whose row is whose, in which order, in models of any architecture."""

import copy
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from helpers.commands import output_of, run_here
from helpers.files import edit_json, read_json, write_json, write_lines, write_yaml
from helpers.mergekit import assert_same_tensors, merge_by_mergekit
from helpers.models import finetune, random_model, save, state, tiny_config, word_tokenizer, words
from helpers.searches import problem_of, search_config, task_section
from tokenizers import AddedToken, Tokenizer, models
from transformers import PreTrainedTokenizerFast

import evojax_merge as em
from evojax_merge.checkpoints.parents import open_sources
from evojax_merge.checkpoints.tokens import load_tokenizer
from evojax_merge.errors import InputError
from evojax_merge.mergekit.execute import merge_to, prepare
from evojax_merge.mergekit.schema import parse_recipe

TOLERANCE = 1e-5


def ours(root: Path, document: dict[str, Any], out: str = "ours") -> tuple[Path, tuple[str, ...]]:
    """The merged folder, and what it was warned of."""
    merge_plan = prepare(parse_recipe(root / "recipe.yaml", document))
    shutil.rmtree(root / out, ignore_errors=True)
    merge_to(merge_plan, root / out, card="")
    return root / out, merge_plan.sources.warnings


def theirs(root: Path, document: dict[str, Any], patch: pytest.MonkeyPatch) -> Path:
    """mergekit's merge, of models in the order in which the recipe names them: its own order is that of a set."""
    from mergekit.config import MergeConfiguration

    # It keeps opened models by their names, whatever folder these start in.
    rows = [row | {"model": str(root / row["model"])} for row in document["models"]]
    absolute = document | {"models": rows}
    for key in {"base_model", "tokenizer_source"} & document.keys():
        if key == "base_model" or document[key] not in ("union", "base"):
            absolute[key] = str(root / document[key])
    config = MergeConfiguration.model_validate(absolute)
    named = [config.base_model, *(row.model for row in config.models)]
    patch.setattr(MergeConfiguration, "referenced_models", lambda self: list(dict.fromkeys(filter(None, named))))
    out = root / f"theirs{len(list(root.glob('theirs*')))}"
    return merge_by_mergekit(absolute, out)


def merge(*names: str, **more: Any) -> dict[str, Any]:
    """A recipe: of deltas where there is a base that is not one of the models, else linear."""
    rows = [{"model": name, "parameters": {"weight": 0.3 + 0.2 * i}} for i, name in enumerate(names)]
    method = "task_arithmetic" if more.get("base_model", names[0]) not in names else "linear"
    return {"merge_method": method, "models": rows, **more}


def assert_same(found: Path, expected: Path) -> None:
    assert_same_tensors(state(found), state(expected), rtol=TOLERANCE, atol=TOLERANCE)


def assert_same_tokens(found: Path, expected: Path) -> None:
    """The same tokens by the same numbers, of which the same are added ones, and special."""
    mine, other = load_tokenizer(found), load_tokenizer(expected)
    assert mine.get_vocab() == other.get_vocab()
    assert mine.added_tokens_decoder == other.added_tokens_decoder


# ---------------------------------------------------------------------------------------------------------------
# Without a tokenizer setting


def renamed(folder: Path, names: dict[str, str]) -> None:
    """Other names for some tokens of a saved tokenizer."""
    (folder / "tokenizer_config.json").unlink()
    (folder / "tokenizer.json").unlink()
    word_tokenizer([names.get(word, word) for word in words()]).save_pretrained(folder)


@pytest.fixture(scope="module")
def llamas(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, two of its fine-tunes, and one of them with two tokens renamed, as trainers rename reserved ones."""
    root = tmp_path_factory.mktemp("llamas")
    base = random_model(tiny_config(num_hidden_layers=1))
    save(base, root / "base")
    for seed, name in enumerate(("one", "two"), start=1):
        save(finetune(base, seed), root / name)
    shutil.copytree(root / "one", root / "chat")
    renamed(root / "chat", {"w62": "<|im_start|>", "w63": "<|im_end|>"})
    return root


def test_tokens_of_other_names_are_merged_row_by_row_with_a_warning(
    llamas: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    document = merge("two", "chat", base_model="base")
    found, (warning,) = ours(llamas, document)
    assert_same(found, theirs(llamas, document, monkeypatch))
    assert load_tokenizer(found).get_vocab() == load_tokenizer(llamas / "base").get_vocab()
    for part in ("chat", "base", "row 62 is '<|im_start|>', not 'w62'", "row 63", "tokenizer_source"):
        assert part in warning
    assert "\n" not in warning
    with pytest.warns(UserWarning, match="row 62 is '<.im_start.>', not 'w62'"):
        em.merge(merge(str(llamas / "two"), str(llamas / "chat")), llamas / "by_api")
    assert open_sources([llamas / "base", llamas / "chat"])[0].warnings == (warning,)
    assert open_sources([llamas / "base", llamas / "two"])[0].warnings == ()


def test_tokenizers_of_custom_code_are_not_compared(llamas: Path, tmp_path: Path) -> None:
    for number, name in enumerate(("one", "two")):
        shutil.copytree(llamas / name, tmp_path / name, ignore=shutil.ignore_patterns("tokenizer*"))
        settings = {"auto_map": {"AutoTokenizer": ["mine.Mine", None]}, "model_max_length": number}
        write_json(tmp_path / name / "tokenizer_config.json", settings)
    found, (warning,) = ours(tmp_path, merge("one", "two"))
    assert_same(found, ours(llamas, merge("one", "two"))[0])
    assert "one: its tokenizer is custom code, which is never run" in warning and str(tmp_path / "two") in warning
    # A chat template alone is no tokenizer.
    for name in ("one", "two"):
        (tmp_path / name / "tokenizer_config.json").unlink()
        (tmp_path / name / "chat_template.jinja").write_text("{{ messages }}")
    found, warnings = ours(tmp_path, merge("one", "two"))
    assert warnings == () and (found / "chat_template.jinja").exists()


def test_a_search_of_models_with_other_names_for_tokens_warns_and_takes_the_base_s(llamas: Path) -> None:
    (llamas / "tasks.jsonl").write_text('{"prompt": "w5 w6", "target": "w7"}\n' * 4)
    config = search_config(parents=["two", "chat"], space={"method": "task_arithmetic", "layers_per_group": "all"})
    problem = problem_of(llamas / "config.yaml", config)
    (warning,) = problem.backend.models.sources.warnings
    assert "row 62 is '<|im_start|>', not 'w62'" in warning
    assert problem.backend.models.tokenizer.get_vocab() == load_tokenizer(llamas / "base").get_vocab()


def test_other_numbers_of_rows_are_refused_as_by_mergekit(llamas: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(random_model(tiny_config(num_hidden_layers=1, vocab_size=66)), llamas / "longer")
    document = merge("base", "longer")
    with pytest.raises(ValueError, match="tokenizer"):
        theirs(llamas, document, monkeypatch)
    with pytest.raises(InputError, match=r"longer.*embed_tokens.*tokenizer_source"):
        ours(llamas, document)


def test_a_head_with_fewer_rows_than_the_embedding_is_refused(llamas: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(llamas / "two", llamas / "shorter")
    file = llamas / "shorter" / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"lm_head.weight": tensors["lm_head.weight"][:62].clone()}, file, {"format": "pt"})
    with pytest.raises(
        InputError, match=r"shorter: lm_head\.weight has shape \[62, 48\].*config\.json says \[64, 48\]"
    ):
        ours(llamas, merge("base", "shorter", base_model="base", tokenizer_source="base"))


def test_a_model_without_a_tokenizer_has_the_base_s(llamas: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(llamas / "two", llamas / "bare", ignore=shutil.ignore_patterns("*token*"))
    document = merge("two", "bare", base_model="base", tokenizer_source="union")
    found, warnings = ours(llamas, document)
    expected = theirs(llamas, document, monkeypatch)
    assert_same(found, expected)
    assert_same_tokens(found, expected)
    line = f"{llamas / 'bare'}: has no tokenizer; its rows are taken for those of {llamas / 'base'}"
    assert line in warnings
    for names in (("base", "bare"), ("bare", "base")):
        assert open_sources([llamas / name for name in names])[0].warnings == (line,)
    assert open_sources([llamas / "bare", llamas / "bare"])[0].warnings == ()
    found, warnings = ours(llamas, merge("bare", "base"))
    assert warnings == (line,)
    assert (found / "tokenizer.json").read_bytes() == (llamas / "base/tokenizer.json").read_bytes()


# ---------------------------------------------------------------------------------------------------------------
# A search of models of which some lack tokens

CHAT = ["<|im_start|>", "<|im_end|>"]


@pytest.fixture(scope="module")
def added_tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base of 62 tokens, three fine-tunes of it, of which two have two tokens more, and a task on these."""
    root = tmp_path_factory.mktemp("added")
    base = random_model(tiny_config(num_hidden_layers=1, vocab_size=62, tie_word_embeddings=False))
    save(base, root / "base", words(62))
    save(finetune(base, 3), root / "plain", words(62))
    for seed, name in enumerate(("one", "two"), start=1):
        torch.manual_seed(seed)
        tuned = finetune(copy.deepcopy(base), seed)
        tuned.resize_token_embeddings(64, mean_resizing=False)
        save(tuned, root / name, [*words(62), *CHAT])
    records = [{"prompt": f"{CHAT[0]} w{i} {CHAT[1]}", "target": f" w{i + 1} {CHAT[1]}"} for i in range(8, 24)]
    write_lines(root / "tasks.jsonl", records)
    return root


@pytest.mark.parametrize(
    ("method", "parents", "lacking", "bank"),
    [("task_arithmetic", ("one", "two"), ("base",), "host"), ("ties", ("one", "plain"), ("base", "plain"), "device"),
     ("slerp", ("plain", "one"), ("plain",), "disk"), ("linear", ("one", "plain"), ("plain",), "device")],
)  # fmt: skip
def test_models_that_lack_a_few_tokens_are_searched_as_their_recipe_merges_them(
    method: str, parents: tuple[str, ...], lacking: tuple[str, ...], bank: str, added_tokens: Path, tmp_path: Path
) -> None:
    base = added_tokens / "base" if "base" in lacking else None
    document = search_config(
        base=base and str(base), parents=[str(added_tokens / name) for name in parents],
        tokenizer_source=str(added_tokens / "one"), space={"method": method, "layers_per_group": "all"},
        tasks=[task_section(added_tokens / "tasks.jsonl", heldout=0.5)], evaluation={"bank": bank},
    )  # fmt: skip
    run_here("search", write_yaml(tmp_path / "search.yaml", document), "--out", tmp_path / "run")
    log, best = (tmp_path / "run" / "run.log").read_text(), tmp_path / "run" / "best"
    for name in lacking:
        assert f"{name}: lacks 2 of the 64 tokens (such as '<|im_start|>')" in log
    scored = read_json(tmp_path / "run" / "result.json")["table"][-1]["heldout_scores"]
    run_here("merge", best / "recipe.yaml", tmp_path / "again")
    run_here("evaluate", tmp_path / "again", "--tasks", tmp_path / "search.yaml", "--split", "heldout", "--json",
             tmp_path / "scores.json")  # fmt: skip
    [model] = read_json(tmp_path / "scores.json")
    assert model["scores"] == pytest.approx(scored, abs=1e-6)
    assert len(load_tokenizer(tmp_path / "again")) == 64


def test_an_answer_ends_where_the_tokenizers_model_ends_it(added_tokens: Path, tmp_path: Path) -> None:
    """The winner's files name the tokens at which the search ended its answers, so that transformers ends there, too;
    parents with another chat template than the one in use are named."""
    for name, ends in (("base", 1), ("one", [63, 1]), ("two", 1)):
        shutil.copytree(added_tokens / name, tmp_path / name)
        write_json(tmp_path / name / "generation_config.json", {"eos_token_id": ends})
        edit_json(tmp_path / name / "config.json", lambda config, ends=ends: config.update(eos_token_id=ends))
        (tmp_path / name / "chat_template.jinja").write_text(f"w9 {{{{ messages[0].content }}}} w{len(name)}{ends}")
    document = search_config(
        generations=1, base="base", parents=["one"], space={"method": "task_arithmetic", "layers_per_group": "all"},
        tasks=[task_section(added_tokens / "tasks.jsonl", prompt="w8", target="w10", apply_chat_template=True)],
    )  # fmt: skip
    other = "answers end at its tokens; one: another template, which tokenizer_source: one takes"
    assert other in output_of("plan", write_yaml(tmp_path / "two.yaml", document | {"base": "two"}))
    config = write_yaml(tmp_path / "search.yaml", document | {"tokenizer_source": "one"})
    assert other not in output_of("search", config, "--out", tmp_path / "run")
    for name in ("config.json", "generation_config.json"):
        assert read_json(tmp_path / "run" / "best" / "model" / name)["eos_token_id"] == [63, 1]


def test_models_that_lack_many_tokens_and_layer_paths_are_refused_with_the_way_out(added_tokens: Path) -> None:
    for changes in ({"space": None, "data_flow": {}}, {"parents": ["one", "short"]}):
        if "parents" in changes and not (added_tokens / "short").exists():
            save(random_model(tiny_config(num_hidden_layers=1, vocab_size=40)), added_tokens / "short", words(40))
        config = search_config(**{"parents": ["one", "plain"], "tokenizer_source": "one"} | changes)
        with pytest.raises(InputError, match=r"lacks \d+ of the 64 tokens .*approximate: omp"):
            problem_of(added_tokens / "config.yaml", config)


# ---------------------------------------------------------------------------------------------------------------
# The order of a union


def added(content: str, **flags: bool) -> AddedToken:
    return AddedToken(content, normalized=False, **flags)


def byte_pairs(tokens: Sequence[str], extra: Sequence[AddedToken]) -> PreTrainedTokenizerFast:
    """A byte-pair tokenizer without merges, and what is added to it."""
    model = models.BPE({token: i for i, token in enumerate(tokens)}, [], unk_token="<unk>")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), unk_token="<unk>", eos_token="</s>")
    tokenizer.add_tokens(list(extra))
    if "<|pad|>" in {token.content for token in extra}:
        tokenizer.pad_token = "<|pad|>"
    return tokenizer


SPECIAL = ("<unk>", "</s>")
CHATML = (added("<|im_start|>", special=True), added("<|im_end|>", special=True, rstrip=True), added("plain"))
TOKENIZERS: dict[str, tuple[Sequence[str], Sequence[AddedToken], int]] = {
    # tokens, added tokens, rows
    "base": ((*SPECIAL, "a", "b", "c"), (), 5),
    "special": ((*SPECIAL, "a", "b", "c"), (added("<|pad|>", special=True),), 6),
    "chat": ((*SPECIAL, "a", "b", "c"), CHATML, 8),
    "padded": ((*SPECIAL, "b", "a", "d"), (added("<|tool|>", special=True), CHATML[1]), 16),
    "beyond": ((*SPECIAL, "c", "a", "b"), (added("<unused>"), added("<unused 2>")), 5),
    "pad beyond": ((*SPECIAL, "a", "b", "c"), (added("<|pad|>", special=True),), 5),
    "made plain": ((*SPECIAL, "a", "<|im_end|>", "b", "e"), (), 6),
}


@pytest.fixture(scope="module")
def dialects(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models of one architecture and many tokenizers."""
    root = tmp_path_factory.mktemp("dialects")
    for seed, (name, (tokens, extra, rows)) in enumerate(TOKENIZERS.items()):
        model = random_model(tiny_config(num_hidden_layers=1, vocab_size=rows), seed)
        model.save_pretrained(root / name)
        byte_pairs(tokens, extra).save_pretrained(root / name)
    return root


UNIONS = [
    ("base", "chat"), ("base", "padded"), ("padded", "chat"), ("chat", "padded"), ("beyond", "chat"),
    ("chat", "beyond"), ("special", "chat"), ("made plain", "chat"), ("chat", "made plain"), ("base", "chat", "padded"),
    ("special", "padded", "chat"), ("padded", "chat", "special"), ("chat", "special", "beyond"),
    ("pad beyond", "chat"), ("chat", "pad beyond"), ("pad beyond", "special", "chat"),
]  # fmt: skip


@pytest.mark.parametrize("names", UNIONS, ids=" + ".join)
def test_a_union_has_mergekit_s_tokens_in_its_order(
    names: tuple[str, ...], dialects: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    document = merge(*names[1:], base_model=names[0], tokenizer_source="union")
    found, expected = ours(dialects, document)[0], theirs(dialects, document, monkeypatch)
    assert_same_tokens(found, expected)
    assert_same(found, expected)


@pytest.mark.parametrize("names", [("beyond", "chat"), ("padded", "chat"), ("chat", "beyond")], ids=" + ".join)
@pytest.mark.parametrize("pad", [None, 8])
def test_the_base_s_tokens_are_mergekit_s(
    names: tuple[str, ...], pad: int | None, dialects: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    document = merge(*names, base_model=names[0], tokenizer={"source": "base", "pad_to_multiple_of": pad})
    found, expected = ours(dialects, document)[0], theirs(dialects, document, monkeypatch)
    assert_same_tokens(found, expected)
    assert_same(found, expected)


@pytest.mark.parametrize("source", ["padded", "alone", "base"])
def test_tokens_of_a_model_that_is_not_merged_are_mergekit_s(
    source: str, dialects: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a folder with nothing but a tokenizer, too; the base's are the first model's where there is no base."""
    if source == "alone":
        byte_pairs((*SPECIAL, "b", "nobody's", "a"), CHATML).save_pretrained(dialects / "alone")
    more = {} if source == "base" else {"base_model": "base"}
    document = merge("beyond", "chat", tokenizer_source=source, **more)
    (found, warnings), expected = ours(dialects, document), theirs(dialects, document, monkeypatch)
    assert_same_tokens(found, expected)
    assert_same(found, expected)
    absent = [line for line in warnings if "no model has" in line]
    assert len(absent) == (source != "base")
    if source == "alone":
        assert 'alone: no model has 1 of its tokens ("nobody\'s"); their rows are zero' in absent[0]


# ---------------------------------------------------------------------------------------------------------------
# Any architecture


def text(**sizes: int) -> dict[str, Any]:
    return {"vocab_size": 24, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, **sizes}


HEADS: dict[str, int] = {"num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 1}
T5: dict[str, int] = {"d_model": 16, "d_kv": 8, "d_ff": 20, "num_layers": 1, "num_heads": 2}
GPT: dict[str, int] = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 24}


def llava() -> Any:
    vision = transformers.CLIPVisionConfig(image_size=8, patch_size=4, hidden_size=24, num_attention_heads=2,
                                           num_hidden_layers=1, intermediate_size=28)  # fmt: skip
    config = transformers.LlavaConfig(vision_config=vision, text_config=transformers.LlamaConfig(**text(**HEADS)))
    return transformers.LlavaForConditionalGeneration(config)


def of(name: str, **sizes: int) -> Callable[[], Any]:
    """A model by its class: `GPT2LMHeadModel` of a `GPT2Config`."""
    head = next(end for end in ("LMHeadModel", "ForCausalLM", "ForMaskedLM", "ForConditionalGeneration")
                if name.endswith(end))  # fmt: skip
    config = getattr(transformers, f"{name.removesuffix(head)}Config")
    return lambda: getattr(transformers, name)(config(**text(**sizes)))


ARCHITECTURES: dict[str, Callable[[], Any]] = {
    "GPT-2, whose head is its embedding": of("GPT2LMHeadModel", **GPT),
    "Phi, whose head has a bias": of("PhiForCausalLM", **HEADS),
    "Mamba": of("MambaForCausalLM", hidden_size=16, num_hidden_layers=1, state_size=4),
    "BLOOM": of("BloomForCausalLM", hidden_size=16, n_layer=1, n_head=2),
    "T5": of("T5ForConditionalGeneration", feed_forward_proj="gated-gelu", **T5),
    "ModernBERT, whose head is called a decoder": of("ModernBertForMaskedLM", cls_token_id=1, sep_token_id=2, **HEADS),
    "XLNet": of("XLNetLMHeadModel", d_model=16, n_layer=1, n_head=2, d_inner=20),
    "Mixtral": of("MixtralForCausalLM", num_key_value_heads=2, num_local_experts=2, **HEADS),
}
# mergekit asks for tensors that transformers does not write, or leaves out some that it writes.
BEYOND_MERGEKIT: dict[str, Callable[[], Any]] = {
    "GPT-NeoX": of("GPTNeoXForCausalLM", **HEADS),
    "BERT": of("BertForMaskedLM", max_position_embeddings=24, **HEADS),
    "LLaVA": llava,
}


def write_pair(root: Path, build: Callable[[], Any]) -> list[Any]:
    """Two models of an architecture, `base` and `one`, which has the same tokens in another order, and two more."""
    order, pair = np.random.default_rng(0).permutation(20) + 4, []
    for seed, name in enumerate(("base", "one")):
        torch.manual_seed(seed)
        model = build()
        tokenizer = word_tokenizer(words(24))
        if name == "one":
            model.resize_token_embeddings(26, mean_resizing=False)
            tokenizer = word_tokenizer([*words(4), *(words(24)[i] for i in order)])
            tokenizer.add_tokens([added("new"), added("newer", special=True)])
        with torch.no_grad():
            for values in model.parameters():
                values.copy_(torch.randn_like(values))
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
        pair.append(model)
    return pair


@pytest.mark.parametrize("source", ["base", "union"])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_rows_are_aligned_in_any_architecture(
    kind: str, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As mergekit, which knows the architecture, or asks transformers for the model's embeddings."""
    model, _ = write_pair(tmp_path, ARCHITECTURES[kind])
    document = merge("base", "one", base_model="base", tokenizer_source=source)
    found, expected = ours(tmp_path, document)[0], theirs(tmp_path, document, monkeypatch)
    assert_same_tokens(found, expected)
    loaded, wanted = (load_any(folder, type(model)) for folder in (found, expected))
    assert_same_tensors(loaded, wanted, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("kind", BEYOND_MERGEKIT)
def test_rows_are_aligned_by_the_names_of_their_modules(kind: str, tmp_path: Path) -> None:
    pair = write_pair(tmp_path, BEYOND_MERGEKIT[kind])
    found = ours(tmp_path, merge("base", "one", base_model="base", tokenizer_source="base"))[0]
    merged = type(pair[0]).from_pretrained(found)
    vocabularies = [load_tokenizer(tmp_path / name).get_vocab() for name in ("base", "one")]
    for module in ("get_input_embeddings", "get_output_embeddings"):
        for name, values in getattr(merged, module)().named_parameters():
            base, one = (getattr(model, module)().get_parameter(name).detach() for model in pair)
            rows = [vocabularies[1][token] for token in sorted(vocabularies[0], key=vocabularies[0].__getitem__)]
            torch.testing.assert_close(values.detach(), (0.3 * base + 0.5 * one[rows]) / 0.8)


def load_any(folder: Path, kind: Any) -> dict[str, np.ndarray]:
    """A model's tensors as transformers reads them: whatever names a file has, by those of the model."""
    model, told = kind.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not told["missing_keys"] and not told["mismatched_keys"]
    return {name: values.numpy() for name, values in model.state_dict().items()}


def test_an_embedding_is_found_by_its_rows(tmp_path: Path) -> None:
    """Of a name that nobody knows; a vector as long as the vocabulary is none."""
    from safetensors.torch import save_file

    for seed, name in enumerate(("base", "one")):
        torch.manual_seed(seed)
        tensors = {"lexicon.table": torch.randn(6, 3), "norm.weight": torch.randn(6), "layers.0.w": torch.randn(4, 3)}
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors", {"format": "pt"})
        write_json(tmp_path / name / "config.json", {"model_type": "unheard", "vocab_size": 6})
        own = words(6) if name == "base" else [*words(4), "w5", "w4"]
        word_tokenizer(own).save_pretrained(tmp_path / name)
    document = merge("base", "one", base_model="base", tokenizer_source="base", parameters={"normalize": False})
    found, (base, one) = state(ours(tmp_path, document)[0]), (state(tmp_path / name) for name in ("base", "one"))
    table = 0.3 * base["lexicon.table"] + 0.5 * one["lexicon.table"][[0, 1, 2, 3, 5, 4]]
    np.testing.assert_allclose(found["lexicon.table"], table, rtol=1e-6)
    np.testing.assert_allclose(found["norm.weight"], 0.3 * base["norm.weight"] + 0.5 * one["norm.weight"], rtol=1e-6)
    edit_json(tmp_path / "base" / "config.json", lambda config: config.update(vocab_size=7))
    with pytest.raises(InputError, match=r"base: has no tensor model\.embed_tokens\.weight; tokenizer: aligns"):
        ours(tmp_path, document)


WITHOUT_TORCH = """
import importlib.util, sys
from pathlib import Path
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name in ("torch", "torchvision") else find(name, package)
import evojax_merge
"""
LOADING = "from evojax_merge.checkpoints.tokens import load_tokenizer; load_tokenizer(Path(sys.argv[1]))"


@pytest.mark.parametrize(("code", "is_noted"), [(LOADING, False), ("import transformers", True)])
def test_where_torch_is_not_installed_its_absence_is_noted_for_other_code_alone(
    code: str, is_noted: bool, tmp_path: Path
) -> None:
    word_tokenizer(words(20)).save_pretrained(tmp_path)
    program = [sys.executable, "-c", WITHOUT_TORCH + code, tmp_path]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRANSFORMERS_")}
    done = subprocess.run(program, capture_output=True, text=True, check=True, env=environment)
    assert ("PyTorch was not found" in done.stdout + done.stderr) == is_noted
