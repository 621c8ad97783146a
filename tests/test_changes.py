"""What changes between steps: an option that is switched off, weights of another dtype."""

import pytest
import torch
from helpers import build, make_params, run

import optim


@pytest.mark.parametrize(
    ("name", "options", "later"),
    [
        ("sgd", {"momentum": 0.9}, {"momentum": 0.0}),
        ("adamw", {"growth_limit": 1.1}, {"growth_limit": None}),
        ("adafactor", {"beta1": 0.9}, {"beta1": None}),
        ("adafactor", {"clip_norm": "lagged"}, {"clip_threshold": None}),
        ("adamw", {"rounding": "kahan"}, {"rounding": "nearest"}),
        ("apollo", {"rounding": "kahan", "rank": 4, "grad_clip": 1.0}, {"rounding": "nearest"}),
    ],
)
def test_what_an_option_kept_is_neither_used_nor_saved_once_it_is_off(name, options, later):
    """A run that is saved and loaded at the switch, which leaves it behind, goes on alike."""
    dtype = torch.bfloat16 if "rounding" in options else torch.float32
    ends = []
    for backend, loads in (("auto", False), ("auto", True), ("torch", False)):
        params = make_params(dtype)
        optimizer = build(name, params, backend=backend, **options)
        run(optimizer, params, range(2))
        optimizer.param_groups[0].update(later)
        if loads:
            before = optimizer.state_bytes()
            optimizer.load_state_dict(optimizer.state_dict())
            assert optimizer.state_bytes() < before
        run(optimizer, params, range(2, 4))
        ends.append(params)
    plain, loaded, slow = ends
    for a, b, c in zip(plain, loaded, slow, strict=True):
        assert torch.equal(a, b)
        assert torch.allclose(a, c, rtol=2**-7 if dtype == torch.bfloat16 else 1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_a_model_that_is_made_fp32_is_stepped_without_its_old_rounding_error(backend):
    layer = torch.nn.Linear(64, 64).bfloat16()
    optimizer = build("adamw", layer.parameters(), rounding="kahan", backend=backend)
    params = list(layer.parameters())
    run(optimizer, params, range(2))
    layer.float()
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    twin = build("adamw", twins, backend=backend)
    twin.load_state_dict(optimizer.state_dict())
    for each, its in ((optimizer, params), (twin, twins)):
        run(each, its, range(2, 4))
    assert all(map(torch.equal, params, twins))


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_parameters_that_were_given_another_dtype_are_refused_at_the_next_step(backend):
    layer = torch.nn.Linear(3, 3)
    optimizer = optim.AdamW(layer.parameters(), backend=backend)
    layer(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    layer.double()
    layer(torch.ones(2, 3).double()).sum().backward()
    with pytest.raises(TypeError, match=r"dense fp32, bf16 and fp16 parameters.*torch\.float64"):
        optimizer.step()
