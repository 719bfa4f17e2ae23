"""Tasks that a user's own Python function scores.

The function gets one of three things: the `texts` that a candidate writes, the `log_probabilities` of the targets, or,
compiled into the scoring pass, each row's `logits`. A wrong function must not go unnoticed: the program imports and
inspects it before any long work, and checks the shape and type of every result. The function runs in this process,
where it can use the search's devices; an attempt to end the process is a failure of the function instead.
"""

import contextlib
import importlib
import inspect
import json
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Literal

import click
import jax
import numpy as np
from pydantic import Field, model_validator

from evojax_merge.errors import InputError, PeerLostError, did_you_mean, shown
from evojax_merge.schema.arguments import check_call
from evojax_merge.schema.section import Location, Text, Whole
from evojax_merge.system.user_modules import importing_from, lacks_module, load_file, reference_from_anywhere
from evojax_merge.system.users_traceback import WrongResultError
from evojax_merge.tasks import python_functions
from evojax_merge.tasks.prompts import PromptConfig
from evojax_merge.tasks.task import (
    Derivative,
    Opening,
    Place,
    Responses,
    TaskKind,
    TaskRequests,
)
from evojax_merge.tasks.text import Kind, PromptedTask, check_texts, open_prompted

Inputs = Literal["texts", "log_probabilities", "logits"]
# The arguments of the function.
ARGUMENTS: dict[str, tuple[str, ...]] = {
    "texts": ("records", "texts"),
    "log_probabilities": ("records", "log_probabilities"),
    "logits": ("logits", "targets", "mask"),
    "outputs": ("records", "outputs"),
    "embeddings": ("records", "embeddings"),
    "module": ("records", "module"),
    "arrays": ("model", "rows"),
    "model": ("model",),
    "answers": ("record", "left", "right"),
    "images": ("records", "images"),
    "latents": ("records", "latents"),
}
METRIC = "score"
# Exceptions that mean, to the command line, the end of the command or its user's mistake.
MEANT_FOR_THE_PROGRAM = (InputError, PeerLostError, click.ClickException, click.Abort)
# The functions of os that end or replace a process at once; the rest of the family call these.
ENDS = ("_exit", "execv", "execve")
_OWN_ENDS = threading.RLock()


class FunctionConfig(PromptConfig):
    """A task that a user's own function scores: `module:name` or `path/to/file.py:name`, from the config's folder.

    `inputs`: the function's arguments. `texts`: the records and a candidate's text after each prompt. With the other
    two a candidate is run on the target given the prompt: `log_probabilities`: the records and each target's total
    log-probability; `logits`: a row's logits, targets and mask, with the function traced and compiled into the scoring
    pass.
    """

    earlier_names: ClassVar[Mapping[str, str]] = {"gets": "inputs"}

    kind: Literal["function"] = Field(description="the kind of task")
    function: Location = Field(description="path/to/file.py:name, or module:name, from the config's folder")
    inputs: Inputs = Field("texts", description="what the function is called with, beside the records")
    target: Text = Field(
        "{target}", description="of log_probabilities, logits, shown examples: a template over a record's fields"
    )
    max_new_tokens: Whole = Field(256, ge=1, le=1_000_000, description="of texts: how many tokens a model may write")
    stop: list[Text] = Field([], max_length=100, description="of texts: texts that end what a model writes")

    @model_validator(mode="after")
    def _fits(self) -> "FunctionConfig":
        foreign = ["max_new_tokens", "stop"]
        if self.inputs == "texts":
            # Shown examples have targets, and a prefix is joined to the prompt.
            uses = {"target": self.num_fewshot, "delimiter": self.num_fewshot or self.assistant_prefix}
            foreign = [name for name, used in uses.items() if not used]
        for name in foreign:
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name}: has no meaning where its inputs are {self.inputs}")
        return self


@dataclass(frozen=True)
class UserFunction:
    """A function that the config names. `reference` is that name; `files` are the source files that hold the function;
    `place`: a name that is valid from any folder (see `reference_from_anywhere`)."""

    reference: str
    call: Callable[..., Any]
    files: tuple[Path, ...]
    place: str


@dataclass(frozen=True)
class Traced:
    """A user's function as a reduction of a row's logits. Equal for equal functions: splits share one compiled pass."""

    function: UserFunction

    def __call__(self, logits: jax.Array, targets: jax.Array, mask: jax.Array) -> jax.Array:
        import jax.numpy as jnp

        with guard_user_function(self.function.reference):
            result = jnp.asarray(self.function.call(logits, targets, mask))
        if result.shape or jnp.iscomplexobj(result):
            kind = f"{result.dtype.name}{list(result.shape)}"
            raise WrongResultError(f"{self.function.reference} returned {kind} for a row; expected one real number")
        return result.astype(jnp.float32)


@dataclass(frozen=True, kw_only=True)
class FunctionTask(PromptedTask):
    """A task (tasks.task) whose metric, `score`, a user's function computes."""

    function: UserFunction
    inputs: Inputs

    @property
    def files(self) -> tuple[Path, ...]:
        return (*super().files, *self.function.files)

    def requests(self, tokenizer: Any, context: int) -> TaskRequests:
        requests = super().requests(tokenizer, context)
        if self.inputs != "logits":
            return requests
        logits_fn = Traced(self.function)
        # Traced before anything is compiled with it, so that its exceptions come early, and alone.
        targets = max(len(request.tokens) - request.start for request in requests.scored)
        shapes = (((targets, len(tokenizer)), np.float32), ((targets,), np.int32), ((targets,), np.bool_))
        jax.eval_shape(logits_fn, *(jax.ShapeDtypeStruct(*shape) for shape in shapes))
        return replace(requests, logits_fn=logits_fn)

    def score(self, responses: Responses) -> dict[str, np.ndarray]:
        if self.inputs == "logits":
            return {METRIC: responses.totals.astype(np.float32)}
        inputs: Any = responses.texts if self.inputs == "texts" else responses.totals
        scores = []
        for given in inputs:
            if self.inputs == "log_probabilities" and not np.isfinite(given).all():
                # The function is not called for a candidate that failed.
                scores.append(np.full(self.size, np.nan, np.float32))
                continue
            with guard_user_function(self.function.reference):
                scores.append(checked(self.function, self.function.call(list(self.records), given), self.size))
        return {METRIC: np.stack(scores)}

    @property
    def derivative(self) -> Derivative | None:
        """A traced function is differentiated with its scoring pass; the others have no derivative."""
        return "linear" if self.inputs == "logits" else None

    def score_gradient(self, responses: Responses) -> np.ndarray:
        return np.ones(responses.totals.shape, np.float32)

    def target(self, example: int) -> str | None:
        return None if self.inputs == "texts" else str(self.examples[example].answer)

    def contents(self) -> list[tuple[str, Place]]:
        # Parquet has values, such as dates, that JSON does not have.
        contents = (json.dumps(record, sort_keys=True, default=str) for record in self.records)
        return list(zip(contents, map(self.location, self.examples), strict=True))

    def paths(self) -> dict[str, str]:
        return super().paths() | {"function": self.function.place}

    def failure_hint(self) -> str:
        return f"Look at what the function of task {self.name} returns"


# ---------------------------------------------------------------------------------------------------------------
# From the config and its file to the task


def open_function(config: FunctionConfig, opening: Opening) -> FunctionTask:
    """The task on the records of one file. Raises InputError for a fault of the config, the function or the file."""
    where = opening.where
    function = load_function(f"{where}.function", config.function, config.inputs, opening.folder)
    kind: Kind = "exact_match" if config.inputs == "texts" else "likelihood"
    check_texts(where, config)
    return open_prompted(
        FunctionTask, config, opening, kind, METRIC, has_targets=config.inputs != "texts", function=function,
        inputs=config.inputs,
    )  # fmt: skip


KIND = TaskKind(FunctionConfig, open_function, source="file")


# ---------------------------------------------------------------------------------------------------------------
# A user's code


class UserCodeExited(BaseException):
    """A user's code called a function that ends or replaces its process."""


class FunctionFailed(RuntimeError):
    """A user's code failed with an exception that would have ended the program; the exception is the cause."""


@contextlib.contextmanager
def guard_user_function(name: str) -> Iterator[None]:
    """Run a user's code in the block. Raises FunctionFailed where the code would end the program (`sys.exit`,
    `os._exit`, `os.exec…`) or interrupt it without a signal. A SIGINT or SIGTERM in the block interrupts as always,
    even where the code catches the interruption. A process that the code forks ends at the end of the block: it would
    be a second search."""
    owner, interruptions = os.getpid(), list[BaseException]()

    def instead(end: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            if os.getpid() != owner:
                return real(*arguments, **named)
            raise UserCodeExited(f"os.{end}({', '.join(map(repr, (*arguments, *named.values())))})")

        return call

    def noted(handler: Callable[..., Any]) -> Callable[..., Any]:
        def handle(number: int, frame: Any) -> Any:
            try:
                return handler(number, frame)
            except BaseException as raised:
                interruptions.append(raised)
                raise

        return handle

    # Only the main thread receives signals and can set their handlers.
    handlers: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        numbers = (signal.SIGINT, signal.SIGTERM)
        handlers = {number: handler for number in numbers if callable(handler := signal.getsignal(number))}
    # Functions are traced in several threads, and all of them share `os`.
    with _OWN_ENDS:
        ends = {end: getattr(os, end) for end in ENDS}
        status = 1
        try:
            for number, handler in handlers.items():
                signal.signal(number, noted(handler))
            for end, real in ends.items():
                setattr(os, end, instead(end, real))
            yield
            status = 0
            if interruptions:
                raise interruptions[-1]
        except BaseException as error:
            if isinstance(error, SystemExit):
                status = error.code & 0xFF if isinstance(error.code, int) else int(error.code is not None)
            if isinstance(error, Exception) and not isinstance(error, MEANT_FOR_THE_PROGRAM):
                raise
            if interruptions and not isinstance(error, Exception):
                raise interruptions[-1] from None
            raise FunctionFailed(f"{name} failed ({_one_line(error)})") from error
        finally:
            if os.getpid() != owner:
                ends["_exit"](status)
            for end, real in ends.items():
                setattr(os, end, real)
            for number, handler in handlers.items():
                signal.signal(number, handler)


def _one_line(error: BaseException) -> str:
    text = "; ".join(str(error).splitlines())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def checked(function: UserFunction, returned: Any, count: int) -> np.ndarray:
    """A function's result as float32[count]. Raises WrongResultError with the result's and the expected form."""
    expected = f"expected {count} numbers, one for each record"
    try:
        values = np.asarray(returned)
    except ValueError:
        raise WrongResultError(f"{function.reference} returned rows of different lengths; {expected}") from None
    if values.dtype.kind not in "biuf":
        if values.dtype.kind in "US" and values.shape:
            result = "a list of texts" if isinstance(returned, list) else "texts"
        elif values.dtype.kind == "O" or not values.shape:
            result = shown(returned)
        else:
            result = f"{values.dtype}{list(values.shape)}"
        raise WrongResultError(f"{function.reference} returned {result}; {expected}")
    if values.shape != (count,):
        raise WrongResultError(f"{function.reference} returned {values.dtype}{list(values.shape)}; {expected}")
    return values.astype(np.float32)


# ---------------------------------------------------------------------------------------------------------------
# From its name to the function


def load_function(where: str, reference: str, inputs: str, folder: Path) -> UserFunction:
    """Import the function of a reference: `module:name` or `path/to/file.py:name`, both relative to `folder`, or the
    reference of a function that a Python program has given. Raises InputError where there is no such function, or where
    its signature does not accept the arguments of `inputs`."""
    if python_functions.is_reference(reference):
        python_function = python_functions.find_function(where, reference)
        check_call(where, python_function, ARGUMENTS[inputs], reference, f"inputs: {inputs} calls it")
        return UserFunction(reference, python_function, (), reference)
    place, separator, name = reference.rpartition(":")
    if not (separator and place and name.isidentifier()):
        raise InputError(where, f"{reference!r}; expected module:name or path/to/file.py:name")
    module = users_module(where, place, folder)
    functions = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
    function = getattr(module, name, None)
    if function is None:
        raise InputError(where, f"{place} has no function {name!r}{did_you_mean(name, functions)}")
    if not callable(function):
        raise InputError(where, f"{reference} is of type {type(function).__name__}; expected a function")
    check_call(where, function, ARGUMENTS[inputs], reference, f"inputs: {inputs} calls it")
    place_anywhere = reference_from_anywhere(reference, folder)
    # The file of the module, and of the function where the module only passes it on.
    files = {getattr(module, "__file__", None)}
    with contextlib.suppress(TypeError):  # A partial, or an object that can be called.
        files.add(inspect.getsourcefile(inspect.unwrap(function)))
    sources = (Path(file).resolve() for file in files if file is not None and Path(file).is_file())
    return UserFunction(reference, function, tuple(sorted(sources)), place_anywhere)


def users_module(where: str, place: str, folder: Path) -> ModuleType:
    """The module of a Python file (`place` ends in .py) or of a name, both looked for from `folder` on. Raises
    InputError where there is none, and where it cannot be imported."""
    load = partial(importlib.import_module, place)
    if place.endswith(".py"):
        path = (folder / os.path.expanduser(place)).resolve()
        if not os.path.isfile(path):
            raise InputError(where, f"{place}: no such file, which would be {path}")
        folder, load = path.parent, partial(load_file, path)
    try:
        with importing_from(folder), guard_user_function(place):
            return load()
    except ModuleNotFoundError as error:
        if lacks_module(error, place):
            raise InputError(where, f"there is no module {error.name!r} in {folder.resolve()} or on sys.path") from None
        raise InputError(where, f"{place} cannot be imported ({_described(error, place)})") from None
    except Exception as error:
        cause = (isinstance(error, FunctionFailed) and error.__cause__) or error
        raise InputError(where, f"{place} cannot be imported ({_described(cause, place)})") from None


def _described(error: BaseException, place: str) -> str:
    """An exception in one line, with the line number in the user's file where it was raised."""
    message = _one_line(error)
    if isinstance(error, SyntaxError):
        return message  # Its message names file and line.
    stem = Path(place).stem if place.endswith(".py") else place.rpartition(".")[2]
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).stem == stem]
    return f"line {lines[-1]}: {message}" if lines else message
