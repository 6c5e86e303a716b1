"""Randomness by key (spec D2): numbers are a pure function of (seed, step, name, sample, position, column).

There is no generator and no stream position. A draw is a counter-based hash in int32 arithmetic, so it costs about what
`torch.rand` costs, compiles into the kernel that uses it, and gives the same numbers on every device, whatever
else was drawn before it.

The hash works on 32-bit words (all arithmetic modulo 2**32, `>>` logical):

    mix(x)    = x ^= x >> 16;  x *= M1;  x ^= x >> 15;  x *= M2;  x ^= x >> 16
    k0, k1    = the two little-endian words of blake2b("seed/name0/name1/...", 8 bytes)
    t0, t1    = the same for the name ("rows",)
    a(b)      = mix(b ^ mix(step ^ t0)),  b(b) = mix(mix(b + GOLDEN) + mix(step + t1))      for global sample index b
    per extra leading axis i:  a = mix(a + i * GOLDEN),  b = mix(b ^ i)
    column(c) = mix(mix(c ^ k0) + k1)
    h         = (a ^ column(c)) * M1 + b;  h ^= h >> 15;  h *= M2
    uniform   = (h >> 8) / 2**24, in [0, 1)
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

M1, M2, GOLDEN = 0x7FEB352D, 0x846CA68B, 0x9E3779B9


def signed(word: int) -> int:
    """The int32 with the bits of an unsigned 32-bit word (torch has no full uint32 arithmetic)."""
    word &= 0xFFFFFFFF
    return word - (1 << 32) if word >= 1 << 31 else word


@torch.compiler.assume_constant_result
def key_words(seed: int, *name: str) -> tuple[int, int]:
    """Two 32-bit words for a name under a seed, as signed int32 values."""
    digest = hashlib.blake2b("/".join([str(seed), *name]).encode(), digest_size=8).digest()
    return signed(int.from_bytes(digest[:4], "little")), signed(int.from_bytes(digest[4:], "little"))


def key_generator(seed: int, *name: str) -> torch.Generator:
    """A CPU generator for one-off draws (initial weights), seeded by name so that order never matters."""
    k0, k1 = key_words(seed, *name)
    return torch.Generator().manual_seed(((k0 & 0xFFFFFFFF) << 32 | (k1 & 0xFFFFFFFF)) >> 1)


def mix(x: Tensor) -> Tensor:
    """A bijective 32-bit finaliser with full avalanche (the "lowbias32" constants)."""
    x = (x ^ ((x >> 16) & 0xFFFF)) * M1
    x = (x ^ ((x >> 15) & 0x1FFFF)) * signed(M2)
    return x ^ ((x >> 16) & 0xFFFF)


def hash_uniform(a: Tensor, b: Tensor, column: Tensor) -> Tensor:
    """The last round of the hash, on the full tensor: U[0, 1) in the default float type, float32 at the least."""
    h = (a ^ column).mul_(M1).add_(b)
    h ^= (h >> 15).bitwise_and_(0x1FFFF)
    h.mul_(signed(M2)).bitwise_right_shift_(8).bitwise_and_(0xFFFFFF)
    return h.to(torch.promote_types(torch.get_default_dtype(), torch.float32)).mul_(2.0**-24)


@torch.library.custom_op("pdlightning::hash_rows", mutates_args=())
def hash_rows(step: Tensor, samples: Tensor, t0: int, t1: int, inner: list[int]) -> tuple[Tensor, Tensor]:
    """The two words of every position. One opaque operation: a compiler would else redo it for every element drawn."""
    a = mix(samples ^ mix(step ^ t0))
    b = mix(mix(samples + signed(GOLDEN)) + mix(step + t1))
    for size in inner:
        i = torch.arange(size, dtype=torch.int32, device=samples.device)
        a, b = mix(a.unsqueeze(-1) + i * signed(GOLDEN)), mix(b.unsqueeze(-1) ^ i)
    return a, b


@hash_rows.register_fake
def _(step: Tensor, samples: Tensor, t0: int, t1: int, inner: list[int]) -> tuple[Tensor, Tensor]:
    shape = [*samples.shape, *inner]
    return samples.new_empty(shape), samples.new_empty(shape)


_COLUMNS: dict[tuple[int, tuple[str, ...], int, torch.device], Tensor] = {}


def hash_columns(seed: int, name: tuple[str, ...], size: int, device: torch.device) -> Tensor:
    """The word of every column under a name: a constant of the training, so eager code makes it once and keeps it.

    A compiler that finds it kept reads it; one that does not would redo it for every row. So run a step once in eager
    mode before compiling it.
    """
    key = (seed, name, size, device)
    if key in _COLUMNS:
        return _COLUMNS[key]
    k0, k1 = key_words(seed, *name)
    column = mix(mix(torch.arange(size, dtype=torch.int32, device=device) ^ k0) + k1)
    if not torch.compiler.is_compiling():
        _COLUMNS[key] = column
    return column


@contextmanager
def columns_of_their_own() -> Iterator[None]:
    """Draws inside find no columns that were kept, and leave none: for tensors that must not meet others."""
    kept = dict(_COLUMNS)
    _COLUMNS.clear()
    try:
        yield
    finally:
        _COLUMNS.clear()
        _COLUMNS.update(kept)


@dataclass(frozen=True)
class KeyedRandom:
    """Draws for the positions of one batch at one step.

    Build with `KeyedRandom.at`; `a` and `b` are the two hash words of every position, int32 `[*leading]`.
    """

    seed: int
    step: Tensor
    a: Tensor
    b: Tensor

    @classmethod
    def at(cls, *, seed: int, step: Tensor, samples: Tensor, inner: tuple[int, ...] = ()) -> KeyedRandom:
        """The draws of `samples` (int32 global sample indices, `[batch]`) at `step` (int32 scalar tensor).

        `inner` is the shape of the leading axes after the first, such as `(sequence,)`.
        """
        a, b = hash_rows(step, samples, *key_words(seed, "rows"), list(inner))
        return cls(seed, step, a, b)

    def uniform(self, size: int, *name: str) -> Tensor:
        """U[0, 1), `[*leading, size]`, for the name of a draw such as `("stochastic_recon", "linear1", "source")`."""
        column = hash_columns(self.seed, name, size, self.a.device)
        return hash_uniform(self.a.unsqueeze(-1), self.b.unsqueeze(-1), column)

    def normal(self, size: int, *name: str) -> Tensor:
        """N(0, 1), `[*leading, size]`: sqrt(-2 log(1 - u)) cos(2 pi v), u and v drawn as "radius" and "angle"."""
        radius = (-2 * torch.log1p(-self.uniform(size, *name, "radius"))).sqrt()
        return radius * torch.cos(2 * torch.pi * self.uniform(size, *name, "angle"))
