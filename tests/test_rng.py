"""Counter-based draws: functions of their counters, uniform, and unbiased where they round."""

import pytest
import torch

from optim import rng

CPU = torch.device("cpu")


def test_draws_depend_on_every_counter_and_its_place():
    words = [(1, 2, 3), (1, 3, 2), (1, 2), (1, 2, 4), (-1, 2, 3)]
    assert len({rng.mix(*w) for w in words}) == len(words)


def word(counter, key):
    """The 32-bit draw of one counter, in Python's integers."""
    mask = 0xFFFFFFFF
    x = ((counter & mask) * 0x9E3779B9 + (key & mask)) & mask
    x ^= x >> 16
    x = x * 0x7FEB352D & mask
    x ^= x >> 15
    x ^= (key >> 32) ^ ((counter >> 32) * 0x85EBCA6B & mask)
    x = x * 0x846CA68B & mask
    return x ^ (x >> 16)


def test_the_hash_is_pinned_so_that_old_checkpoints_resume():
    assert rng.mix(0, 1, 2) == 0xF4F373571B7FEB84
    assert rng.draws(rng.mix(7), (1, 4), 4, CPU).tolist() == [18274, 23704, 24071, 62578]


@pytest.mark.parametrize("counter", [0, 1, 2**31, 2**32 - 1, 2**32, 2**32 + 1, 5 * 2**32, 2**50])
def test_words_count_in_64_bits(counter):
    for key in (0, rng.mix(1), rng.mix(2)):
        drawn = rng.words32(torch.tensor([counter]), key).item()
        assert drawn & 0xFFFFFFFF == word(counter, key)


@pytest.mark.parametrize(("salt", "bits"), [(0, 16), (1, 16), (2, 19), (7, 31)])
@pytest.mark.parametrize(
    ("view", "numel"),
    [((3, 70), 210), ((5, 33), 163), ((40, 2), 80), ((2, 600), 1200), ((1, 0), 0)],
)
def test_the_draws_of_an_element_are_a_function_of_its_row_and_column(view, numel, salt, bits):
    key, (rows, cols) = rng.mix(4), view
    expected = []
    for i in range(rows):
        for j in range(cols):
            counter = i * -(-cols // 512) * 256 + j // 32 * 16 + j % 16
            drawn = word(counter, key) * 0x16AB7965**salt % (1 << 32)
            expected.append(drawn >> (32 - bits) if j // 16 % 2 else drawn % (1 << bits))
    assert rng.draws(key, view, numel, CPU, salt, bits).tolist() == expected[:numel]


def test_elementwise_draws_are_uniform_in_every_bit():
    draws = rng.draws(rng.mix(3), (256, 256), 1 << 16, CPU)
    assert draws.min() >= 0
    assert draws.max() < 1 << 16
    for bit in range(16):
        assert ((draws >> bit) & 1).float().mean().item() == pytest.approx(0.5, abs=0.01)


def test_neighbouring_keys_elements_halves_and_rows_are_uncorrelated():
    one, two = (
        rng.draws(rng.mix(key), (512, 128), 1 << 16, CPU).float().view(512, 128) for key in (1, 2)
    )
    pairs = [
        (one, two),
        (one[:, 1:], one[:, :-1]),
        (one[:, 16:], one[:, :-16]),
        (one[1:], one[:-1]),
    ]
    for a, b in pairs:
        assert torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1].abs() < 0.02


@pytest.mark.parametrize(("bits", "other"), [(16, 16), (16, 19), (19, 16), (19, 19)])
@pytest.mark.parametrize(("salt", "from_it"), [(0, 1), (0, 2), (0, 3), (0, 4), (1, 3)])
def test_draws_of_two_salts_fill_the_square_and_are_uncorrelated(salt, from_it, bits, other):
    """On a 64 x 64 grid of both draws, every cell is hit about equally often."""
    count = 1 << 20
    a = rng.draws(rng.mix(6), (1, count), count, CPU, salt, bits)
    b = rng.draws(rng.mix(6), (1, count), count, CPU, salt + from_it, other)
    assert torch.corrcoef(torch.stack([a, b]).double())[0, 1].abs() < 0.005
    drawn = torch.bincount((a >> (bits - 6)) * 64 + (b >> (other - 6)), minlength=4096)
    mean = count / 4096
    assert (drawn - mean).abs().max() < 6 * mean**0.5


def test_stochastic_rounding_is_unbiased_and_hits_only_neighbours():
    x = torch.full((1 << 18,), 1.0 + 0.3 * 2**-7)  # 30 % of the way between two bf16 numbers
    rounded = rng.round_stochastic_bf16(x, rng.mix(5), (512, 512)).float()
    assert set(rounded.unique().tolist()) == {1.0, 1.0 + 2**-7}
    assert (rounded.double().mean() - x.double().mean()).abs() < 2**-7 * 0.005
    assert torch.equal(-rounded, rng.round_stochastic_bf16(-x, rng.mix(5), (512, 512)).float())


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), -float("inf"), torch.finfo(torch.float32).max, 0.0, -0.0]
)
def test_stochastic_rounding_keeps_special_values(value):
    rounded = rng.round_stochastic_bf16(torch.full((64,), value), rng.mix(1), (1, 64)).float()
    expected = torch.tensor(value).view(torch.int32) & -65536  # toward zero
    if value != value:
        assert rounded.isnan().all()
    else:
        assert (rounded.view(torch.int32) == expected).all()
