"""A step's view of its parameters, their gradients and their state notices every change, natively
and in Python."""

import pytest
import torch
from helpers import assert_same, build, make_params, run, set_grad
from torch.nn import Parameter

from optim import native, share
from optim.share import Places, Share, Trait

if native.unavailable() is not None:
    pytest.skip("it is not built", allow_module_level=True)

WAYS = ["native", "python"]


@pytest.fixture(params=WAYS)
def look(request, monkeypatch):
    """A function from parameters to their `Share`, built natively or in Python."""
    if request.param == "python":
        monkeypatch.setattr(share, "_EXCHANGE", None)
    elif native._native.parameters([], share._EXCHANGE) is None:
        pytest.skip("this torch has no table of DLPack functions")
    return lambda params: Share(Places((i, {}, p) for i, p in enumerate(params)))


def with_grad(data, grad):
    param = Parameter(data)
    if grad is not None:
        set_grad(param, grad)
    return param


def square(dtype=torch.float32):
    return torch.ones(4, 4, dtype=dtype)


SEEN = [
    (lambda: with_grad(square(), square()), Trait(0)),
    (lambda: with_grad(square(), square().t()), Trait.SCATTERED),
    (lambda: with_grad(square().t(), square()), Trait.SCATTERED),
    (lambda: with_grad(square(), torch.ones(()).expand(4, 4)), Trait.SCATTERED),
    (lambda: with_grad(torch.ones(1, 4), torch.ones(4, 1).t()), Trait(0)),
    (lambda: with_grad(torch.ones(0, 3), torch.ones(3, 0).t()), Trait(0)),
    (lambda: with_grad(torch.ones(()), torch.ones(())), Trait(0)),
    (lambda: with_grad(square(), square(torch.float64)), Trait.FOREIGN),
    (lambda: with_grad(square(torch.float16), square(torch.bfloat16)), Trait(0)),
    (lambda: with_grad(square(), None), Trait.MISSING),
    (lambda: with_grad(square(), square().to_sparse()), Trait.SPARSE),
]


@pytest.mark.parametrize(("make", "trait"), SEEN)
def test_one_tensor_among_plain_ones_gives_all_its_trait(make, trait, look):
    plain = [with_grad(square(), square()) for _ in range(2)]
    seen = look([plain[0], make(), plain[1]])
    assert seen.traits == trait
    assert [grad is p.grad for grad, p in zip(seen.grads, seen.params, strict=True)] == [True] * 3


def test_addresses_are_those_of_each_parameter_and_its_gradient(look):
    base = torch.ones(9)
    params = [with_grad(base[3:7], torch.ones(4)), with_grad(square(), square())]
    expected = [[p.data_ptr(), p.grad.data_ptr()] for p in params]
    assert look(params).addresses.tolist() == expected
    assert look([]).addresses.shape == (0, 2)
    tensors = [base, base[3:], torch.ones(3, dtype=torch.uint8), torch.ones(())]
    found = torch.frombuffer(bytearray(share.where(tensors)), dtype=torch.int64).tolist()
    assert found == [x.data_ptr() for x in tensors]


@pytest.mark.parametrize(
    "change",
    [
        lambda p: setattr(p, "data", torch.ones(4, 5)),
        lambda p: setattr(p, "data", p.data.bfloat16()),
        lambda p: setattr(p, "data", p.data.t()),
        lambda p: set_grad(p, p.grad.bfloat16()),
        lambda p: set_grad(p, p.grad.half()),
        lambda p: setattr(p, "grad", p.grad.t()),
    ],
)
def test_whatever_changes_about_a_tensor_changes_the_kinds(change, look):
    params = [with_grad(square(), square()) for _ in range(3)]
    before = look(params).kinds
    for p in params:
        p.grad = p.grad.clone()  # a new tensor of the same kind
    assert look(params).kinds == before
    change(params[1])
    assert look(params).kinds != before


def test_a_step_is_the_same_whoever_looks(monkeypatch):
    stepped = []
    for exchange in (share._EXCHANGE, None):
        monkeypatch.setattr(share, "_EXCHANGE", exchange)
        params = make_params(torch.bfloat16)
        run(build("adamw8bit", params), params, range(3))
        stepped.append(params)
    assert_same(*stepped)


def exchanged(state, params):
    a, b = params[1], params[2]
    state[a], state[b] = state[b], state[a]


def shifted(state, params):
    """Move a tensor to the previous state, which keeps the sequence of all tensors the same."""
    state[params[1]]["z"] = state[params[2]].pop("x")


STATES = {
    "untouched": (lambda state, params: None, True),
    "in another order": (
        lambda state, params: state.update({params[0]: state.pop(params[0])}),
        True,
    ),
    "a replaced tensor": (lambda s, params: s[params[3]].update(y=torch.zeros(2)), False),
    "an added tensor": (lambda s, params: s[params[3]].update(z=torch.zeros(2)), False),
    "a lost tensor": (lambda s, params: s[params[3]].pop("y"), False),
    "a lost state": (lambda s, params: s.pop(params[3]), False),
    "exchanged states": (exchanged, False),
    "a tensor of another state": (shifted, False),
}


@pytest.mark.parametrize("same_state", [share._native.same_state, share.same_state_in_python])
@pytest.mark.parametrize("case", STATES)
@pytest.mark.parametrize("chosen", [slice(None), slice(1, 4), slice(None, None, -1)])
def test_a_state_is_the_same_only_with_the_same_tensors(case, chosen, same_state):
    change, same = STATES[case]
    params = [torch.zeros(1) for _ in range(5)]
    state = {p: {"x": torch.zeros(1), "y": torch.zeros(1)} for p in [*params, torch.zeros(1)]}
    asked = params[chosen]
    parts = [x for p in asked for x in state[p].values()]
    counts = torch.tensor([2] * len(asked), dtype=torch.int32).numpy().tobytes()
    assert same_state(state, asked, parts, counts)
    change(state, params)
    assert same_state(state, asked, parts, counts) == same


@pytest.mark.parametrize("same", [share._native.same_objects, share.same_objects_in_python])
def test_equal_objects_are_not_the_same(same):
    a, b = torch.zeros(2), torch.zeros(2)
    assert same([a, b], [a, b])
    assert not same([a, b], [a, a])
    assert not same([a, b], [a])
