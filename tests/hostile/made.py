"""Models that commands make of others: mixtures of experts, adapters, models with a donor's tokenizer, GGUF files and
calibrated merges, of folders and recipes that lie."""

import json
import os
import shutil
import struct
from collections.abc import Callable
from typing import Any

from hostile import Case, World, changing, link, together
from hostile.gguf import F64, LIST, TEXT, U8, U64, Raw, file, listed
from hostile.outputs import finished_run
from hostile.quantised import adapter, edited

Change = Callable[[World], Any]
EMBEDDING = "model.embed_tokens.weight"
UP, DOWN = "model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.down_proj.weight"
HUGE = 10**400
PROMPTS = (["w4 w5 w6", "w7 w8"], ["w20 w21 w22 w23", "w24"])


def values(name: str, value: float, model: str = "one") -> Change:
    """One tensor of a model filled with a number."""
    return edited(lambda tensors: tensors[name].fill_(value), f"{model}/model.safetensors")


def text(name: str, content: str | bytes) -> Change:
    return lambda world: world.write(name, content)


@changing
def pipe(world: World, name: str) -> None:
    (world / name).unlink(missing_ok=True)
    (world / name).parent.mkdir(exist_ok=True)
    os.mkfifo(world / name)


@changing
def thesis(world: World) -> None:
    world.write("out/thesis.tex", "mine")


# ---------------------------------------------------------------------------------------------------------------
# Mixtures


def experts(**changes: Any) -> list[dict[str, Any]]:
    """The experts of a mixture, the first with other keys."""
    first, second = ({"source_model": name, "positive_prompts": PROMPTS[i]} for i, name in enumerate(("one", "two")))
    return [first | changes, second]


@changing
def moe(world: World, *changes: Change, out: str = "out", options: tuple[str, ...] = (), **keys: Any) -> Any:
    document = {"base_model": "base", "experts": experts(), "dtype": "float32"} | keys
    world.write("moe.yaml", document)
    together(*changes)(world)
    return ("moe", "moe.yaml", out, *options)


def mixture(name: str, change: Change, *says: str, **more: Any) -> Case:
    return Case(f"moe: {name}", change, says, **more)


OVER = ("--overwrite",)
LAYER = {"experts": [0, 1], "scale": [1, 1], "bias": [0, 0]}
GENERATION = "base/generation_config.json"
MIXTURES = [
    mixture("as it should be", moe(), status=0, leaves=("out",)),
    mixture("the name of a GGUF file", moe(out="out.gguf"), "out.gguf: a mixture is written as a folder"),
    mixture("settings of generation that are garbage", moe(text(GENERATION, "{")), GENERATION, "not valid JSON"),
    mixture("settings of generation that are a pipe", moe(pipe(GENERATION)), GENERATION, "a pipe"),
    mixture("numbers beyond float16", moe(values(UP, 1e6), dtype="float16"), "one/model", "layers.1", "in float16"),
    mixture("noise without measure", moe(experts=experts(noise_scale=3e38)), "one/model", "in float32"),
    mixture("a scale without measure", moe(values(DOWN, 2.0), experts=experts(residual_scale=3e38)), "one/model",
            "in float32"),
    mixture("infinite noise", moe(experts=experts(noise_scale=float("inf"))), "moe.yaml: experts[0].noise_scale"),
    mixture("an expert of NaN", moe(values(UP, float("nan"))), "one/model.safetensors: ", "NaN or Inf"),
    mixture("a base whose hidden states are NaN", moe(values("model.layers.0.mlp.up_proj.weight", 3e38, "base")),
            "base: ", "gate.weight", "NaN or Inf"),
    mixture("a prompt longer than the context", moe(experts=experts(positive_prompts=["w5 " * 300])),
            "base/config.json: ", "301 tokens", "context, 256"),
    mixture("a prompt of no token", moe(experts=experts(positive_prompts=[7])), "positive_prompts"),
    *(mixture(f"{key} {value!r:.20}", moe(**{key: value}), f"moe.yaml: {key}") for key, value in (
        ("experts_per_token", 0), ("experts_per_token", 3), ("experts_per_token", HUGE), ("experts_per_token", 1.5),
        ("experts", None), ("experts", {}), ("experts", [1]), ("layers", [LAYER] * 2), ("architecture", "foo"),
        ("layers", [LAYER | {"experts": [0, 5]}]), ("layers", [LAYER | {"scale": [1]}] * 3), ("random_seed", 2**63),
        ("gate_mode", "hiden"))),
    *(mixture(f"an expert {name!r:.20}", moe(experts=experts(source_model=name)), "moe.yaml: ") for name in (
        "../outside/one", "s3://b/../x", "hf://a/b", "", 7, "owner/..", "o" * 300, "http://[::1/x", "zoo:../x")),
    *(mixture(f"over {what}", moe(thesis(), out=out, options=OVER), f"{out}: ", says) for what, out, says in (
        ("a thesis", "out", "'thesis.tex'"), ("the base", "base", "which this command reads"),
        ("an expert", "one", "which this command reads"), ("the recipe", "moe.yaml", "is a file"),
        ("a place in an expert", "one/x", "lies inside of"))),
]  # fmt: skip

# ---------------------------------------------------------------------------------------------------------------
# Adapters that are made, and that are read


@changing
def extract(
    world: World, *options: str, change: Change = lambda world: None, model: str = "one", out: str = "out"
) -> tuple[str, ...]:
    change(world)
    return ("extract-lora", model, out, "--base", "base", "--max-rank", "2", *options)


def extracted(name: str, change: Change, *says: str, **more: Any) -> Case:
    return Case(f"extract-lora: {name}", change, says, **more)


WARNED: dict[str, Any] = {"status": 0, "leaves": ("out",), "lines": 1}
EXTRACTED = [
    extracted("a name of a module with a slip", extract("--save-module", "embed_token"),
              "warning: --save-module embed_token: there is no such module (did you mean 'embed_tokens'?)", **WARNED),
    extracted("an exclusion of nothing", extract("-e", "zzz"), "warning: --exclude-regex 'zzz': matches no", **WARNED),
    extracted("a choice of nothing", extract("-i", "zzz"), "--include-regex 'zzz': matches no module", "options leave",
              lines=2),
    extracted("a share that is no number", extract("--energy", "nan"), "--energy", "nan is no number"),
    extracted("sizes without measure", extract("--sv-epsilon", "inf", "-i", "mlp"), "options leave out"),
    extracted("an expression that is none", extract("-e", "("), "--exclude-regex: the pattern '('"),
    extracted("the name of a GGUF file", extract(out="out.gguf"), "out.gguf: is the name of a GGUF file"),
    extracted("NaN", extract(change=values(UP, float("nan"))), "one/model.safetensors: ", "NaN or Inf"),
    *(extracted(f"over {what}", extract("--overwrite", change=thesis(), out=out), f"{out}: ", says)
      for what, out, says in (("a thesis", "out", "'thesis.tex'"), ("the base", "base", "this command reads"),
                              ("the model", "one", "this command reads"), ("a file", "tasks.jsonl", "is a file"))),
    *(extracted(f"a {what} where the marker of an output would be", extract("--overwrite", change=together(
        thesis(), make)), "out/", "no regular file") for what, make in (
            ("pipe", pipe("out/evojax_merge.json")), ("device", lambda world: link("/dev/zero")(
                world / "out/evojax_merge.json")), ("pipe for the card", pipe("out/README.md")))),
]  # fmt: skip
ATTENTION = "base_model.model.model.layers.0.self_attn.q_proj"
FACTORS = {f"{ATTENTION}.lora_A.weight": (4, 48), f"{ATTENTION}.lora_B.weight": (48, 4)}
MERGE = ("merge", "recipe.yaml", "out")
EXPORTS = [
    Case("tokenizer_source: an embedding without an axis, of another architecture", together(
        edited(lambda tensors: tensors.update({EMBEDDING: tensors[EMBEDDING][0, 0].clone()}), "two/model.safetensors"),
        lambda world: world.edit("recipe.yaml", tokenizer_source="base")),
        ("/two: ", EMBEDDING), (*MERGE, "--allow-crimes")),
    *(Case(f"export: a recipe that is {what}", lambda world, make=make: (finished_run(world), make(world), (
        "export", "run", "out"))[2], ("run/best/recipe.yaml: ", says)) for what, make, says in (
            ("a pipe", pipe("run/best/recipe.yaml"), "a pipe"),
            ("not UTF-8", text("run/best/recipe.yaml", b"\xff"), "UTF-8"))),
    Case("export: an adapter by the name of a GGUF file", lambda world: (finished_run(world), (
        "export", "run", "out.GGUF", "--as", "adapter", "--rank", "2"))[1], ("out.GGUF",)),
]  # fmt: skip
ADAPTERS = [
    Case(f"adapter: {key} {value!r:.20}", adapter(FACTORS, **{key: value}), (f"adapter_config.json: {key}",), MERGE)
    for key, value in (
        ("lora_alpha", HUGE), ("lora_alpha", 1e308), ("lora_alpha", float("nan")), ("alpha_pattern", {"q_proj": HUGE}),
        ("r", HUGE), ("rank_pattern", {"q_proj": HUGE}),
    )
]  # fmt: skip

# ---------------------------------------------------------------------------------------------------------------
# Tokenizers of donors


@changing
def transplant(
    world: World, *options: str, change: Change = lambda world: None, donor: str = "donor", out: str = "out"
) -> tuple[str, ...]:
    """`one` with the tokenizer of `donor`, which is `two` with 40 tokens, of which 16 are its own."""
    from safetensors.numpy import load_file, save_file

    shutil.copytree(world / "two", world / "donor")
    tensors = load_file(world / "donor/model.safetensors")
    save_file(tensors | {EMBEDDING: tensors[EMBEDDING][:40]}, world / "donor/model.safetensors", {"format": "pt"})
    world.edit("donor/config.json", vocab_size=40)
    tokens = json.loads((world / "donor/tokenizer.json").read_text())
    vocabulary = tokens["model"]["vocab"]
    tokens["model"]["vocab"] = {(f"z{i}" if i > 23 else token): i for token, i in vocabulary.items() if i < 40}
    world.write("donor/tokenizer.json", json.dumps(tokens))
    change(world)
    return ("transplant-tokenizer", "one", donor, out, *options)


def donors(edit: Callable[[Any], Any]) -> Change:
    """The donor's embedding, changed."""
    return edited(lambda tensors: tensors.update({EMBEDDING: edit(tensors[EMBEDDING])}), "donor/model.safetensors")


def numbered(world: World) -> None:
    """The donor's last token, by a number without measure."""
    tokens = json.loads((world / "donor/tokenizer.json").read_text())
    tokens["model"]["vocab"]["z39"] = 4 * 10**9
    world.write("donor/tokenizer.json", json.dumps(tokens))


def transplanted(name: str, change: Change, *says: str, **more: Any) -> Case:
    return Case(f"transplant: {name}", change, says, **more)


TRANSPLANTED = [
    transplanted("settings of generation that are garbage", transplant(
        change=text("donor/generation_config.json", "{")), "donor/generation_config.json: ", "not valid JSON"),
    *(transplanted(f"an embedding of {what}", transplant(change=donors(edit)), "/donor: ", EMBEDDING, "float matrix",
                   lines=2)
      for what, edit in (("one axis", lambda rows: rows[:, 0].clone()), ("no column", lambda rows: rows[:, :0].clone()),
                         ("no row", lambda rows: rows[:0].clone()), ("integers", lambda rows: rows.int()),
                         ("three axes", lambda rows: rows[:, :, None].clone()))),
    transplanted("no embedding", transplant(change=edited(
        lambda tensors: tensors.pop(EMBEDDING), "donor/model.safetensors")), "/donor: ", "no such tensor", lines=2),
    transplanted("a token of number 4,000,000,000", transplant(change=numbered), "/donor: ", "4,000,000,000"),
    *(transplanted(f"over {what}", transplant("--overwrite", change=thesis(), out=out), f"{out}: ", says, lines=lines)
      for what, out, says, lines in (
          ("a thesis", "out", "'thesis.tex'", 1), ("the donor", "donor", "this command reads", 1),
          ("a place in the donor", "donor/x", "lies inside of", 2))),
]  # fmt: skip

# ---------------------------------------------------------------------------------------------------------------
# GGUF files that are written

I64 = 11
TO_GGUF = ("merge", "recipe.yaml", "out.gguf")


@changing
def written(world: World, edit: Callable[[bytes], bytes] = lambda content: content) -> tuple[str, ...]:
    """A GGUF file of ours where the output will be, and what another program has made of it."""
    from helpers.commands import run_here

    file()(world)
    run_here("merge", world / "recipe.yaml", world / "out.gguf")
    (world / "out.gguf").write_bytes(edit((world / "out.gguf").read_bytes()))
    return (*TO_GGUF, "--overwrite")


def requantised(content: bytes) -> bytes:
    """The file as llama-quantize marks it: Q4_K_M."""
    before, key, behind = content.partition(b"general.file_type")
    return before + key + behind[:4] + struct.pack("<I", 15) + behind[8:]


GGUF = [
    Case("gguf out: over a file of ours", written(), status=0, rewrites=("out.gguf",)),
    Case("gguf out: over a file of ours that another program has quantised", written(requantised),
         ("out.gguf: exists, and is no GGUF file of evojax-merge",)),
    *(Case(f"gguf out: a key that is {what}", file(lambda gguf, value=value: gguf.metadata.append(("x.y", value))),
           command=TO_GGUF, status=0, leaves=("out.gguf",)) for what, value in {
        "a list of large numbers": listed(U64, 2, struct.pack("<2Q", 2**40, 2**63)),
        "a list of low numbers": listed(I64, 1, struct.pack("<q", -2**40)),
        "a list of wide floats": listed(F64, 1, struct.pack("<d", 1e300)), "a list of nothing": listed(TEXT, 0),
        "a list of lists of nothing": Raw(LIST, struct.pack("<IQ", LIST, 1) + struct.pack("<IQ", U8, 0)),
        "a low number": Raw(I64, struct.pack("<q", -2**40)), "a wide float": Raw(F64, struct.pack("<d", 1e300)),
        "NaN": Raw(F64, struct.pack("<d", float("nan"))), "a large number": 2**63, "no text": "",
    }.items()),
]  # fmt: skip
CASES: list[Case] = [*MIXTURES, *EXTRACTED, *ADAPTERS, *EXPORTS, *TRANSPLANTED, *GGUF]
