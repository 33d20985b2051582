"""Randomness that the guarantee rests on: cryptographic, never seeded by a study.

A DP guarantee holds against an adversary who knows everything but the noise. Noise from
``torch.manual_seed`` can be replayed by whoever knows the seed, and Mersenne Twister or Philox
streams can be recovered from their output. Here every bit comes from AES-256 in counter mode
(NIST SP 800-38A) under a key that ``os.urandom`` gave to this process, and that is never
written, sent or derived from a configuration.

What is claimed: computationally unpredictable sampling and noise; uniforms with 53 bits; a
Gaussian by Box and Muller (1958) in double precision, whose tails end at 8.57 standard
deviations per summand (the mass beyond is below 1e-16).

What is not claimed: an exact Gaussian. Doubles are not reals, and the low bits of a single
Box-Muller draw can be inverted to test candidate values (Mironov 2012, doi:10.1145/2382196.2382264;
for DP-SGD Jin et al. 2022, arXiv:2112.05307). As a mitigation every value is the scaled sum of
:data:`SUMMANDS` independent Gaussians, which makes that inversion a search over several doubles
(Holohan and Braghin 2021, doi:10.1007/978-3-030-88428-4_26). It is a mitigation, not a proof, and
timing is not hidden.
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

SUMMANDS = 4
"""Independent Gaussians added up for each value returned."""

_BITS = 53
_CHUNK = 1 << 15  # values worked on at once: the float64 temporaries stay in cache


class SecureGenerator:
    """A cryptographic generator of Gaussians, Bernoulli selections and permutations.

    Each instance has one key a thread, and a process forked from the owner's takes a new key
    before its first draw: no two of them ever share a stream.
    """

    def __init__(self) -> None:
        # One stream a thread: no lock that a fork could leave held.
        self._local = threading.local()

    def normal(
        self,
        shape: int | Sequence[int],
        std: float = 1.0,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """Independent Gaussians with mean 0 and standard deviation ``std``.

        The values are made in float64 on the CPU, then rounded to ``dtype`` and moved.

        Raises:
            ValueError: ``std`` is negative or not finite.
        """
        if not (math.isfinite(std) and std >= 0):
            raise ValueError(f"expected std={std} >= 0 and finite")
        size = (shape,) if isinstance(shape, int) else tuple(shape)
        count = math.prod(size)
        out = torch.empty(count, dtype=torch.float64)
        scale = std / math.sqrt(SUMMANDS)
        for start in range(0, count, _CHUNK):
            piece = out[start : start + _CHUNK]
            piece.copy_(self._gaussian_sums(len(piece))).mul_(scale)
        return out.reshape(size).to(device=device, dtype=dtype)

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

    def _gaussian_sums(self, count: int) -> Tensor:
        """``count`` sums of :data:`SUMMANDS` standard Gaussians, float64."""
        pairs = (count + 1) // 2
        words = self._words(2 * SUMMANDS * pairs).astype(np.float64)
        uniform = torch.from_numpy(words).view(2, SUMMANDS, pairs)
        # (k + 1) / 2^53 lies in (0, 1], so the logarithm is finite.
        radius = uniform[0].add_(1.0).mul_(2.0**-_BITS).log_().mul_(-2.0).sqrt_()
        angle = uniform[1].mul_(2.0 * math.pi * 2.0**-_BITS)
        # The summands of one value come from different (radius, angle) pairs: cosine and sine of
        # the same pair add up to a single Box-Muller draw, and nothing would be gained.
        cosines = (radius * angle.cos()).sum(0)
        sines = (radius * angle.sin_()).sum(0)
        return torch.cat((cosines, sines))[:count]

    def _words(self, count: int) -> NDArray[np.uint64]:
        """``count`` independent uniform integers in ``[0, 2^53)``."""
        raw = self._bytes(8 * count)
        return np.frombuffer(raw, dtype=np.uint64) >> np.uint64(64 - _BITS)

    def _bytes(self, count: int) -> bytes:
        local = self._local
        if getattr(local, "pid", None) != os.getpid():
            cipher = Cipher(algorithms.AES(os.urandom(32)), modes.CTR(os.urandom(16)))
            local.stream = cipher.encryptor()
            local.pid = os.getpid()
        keystream: bytes = local.stream.update(bytes(count))
        return keystream
