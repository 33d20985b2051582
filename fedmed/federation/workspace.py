"""Memory of old weights that holds new ones."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import DTypeLike, NDArray


class Workspace:
    """Gives arrays of a model's few shapes, and the same memory again once nobody holds it.

    To get a gigabyte from the system can take as long as to send it. An array is free when no view
    of it is left: views, buffers and tensors refer to the array whose memory they show, and these
    references are counted. Not safe to use from several threads.
    """

    def __init__(self) -> None:
        self._arrays: list[NDArray[Any]] = []

    def empty(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """A view of an array with any content."""
        for array, held in zip(self._arrays, _references(self._arrays), strict=True):
            if held == _FREE and array.shape == shape and array.dtype == dtype:
                return array.view()
        self._arrays.append(np.empty(shape, dtype))
        return self._arrays[-1].view()


def _references(objects: Sequence[object]) -> list[int]:
    return [sys.getrefcount(each) for each in objects]


_FREE: Final = _references([object()])[0]  # of what only its list holds
