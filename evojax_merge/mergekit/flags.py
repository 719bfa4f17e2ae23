"""The options of mergekit's command line, for scripts that were written for it."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import click

# mergekit's options without a meaning here: switches, options with a value, and others. Options with a meaning are
# options of `merge`, under mergekit's names.
_SWITCHES = (
    "async-write", "clone-tensors", "cuda", "lazy", "lazy-unpickle", "low-cpu-memory", "multi-gpu",
    "read-to-gpu", "safe-serialization", "trust-remote-code", "unsafe-truncate-embeddings",
)  # fmt: skip
_VALUES = ("device", "lora-merge-cache", "lora-merge-dtype", "write-threads")
_OTHERS: Mapping[tuple[str, ...], dict[str, Any]] = {
    ("-j", "--num-threads"): {}, ("-v", "--verbose", "verbosity"): {"count": True}, ("--gpu-rich",): {"is_flag": True},
}  # fmt: skip
# The options of mergekit's other programs that mergekit-yaml lacks: the programs that have them, and their replacement.
_LEGACY = "mergekit-legacy or mergekit-layershuffle; write what is merged as a recipe"
_MOE = "mergekit-moe, which makes a mixture of experts; that is evojax-merge moe"
_TOKENS = "mergekit-tokensurgeon, which gives a model other tokens; a recipe aligns tokens by tokenizer_source"
_LORA = "mergekit-extract-lora; that is evojax-merge extract-lora"
_MULTI = "mergekit-multi or mergekit-extract-lora; a merge takes RECIPE, of any number of documents, and OUT"
_MODELS = "mergekit-legacy, mergekit-layershuffle or mergekit-extract-lora; a recipe names the models"
# The names of those options: switches, and options with a value.
_OTHER_SWITCHES = {
    "--fp16/--no-fp16": "mergekit's bakllama or mergekit-layershuffle; the dtype of a merge is --dtype float16",
    **dict.fromkeys(("--bf16/--no-bf16", "--int8-mask/--no-int8-mask", "--naive-count/--no-naive-count"), _LEGACY),
    **dict.fromkeys(("--normalize/--no-normalize", "--print-yaml/--no-print-yaml", "--dry-run"), _LEGACY),
    "--full-random/--no-full-random": _LEGACY,
    **dict.fromkeys(("--cosine-similarity/--no-cosine-similarity", "--magikarp/--no-magikarp"), _TOKENS),
    **dict.fromkeys(("--distribute-scale/--no-distribute-scale", "--embed-lora/--no-embed-lora"), _LORA),
    "--skip-undecomposable": _LORA,
    **dict.fromkeys(("--load-in-4bit", "--load-in-8bit", "--i-understand-this-is-not-useful-without-training"), _MOE),
}
_OTHER_VALUES = {
    **dict.fromkeys(("--base-model", "--model"), _MODELS),
    **dict.fromkeys(("--intermediate-dir", "--out-path"), _MULTI),
    **dict.fromkeys(("--merge", "--method", "--density", "--weight", "--write-yaml"), _LEGACY),
    **dict.fromkeys(("--approximation-method", "--batch-size", "--k", "--weight-scheme", "--subword-method"), _TOKENS),
    **dict.fromkeys(("--prefix-match", "--byte-match", "--new-vocab-noise", "--new-vocab-scale"), _TOKENS),
    **dict.fromkeys(("--max-rank", "--save-module", "--exclude-regex", "--include-regex", "--sv-epsilon"), _LORA),
}
_OF_OTHERS = _OTHER_SWITCHES | _OTHER_VALUES
_GIVEN = "evojax_merge.mergekit.flags"
SIZES = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}


class ShardSize(click.ParamType):
    """Bytes, as mergekit writes them: 5B is 5 * 10^9."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        # transformers writes 5GB.
        number = value.rstrip("BbGgKkMm")
        unit = value[len(number) :].lower()
        unit = {"kb": "k", "mb": "m", "gb": "b", "g": "b"}.get(unit, unit)
        is_number = number.isascii() and number.isdigit() and len(number) < 20
        if not is_number or int(number) < 1 or unit not in SIZES:
            self.fail(f"{value!r}; expected a number of bytes such as 500M or 5B", param, ctx)
        return int(number) * SIZES[unit]


def without_meaning(command: Callable[..., Any], taken: Collection[str] = ()) -> Callable[..., Any]:
    """Add options that are accepted and change nothing, hidden from --help; `given_without_meaning` lists the given
    ones. Options of mergekit's other programs end the command with a line that names the program, but for those `taken`
    by the command itself."""
    plain = [(f"--{name}/--no-{name}",) for name in _SWITCHES] + [(f"--{name}",) for name in _VALUES]
    others = {names: kind for names, kind in _OTHERS.items() if set(taken).isdisjoint(names)}
    for names, kind in [*((names, {}) for names in plain), *others.items()]:
        command = click.option(*names, **kind, hidden=True, expose_value=False, callback=_given)(command)
    for name in (name for name in _OF_OTHERS if name not in taken):
        flag: dict[str, Any] = {"is_flag": True, "default": None} if name in _OTHER_SWITCHES else {"multiple": True}
        command = click.option(name, **flag, hidden=True, expose_value=False, callback=_given)(command)
    return command


def _given(ctx: click.Context, param: click.Parameter, value: Any) -> Any:
    """Note an option of the command line, or refuse one of another program."""
    if param.name is not None and ctx.get_parameter_source(param.name) is click.core.ParameterSource.COMMANDLINE:
        name = "/".join((*param.opts, *param.secondary_opts))
        if name in _OF_OTHERS:
            raise click.UsageError(f"{name}: an option of {_OF_OTHERS[name]}", ctx)
        ctx.meta.setdefault(_GIVEN, []).append(max(param.opts, key=len))
    return value


def given_without_meaning(ctx: click.Context) -> list[str]:
    """The options of `without_meaning` that the command line has, in its order."""
    return list(ctx.meta.get(_GIVEN, []))
