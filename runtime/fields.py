"""The types of a dataclass's fields, checked where a value is made: callers in Python may pass anything."""

import operator
import os
import types
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from trt_wan.errors import UsageError, shown


def check_fields(made: Any) -> None:
    """Call in `__post_init__`. Raises UsageError, which names the field, for a value of another type.

    A str in place of a Path, an int in place of a float and a list in place of a tuple are converted.
    """
    for name, kind in _types(type(made)).items():  # type: ignore[arg-type]  # mypy: no class is hashable
        value = getattr(made, name)
        try:
            converted = _as(value, kind)
        except (TypeError, ValueError, OverflowError):
            raise UsageError(
                f"{type(made).__name__}.{name} is {shown(repr(value))}, which is not {_name(kind)}.",
                f"Give {_name(kind)} for {name}.",
            ) from None
        if converted is not value:
            object.__setattr__(made, name, converted)


@cache
def _types(kind: type[Any]) -> dict[str, Any]:
    return get_type_hints(kind)


def _as(value: Any, kind: Any) -> Any:
    """The value as a `kind`. Raises TypeError, ValueError or OverflowError."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return None if value is None and types.NoneType in inner else _first(value, inner)
    if origin is Literal:
        if isinstance(value, str) and value in inner:
            return value
    elif origin is tuple:
        if isinstance(value, list | tuple):
            return tuple(_as(item, inner[0]) for item in value)
    elif origin is Mapping:
        if isinstance(value, Mapping):
            return {_as(key, inner[0]): _as(item, inner[1]) for key, item in value.items()}
    elif kind is Path:
        return value if isinstance(value, Path) else Path(os.fsdecode(value))
    elif kind in (int, float):
        if not isinstance(value, bool | str | bytes):
            return operator.index(value) if kind is int else float(value)
    elif isinstance(value, kind):
        return value
    raise TypeError


def _first(value: Any, kinds: tuple[Any, ...]) -> Any:
    """The value as the first of `kinds` that it can be. Raises TypeError."""
    for kind in _kinds(kinds):
        try:
            return _as(value, kind)
        except (TypeError, ValueError, OverflowError):
            continue
    raise TypeError


def _kinds(inner: tuple[Any, ...]) -> list[Any]:
    return [kind for kind in inner if kind is not types.NoneType]


def _name(kind: Any) -> str:
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return " or ".join([*map(_name, _kinds(inner)), *(["None"] if types.NoneType in inner else [])])
    if origin is Literal:
        return f"one of {', '.join(map(repr, inner))}"
    if origin is tuple:
        return f"a list of {_name(inner[0]).removeprefix('a ').removeprefix('of the class ')}s"
    if origin is Mapping:
        return "a dict"
    names = {Path: "a path", int: "a whole number", float: "a number", str: "a string", bool: "True or False"}
    return names.get(kind, f"of the class {getattr(kind, '__name__', kind)}")
