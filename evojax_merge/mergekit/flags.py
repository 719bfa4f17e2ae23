"""The options of mergekit's command line, for scripts that were written for it."""

from collections.abc import Callable, Mapping
from typing import Any

import click

# What has a meaning here is an option of `merge`, under mergekit's name; these have none: switches, what takes a value,
# and others.
_SWITCHES = (
    "async-write", "clone-tensors", "cuda", "lazy-unpickle", "low-cpu-memory", "multi-gpu",
    "read-to-gpu", "safe-serialization", "trust-remote-code", "unsafe-truncate-embeddings",
)  # fmt: skip
_VALUES = ("device", "lora-merge-cache", "lora-merge-dtype", "write-threads")
_OTHERS: Mapping[tuple[str, ...], dict[str, Any]] = {
    ("-j", "--num-threads"): {}, ("-v", "--verbose", "verbosity"): {"count": True}, ("--gpu-rich",): {"is_flag": True},
}  # fmt: skip
_GIVEN = "evojax_merge.mergekit.flags"
SIZES = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}


class ShardSize(click.ParamType):
    """Bytes, as mergekit writes them: 5B is 5 * 10^9."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        number, unit = (value[:-1], value[-1].lower()) if value[-1:].isalpha() else (value, "")
        if not number.isascii() or not number.isdigit() or int(number) < 1 or unit not in SIZES:
            self.fail(f"{value!r}; expected a number of bytes such as 500M or 5B", param, ctx)
        return int(number) * SIZES[unit]


def without_meaning(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options that are taken and change nothing, hidden from --help; `given_without_meaning` says which were given."""
    plain = [(f"--{name}/--no-{name}",) for name in _SWITCHES] + [(f"--{name}",) for name in _VALUES]
    for names, kind in [*((names, {}) for names in plain), *_OTHERS.items()]:
        command = click.option(*names, **kind, hidden=True, expose_value=False, callback=_note)(command)
    return command


def _note(ctx: click.Context, param: click.Parameter, value: Any) -> Any:
    if param.name is not None and ctx.get_parameter_source(param.name) is click.core.ParameterSource.COMMANDLINE:
        ctx.meta.setdefault(_GIVEN, []).append(max(param.opts, key=len))
    return value


def given_without_meaning(ctx: click.Context) -> list[str]:
    """The options of `without_meaning` that the command line has, in its order."""
    return list(ctx.meta.get(_GIVEN, []))
