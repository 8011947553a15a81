"""Keyed, counter-based noise: what a sample draws depends on its key and nothing else.

Draws are keyed by (seed, attack, sample id) and then by a stream (restart, step, ...), so that they do
not depend on batch size, order, sharding or resuming, and are the same on every device. The generator
is SplitMix64 (Steele, Lea & Flood 2014): a Weyl sequence through a 64-bit mixer, evaluated at any
counter without state. Integers wrap modulo 2^64 in torch's int64, on CPU and CUDA alike.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor


def _signed(value: int) -> int:
    """The int64 with the same 64 bits."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_MIX_1 = _signed(0xBF58476D1CE4E5B9)
_MIX_2 = _signed(0x94D049BB133111EB)


def _logical_shift(z: Tensor, bits: int) -> Tensor:
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _mix(z: Tensor) -> Tensor:
    z = (z ^ _logical_shift(z, 30)) * _MIX_1
    z = (z ^ _logical_shift(z, 27)) * _MIX_2
    return z ^ _logical_shift(z, 31)


class Noise:
    """One independent random stream for each row of a batch.

    Args:
        keys: int64, shape (B,); equal keys draw equal noise.
    """

    def __init__(self, keys: Tensor) -> None:
        self.keys = keys

    @classmethod
    def for_samples(
        cls, seed: int, purpose: str, sample_ids: Sequence[str], device: str | torch.device = "cpu"
    ) -> Noise:
        """Streams of samples known by stable ids, for one purpose.

        Args:
            seed: of the run.
            purpose: what draws from them, as an attack's kind.
            sample_ids: stable names of the B samples.
            device: where the numbers are drawn.
        """
        texts = (f"{seed}/{purpose}/{name}".encode() for name in sample_ids)
        digests = (hashlib.blake2b(text, digest_size=8).digest() for text in texts)
        keys = [int.from_bytes(digest, "little", signed=True) for digest in digests]
        return cls(torch.tensor(keys, dtype=torch.int64, device=device))

    @classmethod
    def for_rows(cls, n: int, seed: int = 0, device: str | torch.device = "cpu") -> Noise:
        """Streams of anonymous rows: for use of an attack outside an evaluation.

        Args:
            n: number of rows.
            seed: of the streams.
            device: where the numbers are drawn.
        """
        return cls.for_samples(seed, "rows", [str(i) for i in range(n)], device)

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, rows: Tensor) -> Noise:
        return Noise(self.keys[rows])

    def bits(self, count: int, stream: int | Tensor) -> Tensor:
        """``count`` 64-bit words a row, int64, shape (B, count).

        Args:
            count: words a row.
            stream: which stream, one for all rows or int64 of shape (B,); streams are independent.
        """
        streams = torch.as_tensor(stream, dtype=torch.int64, device=self.keys.device)
        start = _mix(self.keys + (streams + 1) * _GOLDEN)
        counter = torch.arange(1, count + 1, dtype=torch.int64, device=self.keys.device)
        return _mix(start[:, None] + counter * _GOLDEN)

    def uniform(self, shape: Sequence[int], stream: int | Tensor) -> Tensor:
        """Uniform on [0, 1), float32, shape (B, *shape), 24 random bits each."""
        count = math.prod(shape)
        words = self.bits((count + 1) // 2, stream)
        halves = torch.stack((words & 0xFFFFFF, _logical_shift(words, 40)), dim=2).flatten(1)[:, :count]
        return (halves.to(torch.float32) * 2.0**-24).view(-1, *shape)

    def normal(self, shape: Sequence[int], stream: int | Tensor) -> Tensor:
        """Standard normal, float32, shape (B, *shape), by Box and Muller's transform."""
        count = math.prod(shape)
        u = self.uniform((2, count), stream)
        radius = torch.sqrt(-2.0 * torch.log1p(-u[:, 0]))
        return (radius * torch.cos(2.0 * math.pi * u[:, 1])).view(-1, *shape)

    def signs(self, shape: Sequence[int], stream: int | Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Rademacher signs -1 or +1, shape (B, *shape), one random bit each."""
        count = math.prod(shape)
        octets = self.bits((count + 63) // 64, stream).view(torch.uint8)
        table = _sign_table(self.keys.device, dtype)
        return table[octets.to(torch.int32)].flatten(1)[:, :count].view(-1, *shape)


_SIGN_TABLES: dict[tuple[str, torch.dtype], Tensor] = {}


def _sign_table(device: torch.device, dtype: torch.dtype) -> Tensor:
    """The eight signs of every byte, shape (256, 8): unpacking bits is one gather."""
    key = (str(device), dtype)
    if key not in _SIGN_TABLES:
        octets = torch.arange(256)[:, None] >> torch.arange(8)[None] & 1
        _SIGN_TABLES[key] = (octets * 2 - 1).to(device=device, dtype=dtype)
    return _SIGN_TABLES[key]
