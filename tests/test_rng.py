"""Counter-based draws: functions of their counters, uniform, and unbiased where they round."""

import pytest
import torch

from optim import rng


def test_draws_depend_on_every_counter_and_its_place():
    words = [(1, 2, 3), (1, 3, 2), (1, 2), (1, 2, 4), (-1, 2, 3)]
    assert len({rng.mix(*w) for w in words}) == len(words)


def test_the_hash_is_pinned_so_that_old_checkpoints_resume():
    assert rng.mix(0, 1, 2) == 0xF4F373571B7FEB84
    assert rng.bits32(rng.mix(7), 4, torch.device("cpu")).tolist() == [
        -819771550,
        -1198695272,
        -1322689017,
        -694029198,
    ]


def test_elementwise_draws_are_uniform_in_every_bit():
    draws = rng.bits32(rng.mix(3), 1 << 16, torch.device("cpu"))
    for bit in range(32):
        assert ((draws >> bit) & 1).float().mean().item() == pytest.approx(0.5, abs=0.01)


def test_neighbouring_keys_and_elements_are_uncorrelated():
    zeros = torch.zeros(1 << 16)
    rows = torch.stack([rng.uniform_like(zeros, rng.mix(key)) for key in (1, 2)])
    shifted = torch.stack([rows[0][:-1], rows[0][1:]])
    assert torch.corrcoef(rows)[0, 1].abs() < 0.02
    assert torch.corrcoef(shifted)[0, 1].abs() < 0.02


def test_stochastic_rounding_is_unbiased_and_hits_only_neighbours():
    x = torch.full((1 << 18,), 1.0 + 0.3 * 2**-7)  # 30 % of the way between two bf16 numbers
    rounded = rng.round_stochastic_bf16(x, rng.mix(5)).float()
    assert set(rounded.unique().tolist()) == {1.0, 1.0 + 2**-7}
    assert (rounded.double().mean() - x.double().mean()).abs() < 2**-7 * 0.005
    assert torch.equal(-rounded, rng.round_stochastic_bf16(-x, rng.mix(5)).float())


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), -float("inf"), torch.finfo(torch.float32).max, 0.0, -0.0]
)
def test_stochastic_rounding_keeps_special_values(value):
    rounded = rng.round_stochastic_bf16(torch.full((64,), value), rng.mix(1)).float()
    expected = torch.tensor(value).view(torch.int32) & -65536  # toward zero
    if value != value:
        assert rounded.isnan().all()
    else:
        assert (rounded.view(torch.int32) == expected).all()
