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
_FACTOR = 0x16AB7965


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


def words32(counters: Tensor, key: int) -> Tensor:
    """One 32-bit draw for each counter: int64 (*) -> int32 (*), all bit patterns equally likely.

    A 32-bit xorshift-multiply hash (constants: Wellons 2018, "Prospecting for hash functions"),
    which is cheap in SIMD and on a GPU and needs no state between counters.  The key's high half
    and the counter's enter between the rounds, so that two keys never give shifted copies of one
    sequence.
    """
    x = counters.to(torch.int32) * _int32(0x9E3779B9) + _int32(key)
    x ^= (x >> 16) & 0xFFFF
    x *= 0x7FEB352D
    x ^= (x >> 15) & 0x1FFFF
    x ^= ((counters >> 32) * 0x85EBCA6B).to(torch.int32) ^ _int32(key >> 32)
    x *= _int32(0x846CA68B)
    x ^= (x >> 16) & 0xFFFF
    return x


def draws(
    key: int,
    view: tuple[int, int],
    numel: int,
    device: torch.device,
    salt: int = 0,
    bits: int = 16,
) -> Tensor:
    """One draw of 16 to 31 bits for each of the first `numel` elements of an (R, C) matrix,
    row-major: -> int32 (numel,) in 0..2^bits - 1.

    Each row begins at a multiple of 256 words, and is cut into blocks of 32 columns.  A block takes
    16 words: column j % 32 = 16 h + w takes the lowest (h = 0) or the highest (h = 1) bits of word
    w, so that sixteen lanes of a vector unit use a word each, twice.

    Draws with other salts use the same words, each multiplied by 0x16AB7965^salt.  An odd factor
    permutes the 2^32 words, so every draw is still exactly uniform, which is all that unbiased
    rounding needs; and a weight and its moments share one hash (hashes were a third of the work).
    Draws of two salts are not independent, but nearly uncorrelated: below 0.001 (the factor was
    searched for good lattices of its first four powers, modulo 2^16, 2^19 and 2^32).
    """
    rows, cols = view
    blocks = -(-cols // 32)
    starts = torch.arange(rows, device=device, dtype=torch.int64) * (-(-cols // 512) * 256)
    counters = starts[:, None] + torch.arange(blocks * 16, device=device, dtype=torch.int64)
    drawn = words32(counters.flatten(), key) * _int32(pow(_FACTOR, salt, 1 << 32))
    mask = (1 << bits) - 1
    drawn = drawn.view(rows, blocks, 16)
    halves = torch.stack([drawn & mask, (drawn >> (32 - bits)) & mask], dim=2)
    return halves.view(rows, blocks * 32)[:, :cols].flatten()[:numel]


def signs(key: int, shape: tuple[int, int], device: torch.device) -> Tensor:
    """-1 or 1, equally likely: -> fp32 (R, C), in the same bits on every device.

    Each row takes ceil(C / 32) words; column j takes bit j % 32 of word j // 32, a set bit for 1.
    """
    rows, cols = shape
    words = -(-cols // 32)
    drawn = words32(torch.arange(rows * words, device=device, dtype=torch.int64), key)
    bits = (drawn[:, None] >> torch.arange(32, device=device, dtype=torch.int32)) & 1
    return (2 * bits - 1).view(rows, words * 32)[:, :cols].float()


def normals(key: int, shape: tuple[int, int], device: torch.device) -> Tensor:
    """Nearly normal draws of mean 0 and variance 1: -> fp32 (R, C), exact in bf16, in the same bits
    on every device.

    Element e, row-major, is (S - 1530) / 256, rounded to bf16, where S, the sum of the twelve bytes
    of words 3 e, 3 e + 1 and 3 e + 2, has mean 1530 and variance 65535.  The last bits of a
    logarithm or a cosine depend on the device; those of integers and one multiplication do not.
    All odd moments are 0, the kurtosis is 2.9 instead of 3, and no draw is beyond 5.98.
    """
    count = shape[0] * shape[1]
    words = words32(torch.arange(3 * count, device=device, dtype=torch.int64), key).view(-1, 3)
    pairs = ((words & 0xFF00FF) + ((words >> 8) & 0xFF00FF)).sum(dim=1, dtype=torch.int32)
    total = (pairs & 0xFFFF) + (pairs >> 16)  # a half holds at most 6 * 255
    return ((total - 1530).float() / 256).bfloat16().float().view(shape)


def round_stochastic_bf16(x: Tensor, key: int, view: tuple[int, int], salt: int = 0) -> Tensor:
    """Round fp32 to bf16 without bias: up with probability (distance to the lower neighbour) /
    (spacing).

    x fp32 (*) -> bf16 (*); `view` is the matrix its draws are addressed by, `salt` as in `draws`.
    Adding a uniform 16-bit integer below the mantissa cut and truncating does exactly that.  NaN,
    infinities and the top of the finite range are treated as in rounding toward zero, so that no
    finite weight becomes infinite and no NaN becomes a number.
    """
    cut = -65536  # 0xFFFF0000: the half of an fp32 that is a bf16
    raw = x.contiguous().view(torch.int32)
    dither = draws(key, view, x.numel(), x.device, salt).reshape(x.shape)
    rounded = ((raw + dither) & cut).view(torch.float32)
    truncated = (raw & cut).view(torch.float32)
    return torch.where(
        x.isfinite() & rounded.isfinite(), rounded, torch.where(x.isfinite(), truncated, x)
    ).to(torch.bfloat16)


def _int32(word: int) -> int:
    """The low 32 bits of a Python integer as a signed 32-bit value."""
    word &= 0xFFFFFFFF
    return word - (1 << 32) if word >= 1 << 31 else word
