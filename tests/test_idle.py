"""Options without effect: each option acts, is refused, or is reported as having no effect."""

import warnings

import pytest
import torch
from helpers import FOR_SMALL, PRODIGIES, make_params, run, set_grads
from torch.nn import Parameter

import optim
from trainer.training import optimizers

SHAPES = [(24, 16), (16, 3, 3, 3), (24,)]
# Non-default values for options without an obvious alternative.
OTHER = {
    "lr": 0.3,
    "alpha": 2.0,
    "warmup_steps": 20,
    "max_grad_norm": 1e-2,
    "grad_clip": 1e-2,
    "growth_limit": 1.2,
    "momentum": 0.5,
    "ns_steps": 2,
    "adjust_lr_fn": "original",
    "beta1": 0.5,
    "beta2": 0.5,
    "beta2_decay": -0.3,
    "beta3": 0.5,
    "d0": 1e-3,
    "d_coef": 0.5,
    "growth_rate": 1.01,
    "slice_p": 2,
    "rho": 1e3,
    "clip_threshold": 0.1,
    "weight_decay": 0.5,
    "seed": 3,
    "storage": "factored",
    "rounding": "nearest",
    "clip_norm": "lagged",
    "conv_view": "last2",
    "rank": 2,
    "scale": 3.0,
    "update_gap": 2,
    "projection": "sign",
}
USUAL = FOR_SMALL | {"sophia": {"rho": 100.0}} | {name: {"d0": 1e-2} for name in PRODIGIES}
# Options that do not show in a few steps with good gradients.
ELSEWHERE = {"backend", "on_nonfinite", "hessian_every"}
IDLE = [  # (optimizer, options; the last has no effect, a change that gives it one)
    ("sgd", {"momentum": 0.0, "nesterov": True}, {"momentum": 0.5}),
    ("sgd", {"momentum": 0.0, "storage": "8bit"}, {"momentum": 0.5}),
    ("sgd", {"momentum": 0.0, "grams": True}, {"momentum": 0.5}),
    ("adamw", {"betas": (0.0, 0.9), "cautious": True}, {"betas": (0.5, 0.9)}),
    ("ademamix", {"betas": (0.0, 0.9, 0.99), "alpha": 0.0, "grams": True}, {"alpha": 1.0}),
    ("ademamix", {"alpha": 0.0, "warmup_steps": 9}, {"alpha": 1.0}),
    ("lomo", {"cautious": True}, None),
    ("adafactor", {"storage": "bf16"}, {"beta1": 0.5}),
    ("adafactor8bit", {"grams": True}, {"beta1": 0.5}),
    ("adafactor", {"beta2_decay": -0.3}, {"beta2": None}),
    ("adafactor", {"lr": 1e-3, "relative_step": True}, {"lr": 0.5}),
    ("adafactor", {"clip_threshold": None, "clip_norm": "lagged"}, {"clip_threshold": 0.1}),
    ("adafactor8bit_apollo", {"storage": "fp32"}, {"beta1": 0.5}),
    ("adafactor8bit_apollo", {"grams": True}, {"residual": True}),
    ("apollo", {"rank": 24, "scale": 3.0}, {"rank": 4}),
    ("apollo", {"rank": 24, "growth_limit": None}, {"rank": 4}),
    ("apollo_mini", {"rank": 24, "scaling": "channel"}, {"rank": 1}),
    ("adafactor8bit_apollo", {"rank": 24, "projection": "sign"}, {"rank": 4}),
    ("adamw", {"weight_decay": 0.0, "cautious_decay": True}, {"weight_decay": 0.5}),
    ("lion", {"max_grad_norm": 0.1, "grad_clip": 0.1}, {"grad_clip": 0.01}),
    ("adopt", {"atan2": True, "eps": 1e-1}, {"atan2": False}),
    ("prodigy", {"atan2": True, "eps": 1e-1}, {"atan2": False}),
]


def trained(name, dtype=torch.bfloat16, shapes=SHAPES, **options):
    """The weights after a few steps towards a minimum, with gradients that shrink and grow."""
    params = make_params(dtype, shapes)
    optimizer = optim.build(name, params, **{"lr": 0.5} | USUAL.get(name, {}) | options)
    if name == "sophia":
        set_grads(params, 0)
        optimizer.update_hessian(3.0)
    for step, size in enumerate((4, -3.6, 0.01, 1, 2, 4, 8, 16, 32, 64, 128)):
        set_grads(params, step)
        for p in params:
            p.grad = ((p - 3 + p.grad) * size).detach()
        optimizer.step()
    return [p.detach() for p in params]


def same(one, two):
    return all(map(torch.equal, one, two))


def another(option, default):
    if isinstance(default, bool):
        return not default
    if isinstance(default, tuple):
        return tuple(0.5 for _ in default)
    if option == "eps":
        return 5.0
    if option == "scaling":
        return "tensor" if default == "channel" else "channel"
    return "8bit" if default == OTHER[option] == "factored" else OTHER[option]


@pytest.mark.filterwarnings("error::optim.IdleOption")
@pytest.mark.parametrize("name", sorted(optim.FAMILY))
def test_every_option_by_itself_does_something_or_is_said_to_do_nothing(name):
    usual = trained(name)
    for option, (_, default) in optim.options_of(name).items():
        if option in ELSEWHERE:
            continue
        try:
            changed = trained(name, **{option: another(option, default)})
        except (optim.IdleOption, ValueError) as error:
            said = str(error)
        else:
            said = "" if same(changed, usual) else option
        assert option in said, f"{option} changes nothing, and nothing is said"


@pytest.mark.parametrize(("name", "options", "remedy"), IDLE, ids=str)
def test_an_option_that_is_said_to_do_nothing_does_nothing_unless_the_remedy_is_taken(
    name, options, remedy
):
    *_, idle = options
    with pytest.warns(optim.IdleOption, match=f": {idle}=.* has no effect .*leave it out") as said:
        ends = trained(name, torch.float32, **options)
    assert len(said) == (2 if "rank" in options else 1)  # rank has no effect either
    rest = {key: value for key, value in options.items() if key != idle}
    assert same(ends, trained(name, torch.float32, **rest))
    if remedy is not None:
        other = {key: value for key, value in (rest | remedy).items() if key != idle}
        one, two = (trained(name, torch.float32, **each) for each in (options | remedy, other))
        assert not same(one, two)


@pytest.mark.parametrize(
    ("option", "dtype", "other"),
    [
        ({"rounding": "kahan"}, torch.float32, torch.zeros(3, dtype=torch.float16)),
        ({"rounding": "nearest"}, torch.float32, torch.zeros(3, dtype=torch.bfloat16)),
        ({"conv_view": "last2"}, torch.bfloat16, torch.zeros(2, 2, 2)),
    ],
    ids=str,
)
def test_an_option_of_other_tensors_is_said_to_do_nothing_unless_there_is_one(option, dtype, other):
    (name,) = option
    with pytest.warns(optim.IdleOption, match=f"Adafactor: {name}=.* has no effect"):
        ends = trained("adafactor", dtype, [(24, 16)], **option)
    assert same(ends, trained("adafactor", dtype, [(24, 16)]))
    groups = [{"params": make_params(dtype, [(24, 16)])}, {"params": [Parameter(other)]}]
    with warnings.catch_warnings():
        warnings.simplefilter("error", optim.IdleOption)
        optim.build("adafactor", groups, **option)


@pytest.mark.parametrize("option", ["cautious", "grams"])
def test_the_sign_of_an_update_that_is_the_scaled_gradient_is_said_to_be_the_gradients(option):
    matrices = [(48, 32), (32, 48)]
    with pytest.warns(optim.IdleOption, match=f"{option}=True has no effect .* residual where"):
        ends = trained("apollo_mini", torch.float32, matrices, **{option: True})
    assert same(ends, trained("apollo_mini", torch.float32, matrices))
    with warnings.catch_warnings():
        warnings.simplefilter("error", optim.IdleOption)
        optim.ApolloMini(make_params(shapes=[*matrices, (5,)]), **{option: True})


def test_fp16_weights_that_small_steps_leave_where_they_are_are_said():
    def moved(name="adamw", dtype=torch.float16, **options):
        param = Parameter(torch.ones(8, dtype=dtype))
        optimizer = optim.build(name, [param], **{"lr": 1e-5, "weight_decay": 0.0} | options)
        for _ in range(200):
            param.grad = torch.ones_like(param)
            optimizer.step()
        return 1 - param.mean().item()

    says = "rounding='stochastic' applies to bf16 weights only.*use rounding='kahan' or fp32"
    with pytest.warns(optim.IdleOption, match=says) as said:
        assert moved() == 0
    assert len(said) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error", optim.IdleOption)
        assert moved(rounding="kahan") > 1e-3
        assert moved(dtype=torch.bfloat16) > 0
        moved(rounding="nearest")  # nearest was requested
        moved("prodigy", lr=1.0)  # keeps the rounding error
        optim.AdamW([Parameter(torch.ones(8, dtype=torch.float16), requires_grad=False)])


def test_numbers_that_orthograd_leaves_where_they_are_are_said():
    params = make_params(shapes=[(24, 16), (), (1,)])
    before = [p.detach().clone() for p in params]
    says = r"orthograd=True leaves parameters of one element .*\(2 of them\).* orthograd=False"
    with pytest.warns(optim.IdleOption, match=says) as said:
        optimizer = optim.AdamW(params, orthograd=True, weight_decay=0.0)
    assert len(said) == 1
    run(optimizer, params, range(2))
    assert [same([p], [q]) for p, q in zip(params, before, strict=True)] == [False, True, True]
    with warnings.catch_warnings():
        warnings.simplefilter("error", optim.IdleOption)
        optim.AdamW(
            [{"params": params[:1]}, {"params": params[1:], "orthograd": False}], orthograd=True
        )


def test_an_option_that_acts_in_one_group_may_be_set_for_all():
    """For example with a group of biases that do not decay."""
    params = make_params()
    biases = {"params": params[2:], "weight_decay": 0.0}
    with warnings.catch_warnings():
        warnings.simplefilter("error", optim.IdleOption)
        optim.build("adamw", [{"params": params[:2]}, biases], cautious_decay=True)
    with pytest.warns(optim.IdleOption, match="cautious_decay=True has no effect with weight_dec"):
        optim.build("adamw", [{"params": params[:2]}, biases | {"cautious_decay": True}])


UNPROJECTED = [  # (shapes, the largest rank that projects one of them)
    ([(24, 16), (16, 3, 3, 3), (24,)], 15),
    ([(9,), (4, 9), (7, 5, 2)], 6),
]


@pytest.mark.parametrize(("shapes", "largest"), UNPROJECTED, ids=str)
@pytest.mark.parametrize(
    ("name", "instead"),
    [("apollo", "adamw"), ("apollo_mini", "adamw"), ("adafactor8bit_apollo", "adafactor8bit")],
)
def test_an_apollo_that_projects_nothing_says_whose_steps_it_makes_and_which_rank_would(
    name, instead, shapes, largest
):
    step_by = optim.FAMILY[instead].__name__
    says = rf"rank={largest + 1} has no effect .*: {step_by} steps them all; set rank={largest} or"
    with pytest.warns(optim.IdleOption, match=says) as said:
        ends = trained(name, torch.float32, shapes, rank=largest + 1)
    assert len(said) == 1
    options = {"storage": optim.FAMILY[name].default_options()["storage"], "weight_decay": 0.0}
    assert same(ends, trained(instead, torch.float32, shapes, **options))
    with warnings.catch_warnings():
        warnings.simplefilter("error", optim.IdleOption)
        optim.build(name, make_params(shapes=shapes), rank=largest)


def test_an_apollo_of_vectors_alone_names_no_rank_that_would_project():
    with pytest.warns(optim.IdleOption, match="rank=256 .*steps them all; use AdamW itself"):
        optim.build("apollo", make_params(shapes=[(9,), (9, 1)]))


def test_a_run_says_once_that_no_tensor_is_projected(composed, caplog, recwarn):
    optimizers.build(composed("optim=apollo").optim, torch.nn.Linear(4, 4), seed=0)
    assert caplog.text.count("optim.rank=256 has no effect") == 1
    assert not recwarn.list


@pytest.mark.parametrize("name", sorted(optim.FAMILY))
def test_no_preset_sets_an_option_that_does_nothing(name, composed, caplog):
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Linear(300, 300))
    optimizer = optimizers.build(composed(f"optim={name}").optim, model, seed=1)
    assert optimizer.idle_options() == []
    assert "no effect" not in caplog.text


def test_a_run_says_once_which_option_does_nothing(composed, caplog, recwarn):
    of = composed("optim=sgd", "optim.momentum=0", "optim.nesterov=true").optim
    optimizers.try_out(of)
    assert not caplog.text
    optimizers.build(of, torch.nn.Linear(2, 2), seed=0)
    assert caplog.text.count("optim.nesterov=True has no effect with momentum=0") == 1
    assert not recwarn.list
