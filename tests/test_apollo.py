"""APOLLO and its variants: compared with written-out equations and peer implementations, and
tested for their promises."""

import math
from itertools import pairwise

import adafactor8bit
import pytest
import pytorch_optimizer
import torch
from helpers import assert_same, build, make_params, projection_of, run, set_grads

import optim

SHAPES = [(24, 16), (16, 24), (16, 16), (12, 3, 3, 3)]
APOLLOS = ["apollo", "apollo_mini", "adafactor8bit_apollo"]


def moved(params, shapes):
    return [start - p.detach() for p, start in zip(params, make_params(shapes=shapes), strict=True)]


# The equations ------------------------------------------------------------------------------------


class Written:
    """APOLLO in fp64, channel by channel: Zhu et al. 2024, Alg. 1, with Fira's limiter."""

    def __init__(self, param, index, options):
        self.w, self.index, self.o = param.detach().double(), index, options
        self.m, self.v, self.norm, self.t = 0.0, 0.0, None, 0

    def step(self, grad):
        o, rows = self.o, self.w.shape[0]
        self.t += 1
        g = grad.double().reshape(rows, -1)
        tall = g.shape[0] >= g.shape[1]  # the smaller dimension is projected
        g = g.T if tall else g
        options = {key: o[key] for key in ("rank", "update_gap", "projection")}
        p = projection_of(self.index, self.t, g.shape[0], **options)
        r = p @ g
        self.m = 0.9 * self.m + 0.1 * r
        self.v = 0.99 * self.v + 0.01 * r**2
        n = self.m / (1 - 0.9**self.t) / ((self.v / (1 - 0.99**self.t)).sqrt() + 1e-8)
        scale = g.shape[0] / o["rank"] if o["scale"] == "auto" else o["scale"]
        u = torch.zeros_like(g)
        for j in range(g.shape[1]):
            of = slice(j, j + 1) if o["scaling"] == "channel" else slice(None)
            ratio = n[:, of].square().sum().sqrt() / r[:, of].square().sum().sqrt()
            u[:, j] = math.sqrt(scale) * ratio * g[:, j]
        norm = u.square().sum().sqrt()
        if o["growth_limit"] is not None and self.norm is not None:
            u = u * min(1.0, o["growth_limit"] * self.norm / norm)
            norm = min(norm, o["growth_limit"] * self.norm)
        self.norm = norm
        u = (u.T if tall else u).reshape(self.w.shape)
        self.w = self.w * (1 - 1e-2 * 0.1) - 1e-2 * u


@pytest.mark.parametrize(
    "options",
    [
        {"rank": 4},
        {"rank": 4, "scaling": "tensor", "scale": 3.0},
        {"rank": 4, "projection": "sign", "update_gap": 7},
        {"rank": 4, "growth_limit": None, "scale": 1},
        {"rank": 1, "scaling": "tensor", "growth_limit": 1.2},
    ],
    ids=str,
)
def test_apollo_is_its_equations(options):
    params = make_params(shapes=SHAPES)
    options = {"scaling": "channel", "scale": "auto", "growth_limit": 1.01} | options
    options = {"projection": "gaussian", "update_gap": 200} | options
    written = [Written(p, index, options) for index, p in enumerate(params)]
    optimizer = optim.build(
        "apollo", params, lr=1e-2, weight_decay=0.1, betas=(0.9, 0.99), **options
    )
    for step in range(20):
        run(optimizer, params, [step])
        for p, other in zip(params, written, strict=True):
            other.step(p.grad)
    for p, other, start in zip(params, written, make_params(shapes=SHAPES), strict=True):
        assert (p - other.w).norm() <= 1e-5 * (other.w - start).norm()


def test_the_residual_is_firas_equations():
    """Chen et al. 2024, in fp64 with an orthonormal projection."""
    params, (shape,), rank = make_params(shapes=[(16, 24)]), [(16, 24)], 4
    w, norm, m, v = params[0].detach().double(), None, 0.0, 0.0
    optimizer = optim.build("apollo", params, lr=1e-2, rank=rank, residual=True)
    for t in range(1, 21):
        run(optimizer, params, [t])
        g = params[0].grad.double()
        q = torch.linalg.qr(projection_of(0, t, shape[0], rank=rank).T).Q.T
        r = q @ g
        m, v = 0.9 * m + 0.1 * r, 0.999 * v + 0.001 * r**2
        n = m / (1 - 0.9**t) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
        rest = (g - q.T @ r) * (n.norm(dim=0) / r.norm(dim=0))
        if norm is not None:
            rest = rest * min(1.0, 1.01 * norm / rest.norm())
        norm = rest.norm()
        w = w - 1e-2 * (q.T @ n + rest)
    assert (params[0] - w).norm() <= 1e-5 * (w - make_params(shapes=[shape])[0]).norm()


@pytest.mark.parametrize("scaling", ["channel", "tensor"])
def test_the_first_step_over_adafactor_is_its_equations(scaling):
    """Shazeer & Stern 2018, Alg. 4, in the projection; the first step involves no rounded state."""
    shapes = [(24, 16), (12, 3, 3, 3)]
    params = make_params(shapes=shapes)
    options = {"rank": 4, "scaling": scaling, "clip_threshold": 0.7}
    run(optim.build("adafactor8bit_apollo", params, lr=1.0, **options), params, [0])
    for index, (p, found) in enumerate(zip(params, moved(params, shapes), strict=True)):
        g = p.grad.double().reshape(p.shape[0], -1)
        tall = g.shape[0] >= g.shape[1]
        g = g.T if tall else g
        r = projection_of(index, 1, g.shape[0], rank=4) @ g
        row, col = r.square().mean(dim=1), r.square().mean(dim=0)
        n = r / torch.outer(row, col).div(row.mean()).sqrt()
        dim = (0,) if scaling == "channel" else (0, 1)
        ratio = torch.linalg.vector_norm(n, dim=dim) / torch.linalg.vector_norm(r, dim=dim)
        u = math.sqrt(g.shape[0] / 4) * ratio * g
        u = u / max(1.0, u.square().mean().sqrt() / 0.7)
        assert torch.allclose(found.double(), (u.T if tall else u).reshape(p.shape), rtol=1e-4)


# The peers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("scaling", ["channel", "tensor"])
def test_apollo_is_that_of_adafactor8bit(scaling, monkeypatch):
    """The peer uses this family's projections.  The limiter is off: the peer's acts before bias
    correction, ours after it."""
    shapes, rank = [(24, 16), (16, 24)], 4
    ours, theirs = make_params(shapes=shapes), make_params(shapes=shapes)

    def project(state, shape, step, dtype, device, cache_proj=False):
        p = projection_of(shapes.index(tuple(shape)), step, min(shape), rank=rank).float()
        return (p.T if shape[0] >= shape[1] else p), False

    monkeypatch.setattr(adafactor8bit.optimizer, "_get_apollo_proj_matrix", project)
    peer = adafactor8bit.Adafactor8Bit(
        theirs,
        lr=1e-2,
        beta1=0.9,
        beta2=0.999,
        d=0,
        quantize=False,
        use_cuda_kernel=False,
        relative_step=False,
        scale_parameter=False,
        weight_decay=0.1,
        scale_weight_decay=False,
        apollo_rank=rank,
        apollo_scale=4.0,
        apollo_scale_type=scaling,
        apollo_eps=1e-12,
        enable_fira_for_apollo=False,
    )
    options = {"rank": rank, "scale": 4.0, "scaling": scaling, "eps": 1e-12, "growth_limit": None}
    run(optim.build("apollo", ours, lr=1e-2, weight_decay=0.1, **options), ours, range(60))
    run(peer, theirs, range(60))
    for a, b, start in zip(ours, theirs, make_params(shapes=shapes), strict=True):
        assert (a - b).norm() <= 3e-5 * (b - start).norm()


class Projector:
    """This family's projection, made orthonormal by QR, with pytorch_optimizer's interface."""

    def __init__(self, index, shape, rank):
        self.tall = shape[0] >= shape[1]
        self.q = torch.linalg.qr(projection_of(index, 1, min(shape), rank=rank).T).Q.T.float()

    def project(self, grad, step):
        return grad @ self.q.T if self.tall else self.q @ grad

    def project_back(self, low):
        return low @ self.q if self.tall else self.q.T @ low


def test_the_residual_is_that_of_fira_in_pytorch_optimizer():
    """Without averages, because the peer's limiter judges the residual before bias correction."""
    shapes, rank = [(24, 16), (16, 24)], 4
    ours, theirs = make_params(shapes=shapes), make_params(shapes=shapes)
    group = {"params": theirs, "rank": rank, "update_proj_gap": 200, "scale": 1.0}
    peer = pytorch_optimizer.Fira(
        [group | {"projection_type": "std"}], lr=1e-2, betas=(0.0, 0.0), eps=1e-12
    )
    for index, p in enumerate(theirs):
        peer.state[p]["projector"] = Projector(index, tuple(p.shape), rank)
    options = {"rank": rank, "residual": True, "betas": (0.0, 0.0), "eps": 1e-12}
    run(optim.build("apollo", ours, lr=1e-2, **options), ours, range(60))
    run(peer, theirs, range(60))
    for a, b, start in zip(ours, theirs, make_params(shapes=shapes), strict=True):
        assert (a - b).norm() <= 3e-5 * (b - start).norm()


# The promises -------------------------------------------------------------------------------------


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("projection", ["gaussian", "sign"])
@pytest.mark.parametrize("name", ["apollo", "adafactor8bit_apollo"])
def test_the_first_update_is_as_long_as_lr_in_layers_of_every_width(name, projection, residual):
    shapes = [(32, 64), (64, 200), (320, 320), (640, 16, 3, 3), (1280, 512)]
    params = make_params(shapes=shapes)
    options = {"rank": 24, "projection": projection, "residual": residual}
    if name == "adafactor8bit_apollo":
        options["clip_threshold"] = None
    run(optim.build(name, params, lr=0.01, **options), params, [0])
    for step in moved(params, shapes):
        assert step.square().mean().sqrt().item() == pytest.approx(0.01, rel=0.1)


def test_a_fixed_scale_makes_wide_layers_slow_and_its_root_multiplies_the_update():
    shapes, sizes = [(64, 100), (256, 400)], {}
    for scale in (1.0, 16.0):
        params = make_params(shapes=shapes)
        run(optim.build("apollo", params, lr=0.01, rank=16, scale=scale), params, [0])
        sizes[scale] = [x.square().mean().sqrt().item() for x in moved(params, shapes)]
    assert sizes[1.0] == pytest.approx([0.01 * (16 / 64) ** 0.5, 0.01 * (16 / 256) ** 0.5], rel=0.1)
    assert sizes[16.0] == pytest.approx([4 * x for x in sizes[1.0]], rel=1e-4)


@pytest.mark.parametrize(
    ("name", "options", "peer"),
    [
        ("apollo", {"storage": "fp32"}, "adamw"),
        ("apollo", {"storage": "8bit"}, "adamw8bit"),
        ("apollo", {"storage": "factored"}, "adamw_factored"),
        ("apollo_mini", {"storage": "bf16"}, "adamw"),
        ("adafactor8bit_apollo", {}, "adafactor8bit"),
        ("adafactor8bit_apollo", {"beta1": 0.9, "beta2": None}, "adafactor8bit"),
    ],
)
@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_what_is_not_projected_is_stepped_by_the_dense_optimizer_without_a_growth_limit(
    name, options, peer, backend
):
    shapes = [(16, 3), (8,), (5, 2, 2), ()]
    rank = 1 if name == "apollo_mini" else 8
    shapes = [(16, 1), (8,), ()] if rank == 1 else shapes
    ours, theirs = make_params(shapes=shapes), make_params(shapes=shapes)
    own = {} if name == "adafactor8bit_apollo" else {"eps": 1e-8}
    optimizer = optim.build(name, ours, rank=rank, backend=backend, **options, **own)
    assert optimizer.defaults["growth_limit"] == 1.01
    run(optimizer, ours, range(5))
    shared = options | own | {"weight_decay": 0.0}
    run(optim.build(peer, theirs, backend=backend, **shared), theirs, range(5))
    assert_same(ours, theirs)


@pytest.mark.parametrize("size", [1e-10, 1.0, 1e6])
def test_with_atan2_an_update_does_not_depend_on_the_size_of_gradients(size):
    params = make_params(shapes=[(64, 48)])
    optimizer = optim.build("apollo", params, lr=0.01, rank=24, atan2=True)
    set_grads(params, 0)
    params[0].grad *= size
    optimizer.step()
    (step,) = moved(params, [(64, 48)])
    assert step.square().mean().sqrt().item() == pytest.approx(0.01, rel=0.1)


def test_a_state_of_another_rank_is_refused():
    params = make_params(shapes=[(64, 48)])
    optimizer = optim.build("apollo", params, rank=4)
    run(optimizer, params, range(2))
    state = optimizer.state_dict()
    state["param_groups"][0]["rank"] = 8  # like a resume with another option
    with pytest.raises(ValueError, match=r"'exp_avg' is .*\(4, 64\).* should be .*\(8, 64\)"):
        optim.build("apollo", params, rank=8).load_state_dict(state)


def test_with_one_scale_a_tensor_every_update_points_along_the_gradient():
    params = make_params(shapes=[(32, 24)])
    optimizer = optim.build("apollo_mini", params)
    for step in range(4):
        before = params[0].detach().clone()
        run(optimizer, params, [step])
        update, g = before - params[0].detach(), params[0].grad
        assert (update * g).sum() / (update.norm() * g.norm()) == pytest.approx(1, abs=1e-5)


def test_an_update_grows_by_one_percent_at_most_unless_asked_otherwise():
    norms = {}
    for limit in ({}, {"growth_limit": None}):
        params = make_params(shapes=[(32, 24)])
        optimizer = optim.build("apollo", params, lr=1.0, rank=4, update_gap=3, **limit)
        norms[str(limit)] = []
        for step in range(12):
            before = params[0].detach().clone()
            run(optimizer, params, [step])
            norms[str(limit)].append((before - params[0].detach()).norm().item())
    limited, free = norms.values()
    assert max(b / a for a, b in pairwise(free)) > 1.1
    assert max(b / a for a, b in pairwise(limited)) <= 1.0101


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("name", APOLLOS)
def test_a_zero_gradient_does_not_lock_a_tensor_in(name, residual):
    params = make_params(shapes=[(32, 24)])
    optimizer = build(name, params, lr=1.0, residual=residual)
    lengths = []
    for step in range(4):
        before = params[0].detach().clone()
        set_grads(params, step)
        if step == 1:
            params[0].grad.zero_()
        optimizer.step()
        lengths.append((before - params[0].detach()).norm().item())
    assert lengths[3] > 0.2 * lengths[0]


def test_the_limit_comes_before_the_clip():
    """The limited norm is remembered; the clip then shortens the limited update."""
    params = make_params(shapes=[(32, 24)])
    optimizer = optim.build("adafactor8bit_apollo", params, lr=1.0, rank=4, clip_threshold=0.5)
    run(optimizer, params, [0])
    (step,) = moved(params, [(32, 24)])
    assert step.square().mean().sqrt().item() == pytest.approx(0.5, rel=1e-4)
    remembered = optimizer.state[params[0]]["update_norm"].item()
    assert remembered == pytest.approx(math.sqrt(32 * 24), rel=0.2)


@pytest.mark.parametrize("storage", ["fp32", "bf16"])
def test_a_channel_without_a_usable_element_keeps_its_moments(storage):
    params = make_params(shapes=[(32, 24)])  # its channels are the 32 rows
    optimizer = optim.build("apollo", params, rank=4, storage=storage)
    run(optimizer, params, range(3))
    state = optimizer.state[params[0]]
    before = {key: state[key].clone() for key in ("exp_avg", "exp_avg_sq")}
    set_grads(params, 3)
    params[0].grad[5] = math.nan
    params[0].grad[6, :20] = math.inf  # 4 usable elements are left
    optimizer.step()
    for key, old in before.items():
        same = (state[key] == old).all(dim=0)
        assert same.nonzero().flatten().tolist() == [5]


@pytest.mark.parametrize("name", ["adafactor", "came", "came8bit", *APOLLOS])
def test_a_convolution_is_stepped_as_its_matrix(name):
    ends = []
    for shape in ((12, 5, 3, 3), (12, 45)):
        params = make_params(torch.bfloat16, [shape])
        options = {"rank": 4} if name in ("apollo", "adafactor8bit_apollo") else {}
        run(optim.build(name, params, backend="torch", **options), params, range(4))
        ends.append(params[0].detach().flatten())
    assert torch.equal(*ends)
