"""Where our step's time goes beside the plain step's: operations are timed and put to a purpose.

The purpose of an operation is that of the innermost function of the engine on the stack, then that
of the autograd node it runs in, then its own. A convolution's backward pass, which a plain step
does in one call, is done in two, for its input and for its weight. What the operations do not
account for of a step that is not watched is "other": Python, autograd, interception, the
allocator.
"""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import CodeType, FrameType
from typing import Any, Final

import torch
from bench_dp_modes import Bench, Step
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fedmed.privacy.clipping import elementwise, embedding, norms
from fedmed.privacy.clipping.convolution import _Convolution
from fedmed.privacy.clipping.correlation import ConvolutionGradient
from fedmed.privacy.clipping.linear import LinearGradient, _Linear
from fedmed.privacy.clipping.outer import WeightGradient
from fedmed.privacy.clipping.tape import Tape

FORWARD: Final = "forward"
INPUTS: Final = "input gradients"
BATCHED: Final = "weight gradients, batched"
FORMED: Final = "weight gradients, by unit"
GRAMS: Final = "Gram norms"
SUMS: Final = "weighted sums"
RULES: Final = "normalisation, elementwise"
OTHER: Final = "other"
PURPOSES: Final = (FORWARD, INPUTS, BATCHED, FORMED, GRAMS, SUMS, RULES, OTHER)

_aten = torch.ops.aten
_PRODUCTS: Final = frozenset({_aten.mm, _aten.bmm, _aten.addmm, _aten.convolution_backward})
# Code objects, not names: a function that is renamed is missed here at once.
_FUNCTIONS: Final[Mapping[CodeType, str]] = {
    LinearGradient._gram.__code__: GRAMS,
    ConvolutionGradient._gram.__code__: GRAMS,
    ConvolutionGradient._pixel_gram.__code__: GRAMS,
    WeightGradient.by_unit.__code__: FORMED,
    WeightGradient.squared_norms.__code__: FORMED,
    Tape.clipped_sum.__code__: SUMS,
}
_LAYERS: Final = frozenset({_Convolution.backward.__code__, _Linear.backward.__code__})
_RULE_FILES: Final = frozenset({norms.__file__, elementwise.__file__, embedding.__file__})


@dataclass(frozen=True)
class Profile:
    """Milliseconds of a step by purpose; they add up to the step's."""

    by_purpose: Mapping[str, float]

    @property
    def total(self) -> float:
        """Milliseconds of a step that is not watched."""
        return sum(self.by_purpose.values())


def measure_profiles(bench: Bench, steps: Mapping[str, Step], laps: int) -> dict[str, Profile]:
    """Profiles by mode, of laps that alternate. The steps must have run before.

    The shortest of the laps counts, for a whole step and for each purpose: what else the machine
    does only adds, and not to both alike.
    """
    whole: dict[str, list[float]] = defaultdict(list)
    watched: dict[str, list[Mapping[str, float]]] = defaultdict(list)
    weights = {tuple(p.shape) for p in bench.network.parameters()}
    for _ in range(laps):
        for mode, step in steps.items():
            started = _now(bench.device)
            step()
            whole[mode].append(_now(bench.device) - started)
            with _Watch(bench.device, weights if mode == "plain" else set()) as watch:
                step()
            watched[mode].append(watch.seconds)
    result = {}
    for mode in steps:
        spent = {
            purpose: 1e3 * min(lap.get(purpose, 0.0) for lap in watched[mode])
            for purpose in PURPOSES
        }
        spent[OTHER] = 1e3 * min(whole[mode]) - sum(spent.values())
        result[mode] = Profile(spent)
    return result


def table(model: str, plain: Profile, ours: Profile) -> str:
    """Both profiles, the excess of ours, and its share of the plain step."""
    head = f"{model:28s} {'plain, ms':>10s} {'ours, ms':>10s} {'excess, ms':>10s} {'of plain':>9s}"
    pairs = [(p, plain.by_purpose[p], ours.by_purpose[p]) for p in PURPOSES]
    lines = [
        f"  {name:26s} {a:10.1f} {b:10.1f} {b - a:+10.1f} {100 * (b - a) / plain.total:+8.1f}%"
        for name, a, b in (*pairs, ("total", plain.total, ours.total))
    ]
    return "\n".join((head, *lines))


class _Watch(TorchDispatchMode):
    """Seconds of the operations that run under it, by purpose.

    Args:
        weights: shapes of the parameters, where autograd forms their gradients itself.
    """

    def __init__(self, device: torch.device, weights: set[tuple[int, ...]]) -> None:
        super().__init__()
        self.seconds: dict[str, float] = defaultdict(float)
        self._device = device
        self._weights = weights | {shape[::-1] for shape in weights}
        self._rule_nodes: set[int] = set()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        purpose = self._purpose(func)
        if func is _aten.convolution_backward.default and self._weights:
            *rest, (through, weight, bias) = args
            first = self._timed(INPUTS, func, (*rest, [through, False, False]), {})
            second = self._timed(BATCHED, func, (*rest, [False, weight, bias]), {})
            return first[0], second[1], second[2]
        return self._timed(purpose, func, args, kwargs)

    def _timed(
        self, purpose: str, func: Callable[..., Any], args: Any, kwargs: Mapping[str, Any]
    ) -> Any:
        started = _now(self._device)
        result = func(*args, **kwargs)
        seconds = _now(self._device) - started
        if purpose == INPUTS and any(
            isinstance(t, Tensor) and tuple(t.shape) in self._weights for t in tree_leaves(result)
        ):
            purpose = BATCHED
        self.seconds[purpose] += seconds
        return result

    def _purpose(self, func: Any) -> str:
        node = torch._C._current_autograd_node()
        purpose = self._of_stack(func) or _of_operation(func)
        if node is None:
            if purpose == RULES:  # what autograd does for it later is its own too
                self._rule_nodes.add(torch._C._autograd._get_sequence_nr() - 1)
            return purpose or FORWARD
        if purpose is None and node._sequence_nr() in self._rule_nodes:
            return RULES
        return purpose or INPUTS

    @staticmethod
    def _of_stack(func: Any) -> str | None:
        frame: FrameType | None = sys._getframe()
        while frame is not None:
            code = frame.f_code
            if code in _FUNCTIONS:
                return _FUNCTIONS[code]
            if code in _LAYERS:  # besides the input's gradient, that of the bias
                return INPUTS if func.overloadpacket in _PRODUCTS else FORMED
            if code.co_filename in _RULE_FILES:
                return RULES
            frame = frame.f_back
        return None


def _of_operation(func: Any) -> str | None:
    name = func.overloadpacket.__name__
    return RULES if "norm" in name or "prelu" in name else None


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    elif torch.get_num_threads() == 1:
        return time.thread_time()  # what others take of the core is not ours
    return time.perf_counter()
