"""Names in backticks exist: in docstrings of the package and the kernels, and in all pages."""

import ast
import builtins
import re
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import evojax_merge
from evojax_merge.cli import cli
from evojax_merge.config.documents import keys_of
from evojax_merge.config.search_config import Config

ROOT = Path(__file__).resolve().parent.parent
CODE = sorted([*ROOT.glob("evojax_merge/**/*.py"), *ROOT.glob("kernels/**/*.py")])
PAGES = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("bench/**/*.md")]
    + [ROOT / folder / "README.md" for folder in ("configs", "evojax_merge", "kernels", "tests")]
)
SPAN = re.compile(r"`([^`]+)`")
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
PLAIN = re.compile(
    r"(?<![\w./$'\"#-])(?:[a-z]\w*\.)*(?:[a-z]+(?:_[a-z0-9]+)+|[A-Z][a-z]+(?:[A-Z][a-z0-9]+)+)(?![\w/-])"
)
TYPED = re.compile(r"(?:^|[.;]\s)\s*(\w+): (?:b?float|u?int|bool|str)\d*\[")
NAME = re.compile(r"[A-Za-z_][\w.]*\w(\(.*\))?", re.DOTALL)
Documented = ast.Module | ast.ClassDef | ast.FunctionDef
# Files whose names are no Python names: what is written, read, or lies in a model's folder.
SUFFIXES = (
    ".json", ".jsonl", ".yaml", ".yml", ".png", ".svg", ".toml", ".safetensors", ".gguf", ".jinja", ".bin", ".lock",
    ".cff", ".npz", ".model", ".txt", ".html", ".broken",
)  # fmt: skip
# Libraries whose names pages and docstrings may use.
LIBRARIES = {
    "gguf", "jax", "jnp", "lax", "math", "mergekit", "np", "numpy", "optax", "os", "peft", "py", "pytest", "sys",
    "torch", "transformers", "xla",
}  # fmt: skip
# Names of algorithms, other libraries, tensors and keys of files.
ALLOWED = {
    "AutoMerge", "AutoRound", "DeepSeek", "DeltaNet", "Device.device_kind", "GenProg", "GpuTargetConfigProto",
    "JaxRuntimeError", "LayerNorm", "NearSwap", "NumPy", "PyTorch", "RegMean", "SCB", "SentencePiece", "XLA_FLAGS",
    "absmax",    "adapter_config", "adapter_model", "blk.0.attn_q.weight", "block_sparse_moe.gate", "cfg",
    "continue_final_message", "f_attention_scale", "general.architecture", "generation_config", "inf",
    "merge_and_unload", "mgsm_ja",
    "mgsm_native_cot_ja", "mlp.experts.gate_up_proj", "nested_absmax", "nested_quant_map", "o_proj",
    "process_results", "quant_map", "quant_state.bitsandbytes__nf4", "qweight", "re.fullmatch",
    "rope.dimension_count", "timeout", "tokenizer.ggml.pre", "transformer.wte.weight", "uint8", "use_dora",
    "weight_g_idx", "weight_global_scale", "weight_packed", "weight_scale_2", "weight_scale_inv", "weight_shape",
    "weight_zero_point",
}  # fmt: skip
# One letter, or `sum`, with an index: mathematics.
INDEXED = re.compile(r"([A-Za-z]|sum)_[a-z]")

TESTS = sorted([*ROOT.glob("tests/**/*.py"), *ROOT.glob("bench/**/*.py"), *ROOT.glob("docs/*.py")])


@cache
def trees() -> dict[Path, ast.Module]:
    return {path: ast.parse(path.read_text(encoding="utf-8")) for path in [*CODE, *TESTS]}


@cache
def names(*, tests: bool = False) -> set[str]:
    """Names that the program (and its tests and benchmarks) define: modules, classes, functions, parameters,
    attributes and constants, and strings that are names, such as keys, methods and kinds."""
    known: set[str] = {*cli.commands, *dir(builtins), *project()["optional-dependencies"]}
    for path in [*CODE, *TESTS] if tests else CODE:
        tree = trees()[path]
        known |= {path.stem, path.parent.name}
        for node in ast.walk(tree):
            match node:
                case ast.ClassDef(name=name) | ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                    known.add(name)
                case ast.arg(arg=name) | ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()):
                    known.add(name)
                case ast.alias(name=name, asname=alias):
                    known |= {*name.split("."), alias or name}
                case ast.Constant(value=str(text)) if text.isidentifier() or re.fullmatch(r"[\w./-]+", text):
                    known.add(text)
    return known


@cache
def project() -> Any:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@cache
def config_keys() -> set[str]:
    return {re.sub(r"\[\]", "", key.name) for key in keys_of(Config)}


@cache
def files() -> set[str]:
    """Paths of the repository's files and folders, and every ending of them."""
    known: set[str] = set()
    for path in ROOT.rglob("*"):
        parts = path.relative_to(ROOT).parts
        if parts[0] not in (".git", ".venv", "site", "runs", "out") and "__pycache__" not in parts:
            known |= {"/".join(parts[i:]) for i in range(len(parts))}
    return known


def exists(name: str, *, tests: bool = False) -> bool:
    name = name.partition("(")[0]
    first, *rest = name.split(".")
    if name in ALLOWED or INDEXED.fullmatch(name) or first in LIBRARIES or name.endswith(SUFFIXES):
        return True
    if first == "em":
        return rest[0] in evojax_merge.__all__
    if name in files() or f"{name.replace('.', '/')}.py" in files():
        return True
    keys = config_keys()
    if re.sub(r"\.\d+", "", name) in keys or any(re.fullmatch(key.replace("NAME", r"\w+"), name) for key in keys):
        return True
    return all(part in names(tests=tests) for part in (first, *rest))


def spans(text: str) -> Iterator[str]:
    """Names in backticks of a text: whole spans that are a name, or a call of one."""
    for span in SPAN.findall(text):
        span = " ".join(span.split())
        if NAME.fullmatch(span):
            yield span


def docstrings(tree: ast.Module) -> Iterator[tuple[Documented, str]]:
    for node in ast.walk(tree):
        if isinstance(node, Documented):
            yield node, ast.get_docstring(node) or ""


def plain_names(text: str) -> Iterator[str]:
    """Names of a docstring that stand without backticks, also in the plural: `snake_case`, `CamelCase`, and
    `module.name`."""
    for name in PLAIN.findall(FENCE.sub("", SPAN.sub("", text))):
        singular = name.removesuffix("s")
        yield singular if exists(singular) else name


def undescribed(node: Documented, text: str) -> Iterator[str]:
    """Names that a docstring gives a type, as in `name: float32[P]`, without a field, parameter or variable of it."""
    inside = {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
    inside |= {part.arg for part in ast.walk(node) if isinstance(part, ast.arg)}
    inside |= {part.attr for part in ast.walk(node) if isinstance(part, ast.Attribute)}
    inside |= {part.name for part in ast.walk(node) if isinstance(part, ast.FunctionDef)}
    # Arguments of a call that the docstring itself describes.
    inside |= {name for call in re.findall(r"\w+\(([^)]*)\)", text) for name in re.findall(r"\w+", call)}
    if not isinstance(node, ast.Module):
        yield from (name for name in TYPED.findall(text) if name not in inside)


@pytest.mark.parametrize("path", CODE, ids=lambda path: str(path.relative_to(ROOT)))
def test_names_in_docstrings_exist(path: Path) -> None:
    missing = set()
    for node, text in docstrings(trees()[path]):
        missing |= {name for name in (*spans(text), *plain_names(text)) if not exists(name)}
        missing |= set(undescribed(node, text))
    assert not missing


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_names_in_pages_exist(path: Path) -> None:
    text = FENCE.sub("", path.read_text(encoding="utf-8"))
    assert not {name for name in spans(text) if not exists(name, tests=True)}
