"""Muon: what its iterations do to singular values, and steps like those of its peers."""

import pytest
import torch
from helpers import FOR_SMALL, MUONS, assert_same, make_params, run, set_grads
from torch.nn import Parameter

import optim
from optim import orthogonal, portion
from optim.newton_schulz import orthogonalized

# (R, C): wide, tall, square, a row, a column.
MATRICES = [(24, 40), (40, 24), (32, 32), (1, 9), (9, 1)]


@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("shape", MATRICES, ids=str)
def test_singular_values_go_through_the_published_polynomial_and_directions_stay(shape, steps):
    x = make_params(shapes=[shape])[0].detach()
    u, s, vh = torch.linalg.svd(x.double(), full_matrices=False)
    s = s / s.norm()
    for _ in range(steps):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    assert torch.allclose(orthogonalized(x, steps).double(), (u * s) @ vh, atol=2e-5)


def test_the_size_of_a_momentum_does_not_matter_and_nothing_stays_nothing():
    x = make_params(shapes=[(24, 16)])[0].detach()
    usual = orthogonalized(x, 5)
    for scale in (1e-30, 1e30):
        assert torch.allclose(orthogonalized(x * scale, 5), usual, atol=2e-5)
    x[3], x[:, 5] = 0, 0
    found = orthogonalized(x, 5)
    assert not found[3].any()
    assert not found[:, 5].any()
    assert not orthogonalized(torch.zeros(4, 6), 5).any()


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has none")
@pytest.mark.parametrize("adjust", ["match_rms_adamw", "original"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_matrices_step_like_torchs_muon_up_to_its_bf16(adjust, nesterov):
    shapes = [(24, 16), (16, 40)]
    options = {"lr": 1e-2, "weight_decay": 0.1, "nesterov": nesterov, "adjust_lr_fn": adjust}
    ours, theirs = make_params(shapes=shapes), make_params(shapes=shapes)
    run(optim.Muon(ours, **options), ours, range(20))
    run(torch.optim.Muon(theirs, **options), theirs, range(20))
    for a, b, start in zip(ours, theirs, make_params(shapes=shapes), strict=True):
        assert (a - b).norm() < 0.01 * (b - start).norm()  # 0.19 with the other factor


@pytest.mark.parametrize(("name", "other"), [("muon", "adamw"), ("muon8bit", "adamw8bit")])
def test_vectors_step_like_adamw(name, other):
    shapes, options = [(40,), ()], {"lr": 1e-2, "betas": (0.8, 0.95), "weight_decay": 0.1}
    vectors = make_params(shapes=[(24, 16), *shapes])[1:]
    twins = [Parameter(p.detach().clone()) for p in vectors]
    matrix = Parameter(torch.ones(6, 4))
    first = optim.build(name, [matrix, *vectors], **options)
    second = optim.build(other, [Parameter(torch.ones(6, 4)), *twins], **options)  # same indices
    run(first, vectors, range(5))
    run(second, twins, range(5))
    for a, b in zip(vectors, twins, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", MUONS)
def test_a_convolution_steps_like_the_matrix_of_its_filters(name):
    images, matrices = make_params(shapes=[(16, 3, 3, 3)]), make_params(shapes=[(16, 27)])
    run(optim.build(name, images), images, range(5))
    run(optim.build(name, matrices), matrices, range(5))
    assert torch.equal(images[0].view(16, 27), matrices[0])


@pytest.mark.parametrize("name", MUONS)
def test_a_steps_rms_is_about_a_fifth_of_the_rate_for_every_shape(name):
    params = make_params(shapes=MATRICES[:3])
    before = [p.detach().clone() for p in params]
    run(optim.build(name, params, lr=1e-2), params, range(1))
    for p, old in zip(params, before, strict=True):
        assert 0.7 < (p - old).square().mean().sqrt() / (0.2 * 1e-2) < 1.1


@pytest.mark.parametrize("name", MUONS)
def test_steps_do_not_depend_on_which_tensors_share_the_scratch(name, monkeypatch):
    results = []
    for room in (orthogonal.SCRATCH_BYTES["cpu"], 1):
        monkeypatch.setitem(orthogonal.SCRATCH_BYTES, "cpu", room)
        params = make_params(torch.bfloat16)
        optimizer = optim.build(name, params, max_grad_norm=1.0)
        run(optimizer, params, range(3))
        set_grads(params, 3)
        optimizer.param_groups[0]["max_grad_norm"] = None
        for some in (params[:2], params[2:]):
            optimizer.step_param(*some)
        results.append(params)
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0), (0, 3, 3)], ids=str)
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_a_matrix_without_elements_is_no_obstacle(shape, backend):
    params = make_params(shapes=[shape, (24, 16)])
    run(optim.Muon(params, backend=backend), params, range(2))
    assert not torch.equal(params[1], make_params(shapes=[shape, (24, 16)])[1])


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_options_may_change_between_steps_of_different_tensors(backend):
    def after(*runs):
        params = make_params(shapes=[(40, 16), (16, 24)])
        optimizer = optim.Muon(params, lr=0.1, backend=backend)
        for step, (adjust, some) in enumerate(runs):
            set_grads(params, step)
            optimizer.param_groups[0]["adjust_lr_fn"] = adjust
            for one in some:
                optimizer.step_param(*(params[i] for i in one))
        return params

    rms, original = "match_rms_adamw", "original"
    together = after((rms, [[0, 1]]), (original, [[0]]), (rms, [[0, 1]]))
    alone = after((rms, [[0], [1]]), (original, [[0]]), (rms, [[0], [1]]))
    assert_same(together, alone)


@pytest.mark.parametrize("name", [*MUONS, "apollo", "apollo_mini"])
@pytest.mark.parametrize("room", [1, 4 * 4 * 64 * 96, 1 << 24])
def test_the_scratch_that_is_planned_is_what_a_step_holds_and_iterates_of_a_matrix(
    name, room, monkeypatch
):
    module = orthogonal if name in MUONS else portion
    monkeypatch.setitem(module.SCRATCH_BYTES, "cpu", room)
    params = make_params(shapes=[(64, 96)] * 12 + [(96, 3, 3, 3), (64,)])
    optimizer = optim.build(name, params, backend="native", **FOR_SMALL.get(name, {}))
    run(optimizer, params, range(1))
    held = optimizer._dispatch.engine(torch.device("cpu"))._scratch.numel()
    iterates = 2 * 4 * 64 * 96 if name in MUONS else 0
    assert optimizer.scratch_bytes("cpu") - iterates == pytest.approx(held, rel=0.01)


def test_without_a_matrix_it_says_whose_steps_it_makes():
    with pytest.warns(optim.IdleOption, match="no tensor is a matrix.*AdamW steps them all"):
        optim.Muon(make_params(shapes=[(9,), ()]))


def test_storage_has_an_effect_without_momentum_where_vectors_have_moments(recwarn):
    optim.Muon(
        make_params(shapes=[(24, 16), (24,)]), momentum=0.0, storage="8bit", betas=(0.8, 0.9)
    )
    assert not recwarn
    for idle in ({"momentum": 0.0, "storage": "8bit"}, {"betas": (0.8, 0.9)}):
        with pytest.warns(optim.IdleOption, match=f"{[*idle][-1]}=.* has no effect where"):
            optim.Muon(make_params(shapes=[(24, 16)]), **idle)


def test_a_group_that_another_muon_would_step_by_adam_is_refused():
    groups = [{"params": make_params(), "use_muon": False}]
    with pytest.raises(TypeError, match="'use_muon'; all matrices are orthogonalized"):
        optim.Muon(groups)
    optim.AdamW(groups)  # which another package's option says nothing about


@pytest.mark.parametrize("option", ["orthograd", "grams", "cautious"])
def test_what_acts_on_single_elements_is_refused_with_the_reason(option):
    with pytest.raises(TypeError, match=f"Muon cannot have {option}: .*orthogonaliz"):
        optim.Muon(make_params(), **{option: True})
