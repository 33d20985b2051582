"""Frozen records to and from JSON, strictly: unknown, missing or ill-typed fields are refused.

What arrives by message is decoded here and only here, by the declared types of
:mod:`fedmed.types`; nothing is instantiated by a name that the text contains.
"""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from enum import StrEnum
from functools import cache
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from fedmed.errors import ConfigError

T = TypeVar("T")


def plain(value: Any, *, skip: frozenset[str] = frozenset()) -> Any:
    """Records to dicts, tuples to lists, enums to their values; scalars as they are.

    Args:
        skip: top-level field names to leave out (arrays travel beside the text).
    """
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value) if f.name not in skip}
    if isinstance(value, StrEnum):
        return value.value
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return value


def encode(record: Any, *, skip: frozenset[str] = frozenset()) -> str:
    """Canonical JSON of a record: sorted keys, no NaN or infinity."""
    return json.dumps(
        plain(record, skip=skip), sort_keys=True, separators=(",", ":"), allow_nan=False
    )


def _wrong(where: str, expected: str) -> ConfigError:
    return ConfigError(f"field {where} is not {expected}", "the sender's version may differ")


def build(kind: Any, value: Any, where: str = "record") -> Any:
    """Value of JSON types to the declared type ``kind``.

    Raises:
        ConfigError: a field is unknown, missing or of another type; named by its path.
    """
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        return _build_union(kind, value, where)
    if is_dataclass(kind) and isinstance(kind, type):
        return _build_record(kind, value, where)
    if origin is tuple:
        if not isinstance(value, list):
            raise _wrong(where, "a list")
        inner = get_args(kind)
        if len(inner) == 2 and inner[1] is Ellipsis:
            return tuple(build(inner[0], v, f"{where}[{i}]") for i, v in enumerate(value))
        if len(inner) != len(value):
            raise _wrong(where, f"a list of {len(inner)}")
        return tuple(
            build(k, v, f"{where}[{i}]") for i, (k, v) in enumerate(zip(inner, value, strict=True))
        )
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, dict):
            raise _wrong(where, "a mapping")
        inner_kind = get_args(kind)[1]
        return {k: build(inner_kind, v, f"{where}.{k}") for k, v in value.items()}
    return _build_scalar(kind, value, where)


def _build_scalar(kind: Any, value: Any, where: str) -> Any:
    if isinstance(kind, type) and issubclass(kind, StrEnum):
        try:
            return kind(value)
        except ValueError as error:
            raise _wrong(where, f"one of {', '.join(kind)}") from error
    if kind is type(None) and value is None:
        return None
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        if not abs(value) <= sys.float_info.max:  # also NaN, and integers that no float holds
            raise _wrong(where, "a finite number")
        return float(value)
    if kind is str and isinstance(value, str) and not _is_unicode(value):
        raise _wrong(where, "text")
    if kind in (int, str, bool) and type(value) is kind:
        return value
    raise _wrong(where, getattr(kind, "__name__", str(kind)))


def _is_unicode(text: str) -> bool:
    """Whether text can be written: JSON's escapes can spell halves of a character."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _build_union(kind: Any, value: Any, where: str) -> Any:
    choices = get_args(kind)
    exact = [c for c in choices if isinstance(c, type) and type(value) is c]
    for choice in (*exact, *choices):
        try:
            return build(choice, value, where)
        except ConfigError:
            continue
    raise _wrong(where, " or ".join(getattr(c, "__name__", str(c)) for c in choices))


@cache
def _hints(kind: type) -> Mapping[str, Any]:
    """Declared types; evaluating them costs more than the rest of a record."""
    return get_type_hints(kind, localns={"np": types.SimpleNamespace(int64=int, generic=int)})


def _build_record(kind: type[T], value: Any, where: str, **given: Any) -> T:
    if not isinstance(value, dict):
        raise _wrong(where, "a mapping")
    hints = _hints(kind)  # type: ignore[arg-type] # classes are hashable
    declared = {f.name: f for f in fields(kind)}  # type: ignore[arg-type]
    for name in value:
        if name not in declared or name in given:
            shown = "".join(c if c.isprintable() else " " for c in name[:64])
            raise ConfigError(f"unknown field {where}.{shown}", "the sender's version may differ")
    out = dict(given)
    for name, f in declared.items():
        if name in value:
            out[name] = build(hints[name], value[name], f"{where}.{name}")
        elif name not in given and f.default is MISSING and f.default_factory is MISSING:
            raise ConfigError(f"missing field {where}.{name}", "the sender's version may differ")
    return kind(**out)


def decode(kind: type[T], text: str, **given: Any) -> T:
    """Record from JSON text; ``given`` holds fields that travel beside the text.

    Raises:
        ConfigError: the text is not JSON or does not fit the record.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{kind.__name__} is not valid JSON", "resend the message") from error
    return _build_record(kind, value, kind.__name__, **given)
