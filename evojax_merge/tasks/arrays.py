"""Tasks whose examples are arrays, for models that are pytrees: a JAX function scores a model on some of the rows."""

import zipfile
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import jax
import numpy as np
from pydantic import Field

from evojax_merge.errors import InputError, shown
from evojax_merge.schema.section import Location
from evojax_merge.system.regular_file import check_regular, check_unpacked
from evojax_merge.tasks.function import guard_user_function, load_function
from evojax_merge.tasks.images import image_content, read_rgb
from evojax_merge.tasks.python_functions import is_reference
from evojax_merge.tasks.python_trees import find_tree
from evojax_merge.tasks.task import Derivative, Opening, Place, TaskConfig, TaskDefaults, TaskKind


class ArraysConfig(TaskConfig):
    """A task of models that are pytrees: a function scores a model on rows of arrays, (model, rows) -> float[N].

    Without a `file` it is (model) -> a number, which is the score in every split: there is nothing to hold out.
    """

    kind: Literal["arrays"] = Field(description="the kind of task")
    file: Location | None = Field(
        None, description="an .npz file of arrays, whose first axes are the examples; none: the model alone is scored"
    )
    function: Location = Field(description="FILE.py:NAME or module:name, a function (model, rows) -> float[N]")
    traced: bool = Field(True, description="whether JAX traces the function; false: it is called with each model")


@dataclass(frozen=True)
class ArrayTask(TaskDefaults):
    """A task of models that are pytrees.

    function: (model, rows) -> float[N], higher is better; (model,) -> a number or float[N] where there are no
    `examples`, a pytree of arrays with a leading axis of examples. indices: the numbers of the task's examples, out of
    `count`; by default all. compared: the task as judges have it, where the function returns a text or a name for each
    example, which are compared with each other, in place of scores. traced: whether JAX traces the function. where: the
    task in messages; untraced: what to do about a function that JAX cannot trace; files: what it was made from;
    places: see `paths`; unit: the unit of the scores, in the words of tables. pictures, prompts, targets: the file of
    the image, the question and the right answer of each of the `count` examples, where they have one. answer: (model,
    rows) -> the model's answer to each example in words, where it has any.
    """

    kind: ClassVar[str] = "arrays"
    backend: ClassVar[str] = "function"
    by_example: ClassVar[tuple[str, ...]] = ("indices",)

    name: str
    examples: Any
    function: Callable[..., Any]
    indices: tuple[int, ...] = ()
    count: int = 0
    metric: str = "score"
    weight: float = 1.0
    traced: bool = True
    where: str = "task"
    untraced: str = "say traced: false, or in Python host_callback, and it is called with each merged model"
    files: tuple[Path, ...] = ()
    places: tuple[tuple[str, str], ...] = ()
    compared: Any = None
    unit: str = ""
    pictures: tuple[str, ...] = ()
    prompts: tuple[str | None, ...] = ()
    targets: tuple[str | None, ...] = ()
    answer: Callable[..., Sequence[str]] | None = None

    def __post_init__(self) -> None:
        if not self.count and self.examples is not None:
            count = len(jax.tree.leaves(self.examples)[0])
            object.__setattr__(self, "indices", tuple(range(count)))
            object.__setattr__(self, "count", count)

    @property
    def units(self) -> Mapping[str, str]:
        return {self.metric: self.unit} if self.unit else {}

    @property
    def is_divisible(self) -> bool:
        return self.examples is not None

    def subset(self, examples: Sequence[int]) -> "ArrayTask":
        compared = None if self.compared is None else self.compared.subset(examples)
        return replace(super().subset(examples), compared=compared)

    @cached_property
    def rows(self) -> tuple[Any, ...]:
        """The arguments of the function beside the model: the task's examples, if it has any."""
        if self.examples is None:
            return ()
        if len(self.indices) == self.count:
            return (self.examples,)
        return (jax.tree.map(lambda leaf: leaf[np.asarray(self.indices)], self.examples),)

    @property
    def derivative(self) -> Derivative | None:
        return "linear" if self.traced else None

    def prompt(self, example: int) -> str | None:
        return self.prompts[self.indices[example]] if self.prompts else None

    def image(self, example: int) -> Any:
        if not self.pictures:
            return None
        file = self.pictures[self.indices[example]]
        return read_rgb(file, image_content(file, Path(file)))

    def target(self, example: int) -> str | None:
        return self.targets[self.indices[example]] if self.targets else None

    def contents(self) -> Sequence[tuple[Hashable, Place]]:
        file = self.paths().get("file")
        if file is None:
            return ()
        leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(self.examples)]
        return [(tuple(leaf[i].tobytes() for leaf in leaves), (file, i + 1)) for i in self.indices]

    def paths(self) -> dict[str, str]:
        return dict(self.places)

    def failure_hint(self) -> str:
        return f"Look at what the function of task {self.name} returns"


# NumPy raises these for archives that are none, or whose arrays are not what they say.
MALFORMED = (ValueError, TypeError, AttributeError, EOFError, KeyError, MemoryError, zipfile.BadZipFile)


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz file. Raises InputError for any other file, for arrays of anything but numbers, and for an
    archive that unpacks to far more than its own bytes."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            packed = check_regular(path, "an .npz file")
            check_unpacked(path, sum(member.file_size for member in archive.zip.infolist()), packed)
            # A member that is no .npy file is bytes.
            arrays = {name: np.asarray(archive[name]) for name in archive.files}
    except (*MALFORMED, OSError) as error:
        raise InputError(path, f"is no .npz file of numbers ({' '.join(str(error).split())[:200]})") from None
    for name, array in arrays.items():
        if array.dtype.kind not in "biuf":
            raise InputError(path, f"{name}: an array of {array.dtype}; expected numbers")
    return arrays


def read_examples(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz file, which share their leading axis. Raises InputError for any other file."""
    arrays = read_npz(path)
    check_examples(path, arrays)
    return arrays


def check_examples(where: object, examples: Any) -> None:
    """Raises InputError unless all arrays of a pytree have the same number of rows, 1 or more."""
    leaves = jax.tree.leaves(examples)
    sizes = sorted({np.shape(leaf)[0] if np.ndim(leaf) else 0 for leaf in leaves})
    if len(sizes) != 1 or not sizes[0]:
        hint = "; a list is a pytree of its numbers, np.array makes it an array" * any(map(np.isscalar, leaves))
        raise InputError(where, f"has arrays with leading axes of {sizes}; expected one number of examples{hint}")


def open_arrays(config: ArraysConfig, opening: Opening) -> ArrayTask:
    """The task on the examples of one file. Raises InputError for a fault of the config, the function or the file."""
    function = load_function(
        f"{opening.where}.function", config.function, "model" if config.file is None else "arrays", opening.folder
    )

    def call(*arguments: Any) -> Any:
        with guard_user_function(function.reference):
            return function.call(*arguments)

    make = partial(
        ArrayTask, config.name, function=call, weight=config.weight, traced=config.traced, where=opening.where
    )
    function_place = ("function", function.place)
    if config.file is None:
        if opening.heldout is not None:
            raise InputError(f"{opening.where}.heldout", "is given without `file`; give the searched examples as well")
        return make(None, indices=(0,), count=1, files=function.files, places=(function_place,))
    key, reference = opening.source("file", config.file)
    if is_reference(reference):
        examples = find_tree(f"{opening.where}.{key}", reference)
        check_examples(f"{opening.where}.{'examples' if key == 'file' else key}", examples)
        return make(examples, files=function.files, places=(("file", reference), function_place))
    file = opening.file(key, reference)
    return make(read_examples(file), files=(file, *function.files), places=(("file", str(file)), function_place))


KIND = TaskKind(ArraysConfig, open_arrays, source="file")


def row_of(where: str, scores: Any, as_array: Callable[[Any], Any]) -> Any:
    """A function's result, a number or an array [N], as an array [N]. Raises InputError for anything else."""
    expected = "expected a real number, or one number per example"
    try:
        array = as_array(scores)
    except jax.errors.JAXTypeError:
        raise
    except (TypeError, ValueError):
        raise InputError(where, f"returned {shown(scores)}; {expected}") from None
    if array.ndim > 1 or array.size == 0 or not is_real(array.dtype):
        result = shown(scores) if array.dtype.kind in "OSU" else f"{array.dtype}{list(array.shape)}"
        raise InputError(where, f"returned {result}; {expected}")
    return array.reshape(-1)


def is_real(dtype: Any) -> bool:
    """Return whether a dtype is of real numbers, or of truth values."""
    kinds = (jax.numpy.floating, jax.numpy.integer, jax.numpy.bool_)
    return any(jax.numpy.issubdtype(dtype, kind) for kind in kinds)
