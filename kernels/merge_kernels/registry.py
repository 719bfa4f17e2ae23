"""The registry of merge methods, by name; `register` adds one."""

import inspect
import re
from typing import get_args

from merge_kernels.method import YAML_OPTIONS, Base, Method

METHODS: dict[str, Method] = {}


def register(method: Method) -> Method:
    """Make a method known by its name: recipes, searches and listings take it from then on. Returns it.

    Raises ValueError for a name that is taken (compiled programs know a method by its name), and for a method that
    could not be used.
    """
    if not isinstance(method, Method):
        raise ValueError(f"{method!r} is no merge method; expected a merge_kernels.Method")
    problem = _problem(method)
    if problem is not None:
        raise ValueError(f"merge method {method.name!r}: {problem}")
    METHODS[method.name] = method
    return method


def _problem(method: Method) -> str | None:
    """The reason why a method cannot be registered, or None."""
    names = [parameter.name for parameter in method.parameters]
    settings = [*names, *method.yaml_options]
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", method.name):
        return "the name is no word of letters, digits and _"
    if method.name in METHODS:
        return "the name is registered already; choose another"
    if len(set(settings)) < len(settings):
        return f"{max(settings, key=settings.count)} stands more than once among its parameters and YAML options"
    foreign = [name for name in method.yaml_options if name not in YAML_OPTIONS]
    if foreign:
        return f"{foreign[0]!r} is no YAML option; expected some of {', '.join(YAML_OPTIONS)}, or a Parameter"
    if method.base not in get_args(Base):
        return f"base is {method.base!r}; expected one of {', '.join(get_args(Base))}"
    for attribute in ("interpolates", "copies"):
        parameter = getattr(method, attribute)
        if parameter is not None and parameter not in names:
            return f"{attribute} is {parameter!r}; expected the name of one of its parameters"
    if sum(parameter.quantised for parameter in method.parameters) > 1:
        return "has two quantised parameters; tables have an axis for one"
    for parameter in method.parameters:
        if not parameter.valid_min <= parameter.low < parameter.high <= parameter.valid_max:
            return f"{parameter.name}: bounds [{parameter.low:g}, {parameter.high:g}]; expected low < high, both valid"
    for step in ("prepare", "combine"):
        try:
            inspect.signature(getattr(method, step)).bind("options", "inputs")
        except TypeError:
            return f"{step} does not take two arguments; expected {step}(options, inputs)"
    try:
        hash(method)
    except TypeError as error:
        return f"cannot be hashed ({error}); give tuples in place of lists"
    return None
