"""Randomness that the guarantee rests on: cryptographic, never seeded by a study.

A DP guarantee holds against an adversary who knows everything but the noise. Noise from
``torch.manual_seed`` can be replayed by whoever knows the seed, and Mersenne Twister or Philox
streams can be recovered from their output. Here every bit comes from AES-256 in counter mode
(NIST SP 800-38A), or from ChaCha20 where the noise is made on an accelerator, under a key that
``os.urandom`` gave to this process and that is never written, sent or derived from a setting.

What is claimed: computationally unpredictable sampling and noise; uniforms with 53 bits; a
Gaussian by Box and Muller (1958) in double precision, whose tails end at 8.57 standard
deviations (the mass beyond is below 1e-16).

What is not claimed: an exact Gaussian. Doubles are not reals, and the low bits of a Box-Muller
double can be inverted to test candidate values (Mironov 2012, doi:10.1145/2382196.2382264; for
DP-SGD Jin et al. 2022, arXiv:2112.05307). Against that the engine adds noise in double precision
and rounds the noisy sum to float32 last: each float32 is then reached by a great many of the
2^106 pairs of uniforms, so which values can occur no longer depends on what the noise was added
to. That is a mitigation, not a proof, it does not hold for a network kept in float64, and timing
is not hidden.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Sequence

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray
from torch import Tensor

from fedmed.privacy.chacha import ChaChaStream

_BITS = 53
_CHUNK = 1 << 17  # values worked on at once: the temporaries stay in cache
_DEVICE_CHUNK = 1 << 22


class SecureGenerator:
    """A cryptographic generator of Gaussians, Bernoulli selections and permutations.

    Each instance has one key a thread, and a process forked from the owner's takes a new key
    before its first draw: no two of them ever share a stream. What is pickled is a generator, not
    its key.
    """

    def __init__(self) -> None:
        # One stream a thread: no lock that a fork could leave held.
        self._local = threading.local()

    def __reduce__(self) -> tuple[type[SecureGenerator], tuple[()]]:
        return SecureGenerator, ()

    def normal(
        self,
        shape: int | Sequence[int],
        std: float = 1.0,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """Independent Gaussians with mean 0 and standard deviation ``std``.

        The values are made in float64 on ``device``, then rounded to ``dtype``.

        Raises:
            ValueError: ``std`` is negative or not finite.
        """
        if not (math.isfinite(std) and std >= 0):
            raise ValueError(f"expected std={std} >= 0 and finite")
        size = (shape,) if isinstance(shape, int) else tuple(shape)
        count = math.prod(size)
        device = torch.device(device)
        out = torch.empty(count, dtype=torch.float64, device=device)
        chunk = _CHUNK if device.type == "cpu" else _DEVICE_CHUNK
        for start in range(0, count, chunk):
            piece = out[start : start + chunk]
            pairs = (len(piece) + 1) // 2
            radius, angle = self._uniforms(pairs, device)
            # (k + 1) / 2^53 lies in (0, 1], so the logarithm is finite.
            radius.add_(1.0).mul_(2.0**-_BITS).log_().mul_(-2.0 * std * std).sqrt_()
            angle.mul_(2.0 * math.pi * 2.0**-_BITS)
            torch.mul(radius, angle.cos(), out=piece[:pairs])
            rest = len(piece) - pairs
            torch.mul(radius[:rest], angle.sin_()[:rest], out=piece[pairs:])
        return out.reshape(size).to(dtype)

    def bernoulli(self, n: int, q: float) -> NDArray[np.int64]:
        """Positions selected when each of ``n`` is taken independently with probability ``q``.

        ``q`` is rounded down to a multiple of 2^-53, so no one is taken more often than asked.

        Raises:
            ValueError: ``q`` outside [0, 1] or ``n`` negative.
        """
        if not 0 <= q <= 1:
            raise ValueError(f"expected q={q} in [0, 1]")
        threshold = np.uint64(math.floor(q * 2.0**_BITS))
        return np.flatnonzero(self._words(n) < threshold).astype(np.int64)

    def permutation(self, n: int) -> NDArray[np.int64]:
        """A uniformly random order of ``0 .. n - 1``.

        Sorts 53-bit keys; two equal keys (probability below n²/2^54) keep their order.
        """
        return np.argsort(self._words(n), kind="stable").astype(np.int64)

    def integers(self, high: int, size: int) -> NDArray[np.int64]:
        """``size`` integers in ``0 .. high - 1``; the bias is at most ``high`` · 2^-53.

        Raises:
            ValueError: ``high`` not in ``1 .. 2^31``.
        """
        if not 1 <= high <= 1 << 31:
            raise ValueError(f"expected high={high} in [1, 2**31]")
        # A double holds the product exactly enough: floor never reaches high.
        uniform = self._words(size).astype(np.float64) * 2.0**-_BITS
        return np.floor(uniform * high).astype(np.int64)

    def _uniforms(self, pairs: int, device: torch.device) -> Tensor:
        """``[2, pairs]`` independent uniform integers in ``[0, 2^53)``, as float64."""
        if device.type == "cpu":
            raw = torch.frombuffer(bytearray(self._bytes(16 * pairs)), dtype=torch.int64)
        else:
            raw = self._device_stream(device).integers(2 * pairs)
        return raw.bitwise_and_((1 << _BITS) - 1).to(torch.float64).view(2, pairs)

    def _words(self, count: int) -> NDArray[np.uint64]:
        """``count`` independent uniform integers in ``[0, 2^53)``."""
        raw = self._bytes(8 * count)
        return np.frombuffer(raw, dtype=np.uint64) >> np.uint64(64 - _BITS)

    def _bytes(self, count: int) -> bytes:
        self._fresh_after_fork()
        keystream: bytes = self._local.stream.update(bytes(count))
        return keystream

    def _device_stream(self, device: torch.device) -> ChaChaStream:
        self._fresh_after_fork()
        streams: dict[torch.device, ChaChaStream] = self._local.device_streams
        if device not in streams:
            streams[device] = ChaChaStream(device)
        return streams[device]

    def _fresh_after_fork(self) -> None:
        local = self._local
        if getattr(local, "pid", None) != os.getpid():
            cipher = Cipher(algorithms.AES(os.urandom(32)), modes.CTR(os.urandom(16)))
            local.stream = cipher.encryptor()
            local.device_streams = {}
            local.pid = os.getpid()
