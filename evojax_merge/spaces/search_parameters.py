"""The searched parameters of a method with their bounds, and its switches, checked."""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
from merge_kernels import METHODS, Method, Options

from evojax_merge.config.search_config import Bounds, Numbers
from evojax_merge.errors import InputError, did_you_mean
from evojax_merge.mergekit.plan import number, options_from
from evojax_merge.mergekit.schema import check_parent_count
from evojax_merge.plugins import HINT
from evojax_merge.schema.section import FLOAT32_MAX
from evojax_merge.spaces.parameter import ParameterSpace, SearchParameter, uniform_start

Fixed = tuple[tuple[str, tuple[float, ...]], ...]


def find_method(where: str, name: str) -> Method:
    if name not in METHODS:
        raise InputError(where, f"unknown method {name!r}{did_you_mean(name, METHODS)}{HINT}")
    return METHODS[name]


def method_with_base(where: str, name: str, is_base_given: bool, parents: int) -> tuple[Method, bool]:
    """The method of a Python call, and whether the base is among its sources. Raises InputError for an unknown method,
    a base that is missing or not accepted, and a number of parents that the method cannot merge."""
    method = find_method(f"{where}: method", name)
    if method.looks_at:
        what = f"{name} looks at the {method.looks_at} of language models on prompts; expected another method here"
        raise InputError(f"{where}: method", what)
    has_base = method.uses_base(is_base_given)
    if has_base and not is_base_given:
        raise InputError(where, f"base: missing; {name} takes task vectors from a base model")
    if is_base_given and not has_base:
        raise InputError(where, f"base: {name} takes no base; leave it out, or choose another method")
    check_parent_count(f"{where}: parents", method, parents)
    return method, has_base


def options_of(where: str, method: Method, has_base: bool, normalize: bool | None, rescale: Any) -> Options:
    """The method's switches; None: the method's default."""
    switches: dict[str, Any] = {}
    for name, value in (("normalize", normalize), ("rescale", rescale)):
        switch = "normalize_weights" if name == "normalize" and "normalize_weights" in method.yaml_options else name
        if value is not None and switch not in method.yaml_options:
            raise InputError(where, f"{name}: {method.name} has no such switch")
        switches[switch] = value
    return options_from(where, method, switches, has_base)


def parent_groups_of(where: str, groups: Mapping[str, Sequence[str]], parents: Sequence[str]) -> tuple[int, ...]:
    """The number of each parent's group: the named ones in their order, then one for each parent that is in none; ()
    where none is named.

    groups: name -> parents, by their names in `parents`, or patterns of such with `*`, `?` and `[…]`. Raises InputError
    for a name that is no parent's, and for a parent in two groups.
    """
    group_of: dict[int, str] = {}
    for group, patterns in groups.items():
        for pattern in patterns:
            matching = [k for k, name in enumerate(parents) if name == pattern or fnmatchcase(name, pattern)]
            if not matching:
                raise InputError(
                    where, f"parent_groups.{group}: {pattern!r} is none of the parents{did_you_mean(pattern, parents)}"
                )
            for k in matching:
                if group_of.setdefault(k, group) != group:
                    raise InputError(
                        where,
                        f"parent_groups.{group}: {parents[k]!r} is in the group {group_of[k]} as well; expected each "
                        "parent in one group",
                    )
    if not groups:
        return ()
    names = [*groups, *(k for k in range(len(parents)) if k not in group_of)]
    return tuple(names.index(group_of.get(k, k)) for k in range(len(parents)))


def check_active(where: str, active: int | None, space: ParameterSpace) -> None:
    """Raises InputError where a space has no `active` weights, or where layers would have others than their group."""
    if active is None:
        return
    if all(searched.name != "weight" for searched in space.search_parameters):
        raise InputError(where, f"active: {space.method.name} searches no weight here; search it, or leave this out")
    count = space.columns("weight")
    if active > count:
        what = "groups of parents" if space.parent_groups else "parents"
        raise InputError(where, f"active: {active}; expected {count} at most, as many as there are {what}")
    if space.smooth:
        raise InputError(
            where, "active: with smooth, layers between two groups have the weights of both; leave one of the two out"
        )


def search_parameters_of(
    where: str,
    method: Method,
    parents: int,
    searched: Mapping[str, Bounds],
    fixed: Mapping[str, Numbers],
    parent_groups: tuple[int, ...] = (),
) -> tuple[tuple[SearchParameter, ...], Fixed]:
    """The searched parameters, and the value of every other. parent_groups: of parents that share the searched ones
    (see GroupSpace). Raises InputError for unknown parameters and for meaningless bounds."""
    all_names = [parameter.name for parameter in method.parameters]
    for key, names in (("parameters", searched), ("fixed", fixed)):
        for name in names:
            if name not in all_names:
                raise InputError(
                    where, f"{key}.{name}: {method.name} has no such parameter{did_you_mean(name, all_names)}"
                )
    searched_and_fixed = sorted(set(searched) & set(fixed))
    if searched_and_fixed:
        raise InputError(where, f"{searched_and_fixed[0]}: is both searched and fixed")
    open_ = [parameter.name for parameter in method.parameters if parameter.searched]
    for name in searched:
        if name not in open_:
            raise InputError(where, f"parameters.{name}: what is prepared depends on it; give it under fixed")
    if not open_:
        raise InputError(where, f"method: {method.name} has no parameter to search; use evojax-merge merge")
    if not searched:
        # The main parameter of a method (weights, mostly), unless that is fixed.
        first = next((name for name in open_ if name not in fixed), None)
        if first is None:
            raise InputError(where, f"fixed: holds all that {method.name} has to search ({', '.join(open_)})")
        searched = {first: Bounds()}
    if parent_groups and not any(method.parameter(name).per_parent for name in searched):
        raise InputError(where, f"parent_groups: {', '.join(searched)} is no parent's own; leave this out")
    shares = parent_groups or tuple(range(parents))
    search_parameters = tuple(_axis(where, method, name, bounds, shares) for name, bounds in searched.items())
    others = []
    for parameter in method.parameters:
        if parameter.name in searched:
            continue
        if parameter.name not in fixed and parameter.default is None and not parameter.per_parent:
            raise InputError(where, f"{parameter.name}: missing; give it under parameters or under fixed")
        others.append((parameter.name, _fixed(where, method, parameter.name, fixed, parents)))
    _check_bounds(where, method, search_parameters, dict(others), shares)
    return search_parameters, tuple(others)


def constants_of(where: str, method: Method, parents: int, fixed: Mapping[str, Numbers]) -> Fixed:
    """The parameters that prepared arrays depend on, at the given values or their defaults."""
    constants = [parameter.name for parameter in method.parameters if not parameter.searched]
    for name in fixed:
        if name not in constants:
            raise InputError(where, f"fixed.{name}: {method.name} has no such constant{did_you_mean(name, constants)}")
    return tuple((name, _fixed(where, method, name, fixed, parents)) for name in constants)


def _fixed(where: str, method: Method, name: str, fixed: Mapping[str, Numbers], parents: int) -> tuple[float, ...]:
    """The value of a parameter that is not searched: the given one, or that of the uniform merge."""
    values = _numbers(fixed[name]) if name in fixed else uniform_start(method, name, parents)
    return _checked(f"{where}: fixed", method, name, values, parents)


def _check_bounds(
    where: str,
    method: Method,
    search_parameters: Sequence[SearchParameter],
    fixed: dict[str, tuple[float, ...]],
    shares: Sequence[int],
) -> None:
    """Raises InputError where a corner of the bounds has a meaningless value (a DELLA density too near its epsilon,
    say). shares: the gene of each parent."""
    parents = len(shares)
    starts = {axis.name: np.resize(axis.start, max(shares) + 1)[np.array(shares)] for axis in search_parameters}
    for axis in search_parameters:
        if not method.parameter(axis.name).quantised:
            continue
        for value in (axis.low, axis.high):
            given: dict[str, Any] = fixed | starts | {axis.name: (value,)}
            numbers = {name: np.broadcast_to(values, parents) for name, values in given.items()}
            complaint = method.validate(method.options, numbers | {"weight": np.ones(parents)})
            if complaint is not None:
                raise InputError(where, f"parameters.{axis.name}: {complaint}")


def _numbers(values: Numbers) -> tuple[float, ...]:
    return tuple(values) if isinstance(values, list) else (values,)


def _checked(where: str, method: Method, name: str, values: tuple[float, ...], parents: int) -> tuple[float, ...]:
    parameter = method.parameter(name)
    allowed = (1, parents) if parameter.per_parent else (1,)
    if len(values) not in allowed:
        raise InputError(where, f"{name}: {len(values)} numbers; expected {' or '.join(map(str, allowed))}")
    return tuple(number(where, parameter, value) for value in values)


def _axis(where: str, method: Method, name: str, bounds: Bounds, shares: Sequence[int]) -> SearchParameter:
    """The searched parameter with its checked bounds and start. shares: the gene of each parent."""
    parameter, genes = method.parameter(name), max(shares) + 1
    low = parameter.low if bounds.low is None else bounds.low
    high = parameter.high if bounds.high is None else bounds.high
    for key, value in (("low", low), ("high", high)):
        number(f"{where}: parameters.{name}.{key}", parameter, value)
    # Compared in float32, in which two numbers may be one, and their difference none.
    if not np.float32(low) < np.float32(high):
        raise InputError(where, f"parameters.{name}: low {low:g} is not below high {high:g}")
    if high - low > FLOAT32_MAX:
        raise InputError(where, f"parameters.{name}: from low {low:g} to high {high:g} is further than float32 holds")
    if bounds.start is not None:
        start = _numbers(bounds.start)
    elif parameter.start is not None:
        start = (parameter.start,) * (genes if parameter.per_parent else 1)
    elif parameter.default is None and not parameter.per_parent:
        start = ((low + high) / 2,)
    else:
        start = uniform_start(method, name, len(shares))[:genes]
    if bounds.start is not None and not all(low <= value <= high for value in start):
        raise InputError(where, f"parameters.{name}: start {list(start)} is outside [{low:g}, {high:g}]")
    start = _checked(f"{where}: parameters.{name}: start", method, name, start, genes)
    return SearchParameter(name, low, high, tuple(float(np.clip(value, low, high)) for value in start))
