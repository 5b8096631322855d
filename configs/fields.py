"""A setting of an experiment is declared once: its default, the values that it may have, and what it means."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any

import msgspec
from ml_collections import ConfigDict, config_dict
from msgspec import Meta

Count = Annotated[int, Meta(ge=1)]
Natural = Annotated[int, Meta(ge=0)]
Share = Annotated[float, Meta(ge=0, le=1)]
Positive = Annotated[float, Meta(gt=0)]
NotNegative = Annotated[float, Meta(ge=0)]
Layers = tuple[Natural, Natural]
Texts = tuple[str, ...]
SomeTexts = Annotated[tuple[str, ...], Meta(min_length=1)]


@dataclasses.dataclass(frozen=True)
class Field:
    """A setting.

    kind: its type and bounds, as msgspec has them; choices: the names that it, or each of its entries, may be; entry:
    called with it, or with each of its entries, and raises ValueError for what cannot be; identifies: whether another
    value makes another experiment.
    """

    default: Any
    kind: Any
    meaning: str
    choices: tuple[str, ...] = ()
    entry: Callable[[Any], object] | None = None
    identifies: bool = True


Fields = Mapping[str, Field]
"""Settings by name."""


def with_defaults(fields: Fields, **defaults: Any) -> Fields:
    """`fields`, some of them with another default."""
    return {**fields, **{name: dataclasses.replace(fields[name], default=value) for name, value in defaults.items()}}


def config_of(fields: Fields) -> ConfigDict:
    """A locked config with the default of every field."""
    config = ConfigDict()
    for name, field in fields.items():
        empty = field.default is None
        config[name] = config_dict.placeholder(_type(field.kind)) if empty else field.default
    return config.lock()


def check(fields: Fields, config: ConfigDict) -> None:
    """Raises ValueError, in one line, for a setting that is unknown or missing and for a value that cannot be."""
    for name in config:
        if name not in fields:
            raise ValueError(f"config.{name} is no setting; {nearest(name, fields)}")
    for name, field in fields.items():
        if name not in config:
            raise ValueError(f"config.{name} is missing; start from base() of the task's configs")
        check_value(name, field, config[name])


def check_value(name: str, field: Field, value: Any) -> None:
    """Raises ValueError where `value` cannot be that of the field."""
    try:
        msgspec.convert(value, field.kind)
    except msgspec.ValidationError as error:
        said = str(error).replace("`", "").replace("array", "tuple").split(" - at ")[0]
        raise ValueError(f"config.{name} {value!r}: {said[:1].lower()}{said[1:]}") from None
    for entry in value if isinstance(value, tuple | list) else (value,):
        if field.choices and entry not in field.choices:
            raise ValueError(f"config.{name} {entry!r} is not known; {nearest(entry, field.choices)}")
        if field.entry is not None:
            try:
                field.entry(entry)
            except ValueError as error:
                raise ValueError(f"config.{name}: {error}") from None


def nearest(name: str, known: Iterable[str]) -> str:
    """What to use instead of an unknown `name`: the names most like it, else all."""
    names = list(known)
    alike = difflib.get_close_matches(name, names, n=3, cutoff=0.6)
    return f"did you mean {' or '.join(alike)}?" if alike else f"use one of {', '.join(names)}"


def _type(kind: Any) -> type:
    """The plain type of a kind: tuple of tuple[int, int] | None."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return _type(next(each for each in typing.get_args(kind) if each is not type(None)))
    if typing.get_origin(kind) is Annotated:
        return _type(typing.get_args(kind)[0])
    return typing.get_origin(kind) or kind
