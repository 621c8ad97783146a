"""Storage of moments: sizes, exact zeros, unbiased rounding, matrix views."""

import math

import pytest
import torch

from optim import rng
from optim.codecs import (
    Bf16,
    Dense,
    Factored,
    FactoredSign,
    Float8,
    SignedFloat8,
    layout,
    matrix_view,
    square_view,
)

CPU = torch.device("cpu")
SHAPES = [(256,), (257,), (1,), (0,), (33, 31), (40, 4, 3, 3)]


def codecs_for(shape):
    numel = math.prod(shape)
    made = [Dense(shape), Bf16(shape), SignedFloat8(shape), Float8(shape)]
    if view := matrix_view(shape):
        made += [Bf16(shape, view), SignedFloat8(shape, view), Factored(shape, view, float8=True)]
    if view := square_view(numel):
        made += [Factored(shape, view), FactoredSign(shape, view)]
    if len(shape) > 2:
        made += [Factored(shape, shape), Factored(shape, shape, float8=True)]
    return made


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_parts_keep_their_names_shapes_and_dtypes(shape):
    for codec in codecs_for(shape):
        zeros, parts = codec.zeros(CPU), codec.encode(torch.rand(shape), key=1)
        assert {k: (x.shape, x.dtype) for k, x in zeros.items()} == {
            k: (x.shape, x.dtype) for k, x in parts.items()
        }, codec
        assert codec.decode(parts).shape == shape
        assert codec.decode(parts).dtype == torch.float32
        assert torch.equal(codec.decode(zeros), torch.zeros(shape)), codec


def octave(x):
    """The largest power of two not above each element."""
    return 2.0 ** x.log2().floor()


@pytest.mark.parametrize(
    ("codec", "spacing"),  # distance between the two codes around x
    [
        (SignedFloat8((64, 64)), lambda x: octave(x + 2.0**-13) / 8),
        (
            SignedFloat8((64, 64), (64, 64)),
            lambda x: octave(x + octave(x.amax(dim=1, keepdim=True)) * 2.0**-13) / 8,
        ),
        (Float8((64, 64)), lambda x: octave(x) / 8),
        (Bf16((64, 64)), lambda x: octave(x) / 128),
        (Bf16((64, 64), (64, 64)), lambda x: octave(x) / 128),
    ],
    ids=["SignedFloat8", "SignedFloat8 by rows", "Float8", "Bf16", "Bf16 by rows"],
)
def test_rounding_is_unbiased_and_zero_is_exact(codec, spacing):
    generator = torch.Generator().manual_seed(0)  # other seeds may exceed the bound
    x = torch.rand(64, 64, generator=generator) * torch.logspace(-2, 0, 64)[:, None]
    x[::7] = 0
    decoded = torch.stack([codec.decode(codec.encode(x, rng.mix(k))) for k in range(400)])
    assert (decoded[:, x == 0] == 0).all()
    bias = (decoded.double().mean(0) - x.double()).abs()
    assert (bias <= spacing(x) * 0.13).all()  # 5 standard errors of a mean of 400 Bernoulli draws
    assert ((decoded - x).abs() <= spacing(x) * 1.001).all()


def test_float8_never_turns_a_positive_value_into_zero_and_spans_32_octaves():
    x = torch.tensor([1.0, 2.0**-10, 2.0**-40, 0.0, 1e-45])
    lowest = 2.0**-31 * 9 / 8
    decoded = Float8((5,)).decode(Float8((5,)).encode(x, 0))
    assert decoded.tolist() == [1.0, 2.0**-10, lowest, 0.0, lowest]


@pytest.mark.parametrize("largest", [1e-45, 1e-38, 1.0, 3.4e38])
def test_float8_covers_the_range_of_fp32(largest):
    x = torch.full((200,), largest)
    decoded = Float8((200,)).decode(Float8((200,)).encode(x, 1))
    assert decoded.isfinite().all()
    assert (decoded > 0).all()
    if largest > 1e-38:
        assert torch.allclose(decoded, x, rtol=1 / 8)


@pytest.mark.parametrize("value", [2.0**-3, 2.0**-3 * 13 / 8, 3.0])
def test_float8_stores_a_value_of_its_grid_without_rounding_whatever_its_neighbours(value):
    codec, x = Float8((128,)), torch.full((128,), value)
    for key, largest in enumerate((value, 1.03, 5.1, 300.0, 800.0)):
        x[0] = largest
        decoded = codec.decode(codec.encode(x, rng.mix(key)))
        assert (decoded[1:] == value).all()


def test_float8_codes_are_these_bits():
    """The definition, one element at a time with Python integers."""
    x = torch.rand(300, generator=torch.Generator().manual_seed(0)) ** 9
    x[7] = 0
    parts, key = Float8((300,)).encode(x, rng.mix(3)), rng.mix(3)
    bits = x.view(torch.int32).tolist()
    draws = rng.draws(key, (1, 300), 300, CPU, bits=20).tolist()
    for start in range(0, 300, 128):
        block = range(start, min(start + 128, 300))
        exponent = max(32, (max(bits[i] for i in block) + 0xFFFFF) >> 23)
        assert parts["top"][start // 128] == exponent - 127
        for i in block:
            code = ((bits[i] + draws[i]) >> 20) - (exponent - 31) * 8
            assert parts["codes"][i] == (0 if x[i] == 0 else min(max(code, 1), 255))


def test_signed_float8_codes_are_these_bits():
    """The definition, one element at a time."""
    x = torch.randn(300, generator=torch.Generator().manual_seed(0)) ** 9
    x[7] = 0
    parts, key = SignedFloat8((300,)).encode(x, rng.mix(3)), rng.mix(3)
    sizes, draws = x.abs(), rng.draws(key, (1, 300), 300, CPU, bits=20).tolist()
    for start in range(0, 300, 128):
        block = slice(start, min(start + 128, 300))
        top = math.floor(math.log2(sizes[block].max() * (1 + 2**-4)))
        assert abs(parts["top"][start // 128] - top) <= 1
        zero = 2.0 ** (int(parts["top"][start // 128]) - 14)
        bits = (sizes[block] + zero).view(torch.int32).tolist()
        least = torch.tensor(zero).view(torch.int32).item()
        for i, bit in zip(range(300)[block], bits, strict=True):
            assert parts["codes"][i] & 127 == (bit + draws[i] - least) >> 20
            assert bool(parts["codes"][i] & 128) == (x[i] < 0)


def test_signed_float8_starts_a_block_at_each_row_of_its_view():
    x = torch.rand(3, 300) * 0.8 + torch.tensor([[1.0], [100.0], [10000.0]])
    codec = SignedFloat8((3, 300), (3, 300))
    parts = codec.encode(x, 5)
    assert parts["top"].view(3, 3).float().mean(1).tolist() == [0.0, 6.0, 13.0]
    assert torch.allclose(codec.decode(parts), x, rtol=1 / 8)


def test_a_small_value_beside_a_large_one_is_stored_as_finely_as_it_is_small():
    """Codes of uniform spacing cannot do this: 1/127 of the maximum is 8 times these values."""
    x = torch.full((128,), 1e-3)
    x[0] = 1.0
    codec = SignedFloat8((128,))
    decoded = torch.stack([codec.decode(codec.encode(-x, rng.mix(k)))[1:] for k in range(50)])
    assert (decoded < -0.9e-3).all()
    assert (decoded > -1.1e-3).all()
    assert decoded.mean() == pytest.approx(-1e-3, rel=1e-3)


@pytest.mark.parametrize("size", [3e38, 1e-30, 1e-38, 1e-45])
def test_signed_float8_covers_the_range_of_fp32(size):
    x = torch.full((256,), -size)
    decoded = SignedFloat8((256,)).decode(SignedFloat8((256,)).encode(x, 1))
    assert torch.allclose(decoded, x, rtol=1 / 8, atol=2.0**-112)


def test_a_nonnegative_moment_stays_so_in_bf16():
    x = torch.logspace(-45, 38, 4096)
    for codec in (Bf16((4096,)), Float8((4096,))):
        assert (codec.decode(codec.encode(x, 2)) >= 0).all()


def test_the_layout_is_the_one_view_that_the_codecs_share():
    shape, view = (6, 4, 3, 3), (6, 36)
    assert layout([Dense(shape), Float8(shape)], shape) == (1, 216)
    assert layout([Dense(()), SignedFloat8(shape, view), Factored(shape, view)], shape) == view
    assert layout([Factored(shape, shape)], shape) == (1, 216)  # no view for a batch of matrices
    assert layout([SignedFloat8((2, 36), (2, 36)), Dense(shape)], shape) == (
        1,
        216,
    )  # a projection's moment
    with pytest.raises(AssertionError):
        layout([SignedFloat8(shape, view), Factored(shape, (18, 12))], shape)


def test_signed_float8_is_symmetric():
    codec, x = SignedFloat8((512,)), torch.randn(512)
    plus, minus = codec.encode(x, 3), codec.encode(-x, 3)
    assert torch.equal(plus["codes"] ^ 128, minus["codes"])
    assert torch.equal(plus["top"], minus["top"])


def test_factoring_a_rank_one_moment_is_exact_and_sums_are_kept():
    row, col = torch.rand(24), torch.rand(40)
    exact, any_ = torch.outer(row, col), torch.rand(24, 40)
    codec = Factored((24, 40), (24, 40))
    assert torch.allclose(codec.decode(codec.encode(exact, 0)), exact, rtol=1e-5)
    stored = codec.decode(codec.encode(any_, 0))
    for dim in (0, 1):
        assert torch.allclose(stored.sum(dim), any_.sum(dim), rtol=1e-5)


def test_a_batch_of_matrices_is_factored_one_by_one():
    x = torch.rand(4, 5, 6, 7)
    batch, one = Factored((4, 5, 6, 7), (4, 5, 6, 7)), Factored((6, 7), (6, 7))
    decoded = batch.decode(batch.encode(x, 0))
    for i in range(4):
        for j in range(5):
            assert torch.allclose(decoded[i, j], one.decode(one.encode(x[i, j], 0)), rtol=1e-6)


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
        (10007, (97, 104)),  # a prime is padded rather than left as one column
        (3, None),
    ],
)
def test_square_view_is_nearly_square_and_always_compresses(numel, view):
    assert square_view(numel) == view
    if view:
        assert math.prod(view) >= numel
