"""Data files -> token batches, and a model's responses to them -> per-example scores. Imports no model and no search.

The functions of this module write down tasks for the Python API. Each returns a section of a config's `tasks`; its
keywords are the section's keys. A kind of task that a plugin adds is such a mapping, with its `kind`.
"""

from collections.abc import Callable
from os import PathLike
from typing import TYPE_CHECKING, Any

from evojax_merge.errors import did_you_mean

__all__ = [
    "GSM", "Arrays", "Classification", "Entropy", "ExactMatch", "Function", "Generation", "Harness", "ImageGeneration",
    "Likelihood", "MultipleChoice", "Network", "Regression", "Retrieval", "Similarity", "TextToText", "Transcription",
]  # fmt: skip


def _kind(kind: str, text: str) -> Callable[..., dict[str, Any]]:
    def task(*, name: str, file: Any, **keys: Any) -> dict[str, Any]:
        return {"kind": kind, "name": name, "file": file, **keys}

    task.__name__ = task.__qualname__ = "".join(map(str.title, kind.split("_")))
    task.__doc__ = text
    return task


# Language models.
Likelihood = _kind("likelihood", "A task whose score is the log-probability of the target.")
MultipleChoice = _kind("multiple_choice", "A task whose score says whether the right choice is the likeliest one.")
ExactMatch = _kind("exact_match", "A task whose score says whether the text that a model writes is the target.")
Generation = _kind(
    "generation", "A task whose score compares the text that a model writes with the target, by a `metric` of texts."
)
Entropy = _kind("entropy", "A task without labels, whose score says how sure a model is of its answers.")
Agreement = _kind(
    "agreement", "A task without labels, whose score says how many neighbours of a candidate answer alike."
)
# Networks of torch.
Classification = _kind("classification", "A task whose score says whether a network's largest output is the label's.")
Regression = _kind("regression", "A task whose score is how near a network's output is to a number.")
TextToText = _kind("text_to_text", "A task whose score compares the text that an encoder and decoder write.")
Transcription = _kind("transcription", "A task whose score compares the text of a sound with the target.")
Similarity = _kind("similarity", "A task whose score says whether embeddings are as near to each other as people say.")
Retrieval = _kind("retrieval", "A task whose score says how early a query finds its document.")
Network = _kind("network", "A task of a network that a `function` of one's own scores.")
ImageGeneration = _kind("image_generation", "A task whose score a `function` gives the pictures of a generator.")


def GSM(*, name: str, source: Any, **keys: Any) -> dict[str, Any]:
    """Worked problems with a number as answer."""
    return {"kind": "gsm", "name": name, "source": source, **keys}


def Harness(lm_eval: str, **keys: Any) -> dict[str, Any]:
    """A task of the lm-eval harness, by its name there."""
    return {"lm_eval": lm_eval, **keys}


def Function(function: Callable[..., Any] | str, *, name: str, file: Any, **keys: Any) -> dict[str, Any]:
    """A task that a function of one's own scores: the function itself, or `path/to/file.py:name`. `inputs` says what it
    is called with."""
    return {"kind": "function", "function": function, "name": name, "file": file, **keys}


def Arrays(
    function: Callable[..., Any] | str, *, name: str, examples: Any = None, heldout: Any = None, **keys: Any
) -> dict[str, Any]:
    """A task of models that are pytrees: a function scores a model on rows of `examples`, (model, rows) -> float[N].

    examples: a pytree of arrays with a leading axis N, or an .npz file; None: the function is (model) -> a number.
    heldout: the share of the examples that the search never sees, or other examples.
    """

    def source(key: str, value: Any) -> Any:
        if value is None or isinstance(value, str | PathLike | float | int):
            return value
        from evojax_merge.tasks.python_trees import hold_tree

        return hold_tree(f"tasks.Arrays: {key}", key, value)

    sources = {"file": source("examples", examples), "heldout": source("heldout", heldout)}
    given = {key: value for key, value in sources.items() if value is not None}
    return {"kind": "arrays", "function": function, "name": name, **given, **keys}


if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        # Python asks for modules of this package as well, and for names of its own.
        names = () if name.startswith("_") else __all__
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}{did_you_mean(name, names)}")


def __dir__() -> list[str]:
    return __all__
