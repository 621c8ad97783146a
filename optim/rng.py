"""Counter-based randomness: every draw is a pure function of integers, never of a generator's
history.

Rounding in the optimizer, and noise, timesteps and caption dropout in a trainer, take their
randomness from here.  Because a draw depends on its counters alone (seed, stream, step, sample or
element), a resumed run needs no generator state, and two runs that differ in one choice still see
the same draws everywhere else.
"""

import torch
from torch import Tensor

_MASK64 = (1 << 64) - 1


def mix(*words: int) -> int:
    """Hash integers to 64 bits.  The order counts: mix(a, b) != mix(b, a).

    Each word goes through the splitmix64 finaliser: Steele, Lea, Flood 2014, "Fast splittable
    pseudorandom number generators".  Negative words are taken modulo 2^64.
    """
    state = 0
    for word in words:
        state = (state + (word & _MASK64) + 0x9E3779B97F4A7C15) & _MASK64
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK64
        state ^= state >> 31
    return state


def uniform(*words: int) -> float:
    """One draw from U[0, 1) for these counters."""
    return (mix(*words) >> 11) * 2.0**-53


def generator(*words: int) -> torch.Generator:
    """A fresh CPU generator for these counters, for draws that a library makes (`torch.randn`,
    `torch.randperm`)."""
    return torch.Generator("cpu").manual_seed(mix(*words) & ((1 << 63) - 1))


def bits32(key: int, count: int, device: torch.device) -> Tensor:
    """One 32-bit draw per element: key -> (count,) int32, all bit patterns equally likely.

    The element index is whitened with a 32-bit xorshift-multiply hash (constants: Wellons 2018,
    "Prospecting for hash functions", lowbias32), which is cheap in SIMD and on a GPU, and needs no
    state between elements.
    """
    low, high = _int32(key), _int32(key >> 32)
    x = torch.arange(count, device=device, dtype=torch.int64)
    x = (x * 0x9E3779B9 + low).to(torch.int32)
    x ^= (x >> 16) & 0xFFFF
    x *= 0x7FEB352D
    x ^= (x >> 15) & 0x1FFFF
    x ^= high  # between the rounds, so that two keys never give shifted copies of one sequence
    x *= _int32(0x846CA68B)
    x ^= (x >> 16) & 0xFFFF
    return x


def uniform_like(x: Tensor, key: int) -> Tensor:
    """U[0, 1) with 24 bits for every element of x, in its logical (row-major) order: x (*) -> fp32
    (*)."""
    draws = (bits32(key, x.numel(), x.device) >> 8) & 0xFFFFFF
    return (draws.to(torch.float32) * 2.0**-24).reshape(x.shape)


def round_stochastic_bf16(x: Tensor, key: int) -> Tensor:
    """Round fp32 to bf16 without bias: up with probability (distance to the lower neighbour) /
    (spacing).

    x fp32 (*) -> bf16 (*).  Adding a uniform 16-bit integer below the mantissa cut and truncating
    does exactly that. NaN, infinities and the top of the finite range are passed on as
    round-toward-zero would, so that no finite weight becomes infinite and no NaN becomes a number.
    """
    cut = -65536  # 0xFFFF0000: the half of an fp32 that is a bf16
    raw = x.contiguous().view(torch.int32)
    dither = (bits32(key, x.numel(), x.device) & 0xFFFF).reshape(x.shape)
    rounded = ((raw + dither) & cut).view(torch.float32)
    truncated = (raw & cut).view(torch.float32)
    return torch.where(
        x.isfinite() & rounded.isfinite(), rounded, torch.where(x.isfinite(), truncated, x)
    ).to(torch.bfloat16)


def _int32(word: int) -> int:
    """The low 32 bits of a Python integer as a signed 32-bit value."""
    word &= 0xFFFFFFFF
    return word - (1 << 32) if word >= 1 << 31 else word
