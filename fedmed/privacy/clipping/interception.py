"""Finds every use of a trainable parameter in a forward pass and hands it to its rule.

Works on functions, not on modules: attention blocks, tied weights, layers called twice, parameters
without a layer are all seen. A parameter that escapes (through C++ or a custom function) still
gets an ordinary gradient, which is noticed after the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from fedmed.privacy.clipping import attention, convolution, elementwise, embedding, linear, norms
from fedmed.privacy.clipping.fallback import vectorised
from fedmed.privacy.clipping.tape import Tape

Rule = Callable[..., Any]

RULES: Mapping[Callable[..., Any], Rule] = MappingProxyType(
    {
        **linear.RULES,
        **convolution.RULES,
        **norms.RULES,
        **elementwise.RULES,
        **embedding.RULES,
        **attention.RULES,
    }
)
"""What to do instead of a torch function when one of its tensors is tracked."""

# These read no more than the shape or the type of their second tensor.
_LIKE = frozenset({Tensor.expand_as, Tensor.view_as, Tensor.reshape_as, Tensor.type_as, Tensor.to})


class Interception(TorchFunctionMode):
    """While active, operations on tracked parameters are recorded on a tape.

    Args:
        tape: of this forward pass.
    """

    def __init__(self, tape: Tape) -> None:
        super().__init__()
        self._tape = tape

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """See ``torch.overrides``."""
        kwargs = kwargs or {}
        if self._tape.tracks(args, kwargs):
            return self._tracked(func, args, kwargs)
        result = func(*args, **kwargs)
        kind = type(result)
        if (kind is Tensor and not result.requires_grad) or kind in (tuple, list):
            self._follow(result, args, kwargs)
        return result

    def _follow(self, result: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Note results that came from the data but do not show it by a gradient."""
        lost = [t for t in _tensors((result,), {}) if not t.requires_grad]
        if lost and any(self._tape.is_data(tensor) for tensor in _tensors(args, kwargs)):
            for tensor in lost:
                self._tape.mark_data(tensor)

    def _tracked(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        if func not in _LIKE and any(map(self._tape.is_data, _tensors(args, kwargs))):
            rule = RULES.get(func)
            if rule is not None:
                return rule(self._tape, *args, **kwargs)
            return self._without_rule(func, args, kwargs)
        found = (self._tape.slot(tensor) for tensor in _tensors(args, kwargs))
        slots = [slot for slot in found if slot is not None]
        result = func(*args, **kwargs)
        for tensor in _tensors((result,), {}):
            self._tape.derive(tensor, slots)
        return result

    def _without_rule(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        if getattr(func, "__name__", "").startswith("is_"):
            return func(*args, **kwargs)  # asks about tensors, makes none
        return vectorised(self._tape, func, args, kwargs)


def _tensors(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[Tensor]:
    for value in (*args, *kwargs.values()) if kwargs else args:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            for element in value:
                if isinstance(element, Tensor):
                    yield element
