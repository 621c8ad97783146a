"""How moments are stored: sizes, exact zeros, unbiased rounding, and the matrix views."""

import math

import pytest
import torch

from optim import rng
from optim.codecs import Block8, Dense, Factored, FactoredSign, Log8, matrix_view, square_view

CPU = torch.device("cpu")
SHAPES = [(256,), (257,), (1,), (0,), (33, 31), (40, 4, 3, 3)]


def codecs_for(shape):
    numel = math.prod(shape)
    made = [Dense(shape), Block8(shape), Log8(shape)]
    if view := square_view(numel):
        made += [Factored(shape, view), Factored(shape, view, log8=True), FactoredSign(shape, view)]
    return made


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_parts_keep_their_names_shapes_and_dtypes(shape):
    for codec in codecs_for(shape):
        zeros, parts = codec.zeros(CPU), codec.encode(torch.rand(shape), key=1)
        assert {k: (x.shape, x.dtype) for k, x in zeros.items()} == {
            k: (x.shape, x.dtype) for k, x in parts.items()
        }, codec
        assert codec.decode(parts).shape == shape
        assert torch.equal(codec.decode(zeros), torch.zeros(shape)), codec


@pytest.mark.parametrize(
    ("codec", "spacing"),  # distance between the two codes around x, as a share of x or of max(x)
    [
        (Block8((64, 64)), lambda x: torch.full_like(x, 1 / 127)),
        (Log8((64, 64)), lambda x: x * (2 ** (1 / 16) - 1)),
    ],
    ids=["Block8", "Log8"],
)
def test_rounding_is_unbiased_and_zero_is_exact(codec, spacing):
    x = torch.rand(64, 64) * torch.logspace(-2, 0, 64)[:, None]
    x[::7] = 0
    decoded = torch.stack([codec.decode(codec.encode(x, rng.mix(k))) for k in range(400)])
    assert (decoded[:, x == 0] == 0).all()
    bias = (decoded.double().mean(0) - x.double()).abs()
    assert (bias <= spacing(x) * 0.13).all()  # five standard errors of a Bernoulli mean of 400
    assert ((decoded - x).abs() <= spacing(x) * 1.001).all()


def test_log8_never_turns_a_positive_value_into_zero_and_spans_16_octaves():
    x = torch.tensor([1.0, 2.0**-10, 2.0**-40, 0.0])
    decoded = Log8((4,)).decode(Log8((4,)).encode(x, 0))
    assert decoded.tolist() == pytest.approx([1.0, 2.0**-10, 2.0 ** (-254 / 16), 0.0], rel=1e-5)
    assert decoded[3] == 0


def test_log8_stores_a_grid_value_without_rounding_whatever_its_neighbours():
    codec, x = Log8((128,)), torch.full((128,), 2.0**-3)
    for largest in (2.0**-3, 1.0, 5.0, 300.0):
        x[0] = largest
        assert (codec.decode(codec.encode(x, 9))[1:] == 2.0**-3).all()


def test_block8_is_symmetric():
    codec, x = Block8((512,)), torch.randn(512)
    plus, minus = codec.encode(x, 3), codec.encode(-x, 3)
    assert plus["codes"].abs().max() == 127
    assert minus["codes"].abs().max() == 127
    assert torch.equal(plus["absmax"], minus["absmax"])


def test_factoring_a_rank_one_moment_is_exact_and_sums_are_kept():
    row, col = torch.rand(24), torch.rand(40)
    exact, any_ = torch.outer(row, col), torch.rand(24, 40)
    codec = Factored((24, 40), (24, 40))
    assert torch.allclose(codec.project(exact), exact, rtol=1e-5)
    projected = codec.project(any_)
    for dim in (0, 1):
        assert torch.allclose(projected.sum(dim), any_.sum(dim), rtol=1e-5)


def test_a_sign_plane_keeps_every_sign():
    x = torch.randn(13, 11)
    decoded = FactoredSign((13, 11), (13, 11)).decode(FactoredSign((13, 11), (13, 11)).encode(x, 0))
    assert torch.equal(decoded.sign(), x.sign())


@pytest.mark.parametrize(
    ("shape", "view"),
    [((320, 4, 3, 3), (320, 36)), ((640, 320), (640, 320)), ((320,), None), ((5, 1), None)],
)
def test_a_convolution_is_read_as_out_by_the_rest(shape, view):
    assert matrix_view(shape) == view


@pytest.mark.parametrize(
    ("numel", "view"),
    [
        (1280 * 10240, (4096, 3200)),
        (320 * 4 * 9, (120, 96)),
        (10007, (97, 104)),  # a prime is padded, not left as one column
        (3, None),
    ],
)
def test_square_view_is_nearly_square_and_always_compresses(numel, view):
    assert square_view(numel) == view
    if view:
        assert math.prod(view) >= numel
