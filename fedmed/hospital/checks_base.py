"""How checks of a hospital's client say what they found, and what they could not look at."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar, overload

T = TypeVar("T")


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at; ``level`` is ``ok``, ``warning`` or ``fault``."""

    name: str
    level: str
    text: str

    def line(self) -> str:
        """For people."""
        return f"{self.level:8s}{self.name:14s}{self.text}"


@dataclass(frozen=True)
class Remark:
    """A finding before it is told which check it comes from."""

    level: str
    text: str


Remarks = Iterator[Remark]


def ok(text: str) -> Remark:
    """It is as it should be."""
    return Remark("ok", text)


def warning(problem: str, remedy: str) -> Remark:
    """The client works all the same, for now."""
    return Remark("warning", f"{problem}; {remedy}")


def fault(problem: str, remedy: str) -> Remark:
    """The client cannot work."""
    return Remark("fault", f"{problem}; {remedy}")


class Missing(Exception):
    """A part of the site cannot be read; its own check says why.

    Attributes:
        part: name of the part, and of the check that reports it.
    """

    def __init__(self, part: str) -> None:
        self.part = part
        super().__init__(part)


class Part(Generic[T]):
    """A property that is read once. What cannot be read raises :class:`Missing` ever after."""

    def __init__(self, read: Callable[[Any], T]) -> None:
        self._read = read
        self._name = read.__name__
        self.__doc__ = read.__doc__

    @overload
    def __get__(self, owner: None, kind: type) -> Part[T]: ...
    @overload
    def __get__(self, owner: Parts, kind: type) -> T: ...
    def __get__(self, owner: Parts | None, kind: type) -> T | Part[T]:
        if owner is None:
            return self
        if self._name not in owner.kept:
            try:
                owner.kept[self._name] = partial(_same, self._read(owner))
            except Missing:
                raise  # a part of this part: that one is to be mended
            except Exception as error:
                owner.kept[self._name] = partial(_gone, self._name, error)
        value: T = owner.kept[self._name]()
        return value


def _same(value: T) -> T:
    return value


def _gone(name: str, error: Exception) -> None:
    raise Missing(name) from error


class Parts:
    """An object whose parts are read once.

    Attributes:
        kept: what gives each part that was read, or raises.
    """

    def __init__(self) -> None:
        self.kept: dict[str, Callable[[], Any]] = {}

    def has(self, part: str) -> bool:
        """Whether a part can be read."""
        try:
            getattr(self, part)
        except Missing:
            return False
        return True

    def need(self, *parts: str) -> None:
        """Raise :class:`Missing` for the first part that cannot be read."""
        for part in parts:
            getattr(self, part)
