"""Random projections: functions of their counters, of the right size, and never stored."""

from types import SimpleNamespace

import pytest
import torch
from helpers import make_params, run

import optim
from optim import rng
from optim.projection import channels, orthonormal_rows, projected_shape, projection, unchanneled

CPU = torch.device("cpu")
KINDS = ["gaussian", "sign"]


def group(**options):
    known = {"seed": 0, "index": 3, "t": 1, "update_gap": 200, "rank": 16, "residual": False}
    return SimpleNamespace(**known | {"projection": "gaussian"} | options)


def byte_sum(key, element):
    """What `rng.normals` sums, in Python's integers."""
    words = rng.words32(torch.arange(3 * element, 3 * element + 3), key).tolist()
    return sum(word >> shift & 0xFF for word in words for shift in (0, 8, 16, 24))


def test_normal_draws_are_the_sums_of_twelve_bytes():
    key = rng.mix(9)
    drawn = rng.normals(key, (3, 5), CPU).flatten()
    expected = torch.tensor([float(byte_sum(key, e) - 1530) for e in range(15)])
    assert torch.equal(drawn, (expected / 256).bfloat16().float())
    assert [byte_sum(key, e) for e in range(4)] == [1561, 1404, 1299, 1942]


def test_sign_draws_are_the_bits_of_words():
    key = rng.mix(9)
    drawn = rng.signs(key, (3, 40), CPU)
    for i in range(3):
        words = rng.words32(torch.arange(2 * i, 2 * i + 2), key).tolist()
        bits = [words[j // 32] >> j % 32 & 1 for j in range(40)]
        assert drawn[i].tolist() == [1.0 if bit else -1.0 for bit in bits]


def test_rounding_draws_to_bf16_leaves_their_variance():
    words = rng.words32(torch.arange(3 << 18), 5)
    sums = sum((words >> shift) & 0xFF for shift in (0, 8, 16, 24)).view(-1, 3).sum(dim=1)
    exact, drawn = (sums - 1530).double() / 256, rng.normals(5, (1, 1 << 18), CPU)[0].double()
    assert not torch.equal(drawn, exact)
    assert (drawn.square().sum() / exact.square().sum()).item() == pytest.approx(1, abs=1e-4)


def test_normal_draws_have_the_moments_of_a_normal():
    x = rng.normals(rng.mix(1), (512, 512), CPU).double()
    assert x.mean().abs() < 0.01
    assert x.square().mean().item() == pytest.approx(1, abs=0.01)
    assert x.pow(3).mean().abs() < 0.02
    assert x.pow(4).mean().item() == pytest.approx(2.9, abs=0.05)


@pytest.mark.parametrize("draw", [rng.normals, rng.signs])
def test_rows_columns_and_keys_are_uncorrelated(draw):
    one, two = (draw(rng.mix(key), (256, 256), CPU) for key in (1, 2))
    for a, b in [(one, two), (one[1:], one[:-1]), (one[:, 1:], one[:, :-1])]:
        assert torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1].abs() < 0.02


@pytest.mark.parametrize("kind", KINDS)
def test_a_projection_keeps_lengths_on_average(kind):
    x = torch.randn(640, 400, generator=torch.Generator().manual_seed(0))
    low = projection(group(projection=kind), 640, CPU) @ x
    assert low.shape == (16, 400)
    assert (low.norm() / x.norm()).item() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("kind", KINDS)
def test_a_projection_changes_with_its_counters_and_when_the_gap_is_over(kind):
    first = projection(group(projection=kind), 32, CPU)
    assert torch.equal(first, projection(group(projection=kind, t=200), 32, CPU))
    for other in ({"t": 201}, {"seed": 1}, {"index": 4}):
        assert not torch.equal(first, projection(group(projection=kind, **other), 32, CPU))


@pytest.mark.parametrize(("rank", "width"), [(16, 640), (63, 64), (1, 5)])
@pytest.mark.parametrize("kind", KINDS)
def test_with_a_residual_the_rows_are_orthogonal_and_span_the_same(kind, rank, width):
    options = {"projection": kind, "rank": rank}
    p = projection(group(residual=True, **options), width, CPU).double()
    assert torch.allclose(p @ p.t() * rank / width, torch.eye(rank).double(), atol=1e-4)
    raw = projection(group(**options), width, CPU).double()
    assert torch.allclose(rank / width * (raw @ p.t()) @ p, raw, atol=1e-4)


def test_a_row_that_depends_on_others_becomes_zero():
    rows = orthonormal_rows(torch.tensor([[1.0, 1, -1], [-1, -1, 1]]))
    assert torch.allclose(rows[0], torch.tensor([1.0, 1, -1]) / 3**0.5)
    assert rows[1].abs().max() < 1e-3


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5), (3, 2, 2, 2), (16, 3, 3, 3)])
def test_the_smaller_dimension_comes_first_and_back(shape):
    x = torch.randn(shape)
    matrix = channels(x)
    assert tuple(matrix.shape) == projected_shape(shape, 1)
    assert torch.equal(unchanneled(matrix, shape), x)


@pytest.mark.parametrize(
    ("shape", "rank"), [((), 1), ((9,), 1), ((0,), 1), ((5, 0), 1), ((9, 1), 1), ((8, 4, 2, 2), 8)]
)
def test_what_the_rank_would_not_make_smaller_is_not_projected(shape, rank):
    assert projected_shape(shape, rank) is None


@pytest.mark.parametrize("name", ["apollo", "apollo_mini", "adafactor8bit_apollo"])
def test_a_projection_is_no_part_of_the_state(name):
    params = make_params(shapes=[(64, 48)])
    optimizer = optim.build(name, params, rank=2)
    run(optimizer, params, range(2))
    largest = max(x.numel() for x in optimizer.state[params[0]].values())
    assert largest <= 2 * 64  # a moment of P G; a stored P would be one more key
    keys = {key.split(".")[0] for key in optimizer.state[params[0]]}
    assert keys <= {"step", "nonfinite", "exp_avg", "exp_avg_sq", "update_norm"}
