"""What may be said about a network: its parameters, their bounds, the image sizes it takes.

A model arrives at a hospital as a name and plain values. Types and bounds are declared here, so
that a message can neither import code nor ask for a network of absurd size. Nothing here
imports torch: a policy can check a request without it.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from fedmed.errors import ModelError
from fedmed.types import Scalar, TaskKind

Value = bool | int | float | str | tuple[int, ...]
Values = Mapping[str, Value]

LIST_MODELS = "see `fedmed list models`"


def suggest(word: str, known: Iterable[str]) -> str:
    """``", did you mean 'x'?"`` for the nearest known word, or an empty string."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f", did you mean {near[0]!r}?" if near else ""


@dataclass(frozen=True)
class Param:
    """One parameter of a network; its type is the type of its default.

    Attributes:
        default: value when none is given.
        low: least number allowed (each entry of a tuple).
        high: largest number allowed.
        choices: the allowed words of a text parameter.
        per_axis: an integer that may also be given as one integer a spatial dimension.
    """

    default: Value
    low: float = 1
    high: float = math.inf
    choices: tuple[str, ...] = ()
    per_axis: bool = False

    def check(self, where: str, value: object, dims: int) -> Value:
        """Return ``value`` in canonical form (tuples for lists, floats for integers).

        Raises:
            ModelError: wrong type, out of bounds, or not one of the choices.
        """
        if self.choices:
            if isinstance(value, str) and value in self.choices:
                return value
            raise ModelError(
                f"{where}={value!r} is unknown{suggest(str(value), self.choices)}",
                f"choose one of {', '.join(self.choices)}",
            )
        if isinstance(self.default, bool):
            if isinstance(value, bool):
                return value
            raise ModelError(f"{where}={value!r} is not true or false", "give true or false")
        if isinstance(value, list | tuple) and (isinstance(self.default, tuple) or self.per_axis):
            if self.per_axis and len(value) != dims:
                raise ModelError(
                    f"{where} has {len(value)} entries, the images have {dims} dimensions",
                    "give one integer, or one a dimension",
                )
            if not 1 <= len(value) <= 16:
                raise ModelError(f"{where} has {len(value)} entries", "give 1 to 16 integers")
            return tuple(self._integer(where, entry) for entry in value)
        if isinstance(self.default, tuple):
            raise ModelError(f"{where}={value!r} is not a list", "give a list of integers")
        if isinstance(self.default, float):
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ModelError(f"{where}={value!r} is not a number", "give a number")
            self._bounds(where, value)
            return float(value)
        return self._integer(where, value)

    def _integer(self, where: str, value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise ModelError(f"{where}={value!r} is not an integer", "give an integer")
        self._bounds(where, value)
        return value

    def _bounds(self, where: str, value: float) -> None:
        if not self.low <= value <= self.high:
            raise ModelError(
                f"{where}={value} is outside [{self.low:g}, {self.high:g}]", LIST_MODELS
            )


@dataclass(frozen=True)
class SizeRule:
    """Which image sizes a network can take.

    Attributes:
        multiple: each side must be a multiple of this, one integer a dimension.
        minimum: least side.
        bottom: least number of positions left at the coarsest scale (``size / multiple``);
            instance normalisation needs two.
        remedy: which parameters change the rule.
    """

    multiple: tuple[int, ...]
    minimum: tuple[int, ...]
    bottom: int = 1
    remedy: str = ""

    def fits(self, size: tuple[int, ...]) -> bool:
        """Whether images of ``size`` can pass through the network."""
        positions = math.prod(s // m for s, m in zip(size, self.multiple, strict=True))
        return (
            all(s % m == 0 for s, m in zip(size, self.multiple, strict=True))
            and all(s >= m for s, m in zip(size, self.minimum, strict=True))
            and positions >= self.bottom
        )

    def nearest(self, size: tuple[int, ...]) -> tuple[int, ...]:
        """The least size that fits and is nowhere smaller than ``size``."""
        up = tuple(
            max(-(-s // m), -(-least // m)) * m
            for s, m, least in zip(size, self.multiple, self.minimum, strict=True)
        )
        return up if self.fits(up) else tuple(u + m for u, m in zip(up, self.multiple, strict=True))

    def describe(self) -> str:
        """The rule in words."""
        words = (
            [f"each side a multiple of {_axes(self.multiple)}"] if max(self.multiple) > 1 else []
        )
        if self.bottom > 1:
            words.append(f"at least one side {_axes(tuple(2 * m for m in self.multiple))} or more")
        elif any(low > m for low, m in zip(self.minimum, self.multiple, strict=True)):
            words.append(f"each side at least {_axes(self.minimum)}")
        return " and ".join(words) or "any size"


def _axes(values: tuple[int, ...]) -> str:
    return str(values[0]) if len(set(values)) == 1 else str(list(values))


@dataclass(frozen=True)
class ModelEntry:
    """A network of the allow-list.

    Attributes:
        name: what ``model=`` calls it.
        dims: spatial dimensions it can be built for.
        tasks: kinds of task it can learn.
        params: its parameters.
        description: one line, with the paper.
        head: prefix of the tensors whose shape depends on the task's classes.
        sizes: image sizes that fit, from the resolved parameters and dimensions.
    """

    name: str
    dims: tuple[int, ...]
    tasks: tuple[TaskKind, ...]
    params: Mapping[str, Param]
    description: str
    head: str
    sizes: Callable[[Values, int], SizeRule]

    @property
    def defaults(self) -> Values:
        """Parameter values when none are given."""
        return {name: param.default for name, param in self.params.items()}

    @property
    def is_segmentation(self) -> bool:
        """Whether it answers a map (else one vector an image)."""
        return TaskKind.SEGMENTATION in self.tasks

    def resolve(self, params: Mapping[str, Scalar | tuple[Scalar, ...]], dims: int) -> Values:
        """Check ``params`` and fill in the defaults; None stands for the default.

        Raises:
            ModelError: an unknown parameter, or a value of the wrong type or size.
        """
        for key in params:
            if key not in self.params:
                raise ModelError(
                    f"model {self.name} has no parameter {key!r}{suggest(key, self.params)}",
                    f"it takes {', '.join(self.params) or 'none'}",
                )
        return {
            name: param.default
            if params.get(name) is None
            else param.check(f"model.params.{name}", params[name], dims)
            for name, param in self.params.items()
        }
