"""ChaCha20 as tensor operations: a cryptographic stream made where it is used.

Bernstein's ChaCha (2008) with 20 rounds, a 64-bit block counter and a 64-bit nonce, on int32 lanes
that wrap around as its 32-bit words do. On an accelerator this is much faster than making the
stream on the host and copying it; on the CPU, AES instructions are faster still.
"""

from __future__ import annotations

import os
from typing import Final

import numpy as np
import torch
from torch import Tensor

_CONSTANTS: Final = np.frombuffer(b"expand 32-byte k", dtype="<i4").tolist()
_ROUNDS: Final = 20


class ChaChaStream:
    """Words under a key from the operating system; no block is ever given out twice.

    Args:
        device: where the words are made.
        key: 32 bytes, for known-answer tests alone; by default ``os.urandom``'s.
        nonce: 8 bytes, likewise.
    """

    def __init__(
        self,
        device: torch.device,
        key: bytes | None = None,
        nonce: bytes | None = None,
    ) -> None:
        self._device = device
        self._key = _words(os.urandom(32) if key is None else key)
        self._nonce = _words(os.urandom(8) if nonce is None else nonce)
        self._block = 0

    def integers(self, count: int) -> Tensor:
        """``[count]`` int64 with 64 random bits each."""
        words = self.words((count + 7) // 8)
        return words.view(-1, 2).view(torch.int64).flatten()[:count]

    def words(self, blocks: int) -> Tensor:
        """``[16, blocks]`` int32: each column is the next block of the stream."""
        index = torch.arange(self._block, self._block + blocks, device=self._device)
        self._block += blocks
        counter = torch.stack([index & 0xFFFFFFFF, index >> 32])
        # int64 to int32 keeps the low 32 bits.
        fixed = torch.tensor(_CONSTANTS + self._key, dtype=torch.int32, device=self._device)
        nonce = torch.tensor(self._nonce, dtype=torch.int32, device=self._device)
        start = torch.cat(
            [
                fixed.unsqueeze(1).expand(12, blocks),
                counter.to(torch.int32),
                nonce.unsqueeze(1).expand(2, blocks),
            ]
        )
        a, b, c, d = start.view(4, 4, blocks).clone()
        for _ in range(_ROUNDS // 2):
            a, b, c, d = _quarter_rounds(a, b, c, d)
            # The diagonals become columns, and back.
            b, c, d = b.roll(-1, 0), c.roll(-2, 0), d.roll(-3, 0)
            a, b, c, d = _quarter_rounds(a, b, c, d)
            b, c, d = b.roll(1, 0), c.roll(2, 0), d.roll(3, 0)
        return torch.stack([a, b, c, d]).view(16, blocks).add_(start)


def _quarter_rounds(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> tuple[Tensor, ...]:
    """The quarter round on all four columns at once."""
    a = a + b
    d = _rotate(d ^ a, 16)
    c = c + d
    b = _rotate(b ^ c, 12)
    a = a + b
    d = _rotate(d ^ a, 8)
    c = c + d
    b = _rotate(b ^ c, 7)
    return a, b, c, d


def _rotate(x: Tensor, bits: int) -> Tensor:
    # The right shift of int32 copies the sign: those bits are masked away.
    return (x << bits) | ((x >> (32 - bits)) & ((1 << bits) - 1))


def _words(raw: bytes) -> list[int]:
    words: list[int] = np.frombuffer(raw, dtype="<i4").tolist()
    return words
