"""The family's classes: what they say of their options, and classes of one's own."""

import inspect
from typing import Literal, get_args, get_origin

import pytest
import torch
from conftest import REPOSITORY
from helpers import make_params
from torch.nn import Parameter

import optim
from optim.codecs import stored
from optim.options import check
from optim.reference import ema

NAMES = sorted(optim.FAMILY)


def test_a_class_with_a_rule_of_its_own_may_have_options_of_its_own():
    class Scaled(optim.FusedOptimizer):
        """SGD with a factor."""

        @staticmethod
        def rule(h, w, g, moments):
            return h.factor * g, moments

        def __init__(self, params, lr=1.0, *, factor=3.0, weight_decay=0.0, **features):
            super().__init__(params, locals())

        def moments(self, param, group):
            return {}

    param = Parameter(torch.zeros(2))
    param.grad = torch.ones(2)
    Scaled([param], factor=2.0, backend="torch").step()
    assert param.tolist() == [-2, -2]


@pytest.mark.filterwarnings("ignore:the optimizers run on plain PyTorch")
@pytest.mark.parametrize("storage", ["fp32", "8bit", "factored"])
def test_the_class_that_the_documentation_writes_is_an_optimizer(storage):
    text = (REPOSITORY / "docs/library.md").read_text()
    (code,) = [each for each in text.split("```") if each.startswith("python\nclass ")]
    names = {"optim": optim, "ema": ema, "stored": stored, "__name__": "mine"}
    exec(code.removeprefix("python"), names)
    params = [Parameter(torch.full((8, 8), 3.0))]
    optimizer = names["Signum"](params, lr=0.5, storage=storage)
    for _ in range(6):
        optim.FusedOptimizer.zero_grad(optimizer)
        params[0].square().sum().backward()
        optimizer.step()
    assert torch.equal(params[0], torch.zeros(8, 8))
    with pytest.raises(TypeError, match="did you mean 'decay'"):
        names["Signum"](params, decy=0.5)


def test_build_and_the_class_have_the_same_defaults():
    for name, cls in optim.FAMILY.items():
        built, direct = optim.build(name, make_params()), cls(make_params())
        assert built.defaults == direct.defaults
        assert set(built.defaults) | {"backend"} == set(optim.options_of(name))


@pytest.mark.parametrize("name", NAMES)
def test_a_choice_may_be_what_its_type_says_and_nothing_else(name):
    known = optim.FAMILY[name].default_options()
    for option, (kind, _) in optim.options_of(name).items():
        assert kind is not str, f"{option} should name its choices"
        if kind is bool or get_origin(kind) is Literal:
            for choice in get_args(kind) or (False, True):
                check(name, known, {option: choice})
            with pytest.raises(ValueError, match=f"{option}='x'"):
                check(name, known, {option: "x"})


@pytest.mark.parametrize("name", NAMES)
def test_help_lists_every_option_with_its_meaning_and_its_default(name):
    cls = optim.FAMILY[name]
    signature, options = inspect.signature(cls), optim.options_of(name)
    assert [*signature.parameters] == ["params", *options]
    assert {k: p.default for k, p in signature.parameters.items() if k != "params"} == {
        option: default for option, (_, default) in options.items()
    }
    documentation = " ".join((cls.__doc__ or "").split())
    for option, (_, default) in options.items():
        meaning, _, rest = documentation.partition(f" {option}: ")[2].partition(" Default: ")
        assert len(meaning) > 5, option
        assert rest.startswith(f"{default!r}."), option
    assert max(map(len, cls.__doc__.splitlines())) <= 96
    bound = signature.bind(make_params(), 0.5, seed=3)
    assert cls(*bound.args, **bound.kwargs).defaults == cls(make_params(), 0.5, seed=3).defaults


def test_a_class_may_change_defaults_and_nothing_else():
    class Small(optim.Apollo):
        own_defaults = {"lr": 0.25, "rank": 2, "storage": "8bit"}  # noqa: RUF012

    assert inspect.signature(Small).parameters["rank"].default == 2
    assert "lr: step size. Default: 0.25." in Small.__doc__
    found = Small(make_params(), rank=3).defaults
    assert (found["lr"], found["rank"], found["storage"]) == (0.25, 3, "8bit")
    assert Small(make_params()).defaults["rank"] == 2
    assert optim.Apollo(make_params(), rank=3).defaults["lr"] == 1e-3
    with pytest.raises(TypeError, match="did you mean 'rank'"):
        type("Wrong", (optim.Apollo,), {"own_defaults": {"rnk": 1}})
    with pytest.raises(ValueError, match=r"rank.*0\.5"):
        type("Wrong", (optim.Apollo,), {"own_defaults": {"rank": 0.5}})


def test_a_class_with_a_constructor_of_its_own_has_that_ones_signature():
    class Tuned(optim.AdamW8bit):
        """AdamW8bit of a model."""

        def __init__(self, model, speed):
            super().__init__(model.parameters(), lr=speed)

    assert [*inspect.signature(Tuned).parameters] == ["model", "speed"]
    assert Tuned.__doc__ == "AdamW8bit of a model."
    assert Tuned(torch.nn.Linear(2, 2), 0.5).defaults["storage"] == "8bit"
