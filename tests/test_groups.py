"""Parameter rules: which options apply where, what is refused, and that a resume keeps them."""

import logging

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

import optim
from trainer.errors import UserError
from trainer.training import groups, optimizers


def network():
    torch.manual_seed(0)
    return nn.ModuleDict(
        {
            "unet": nn.ModuleDict({"attn": nn.Linear(4, 4), "conv_in": nn.Conv2d(3, 4, 3)}),
            "text_encoder": nn.ModuleDict({"tokens": nn.Embedding(5, 4), "attn": nn.Linear(4, 4)}),
        }
    )


def named(model, made):
    """Each group as (the names of its parameters, its options)."""
    names = {p: name for name, p in model.named_parameters()}
    return [
        ([names[p] for p in group["params"]], {k: v for k, v in group.items() if k != "params"})
        for group in made
    ]


def test_without_rules_biases_norms_and_embeddings_do_not_decay():
    model = network()
    assert named(model, groups.parameter_groups(model, 0.1)) == [
        (["unet.attn.weight", "unet.conv_in.weight", "text_encoder.attn.weight"], {}),
        (
            [
                *("unet.attn.bias", "unet.conv_in.bias"),
                *("text_encoder.tokens.weight", "text_encoder.attn.bias"),
            ],
            {"weight_decay": 0.0},
        ),
    ]


def test_dora_magnitudes_do_not_decay_whatever_they_scale():
    model = nn.ModuleDict({"line": nn.Linear(4, 4), "conv": nn.Conv2d(3, 4, 3)})
    inject_adapter_in_model(LoraConfig(r=2, use_dora=True, target_modules=["line", "conv"]), model)
    spared = [
        name
        for names, options in named(model, groups.parameter_groups(model, 0.1))
        if options == {"weight_decay": 0.0}
        for name in names
    ]
    assert [name.split(".")[0] for name in spared if "magnitude" in name] == ["line", "conv"]
    assert not any("lora_A" in name or "lora_B" in name for name in spared)


def test_the_first_rule_that_is_found_in_a_name_decides():
    model = network()
    rules = [
        {"pattern": r"^text_encoder\.tokens", "trainable": False},
        {"pattern": "text_encoder", "lr_scale": 0.5},
        {"pattern": r"conv|attn\.bias", "lr": 0.01, "weight_decay": 0.3},
    ]
    assert named(model, groups.parameter_groups(model, 0.1, rules)) == [
        (["unet.attn.weight"], {}),
        (["text_encoder.attn.weight"], {"lr": 0.05}),
        (["text_encoder.attn.bias"], {"lr": 0.05, "weight_decay": 0.0}),
        (
            ["unet.attn.bias", "unet.conv_in.weight", "unet.conv_in.bias"],
            {"lr": 0.01, "weight_decay": 0.3},
        ),
    ]
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert frozen == ["text_encoder.tokens.weight"]


def test_all_but_some_can_be_frozen():
    model = network()
    rules = [{"pattern": "attn", "trainable": True}, {"pattern": ".", "trainable": False}]
    made = groups.parameter_groups(model, 0.1, rules)
    assert sum(len(group["params"]) for group in made) == 4
    assert sum(p.requires_grad for p in model.parameters()) == 4


def test_the_table_of_rules_is_logged(caplog):
    caplog.set_level(logging.INFO)
    groups.parameter_groups(
        network(),
        0.1,
        [{"pattern": "attn", "lr_scale": 0.5}, {"pattern": "tok", "trainable": False}],
    )
    lines = [" ".join(line.split()) for line in caplog.messages]
    assert lines == [
        "others 1 tensor, 108 parameters",
        "others 1 tensor, 4 parameters without weight decay (biases, norms, embeddings)",
        "attn 2 tensors, 32 parameters lr 0.05",
        "attn 2 tensors, 8 parameters lr 0.05, weight_decay 0.0",
        "tok 1 tensor, 20 parameters not trained",
    ]


NOWHERE = [
    (
        [{"pattern": "mid_block", "lr_scale": 2}],
        r"method.rules\[0\]: mid_block matches no trained parameter; correct",
    ),
    (
        [{"pattern": "attn", "lr_scale": 2}, {"pattern": r"attn\.bias", "lr": 1}],
        r"method.rules\[1\]: attn\\.bias matches no trained parameter that earlier rules leave",
    ),
    ([{"pattern": ".", "trainable": False}], "leave nothing to train"),
]


@pytest.mark.parametrize(("rules", "says"), NOWHERE)
def test_a_rule_that_matches_nothing_is_refused(rules, says):
    with pytest.raises(UserError, match=says):
        groups.parameter_groups(network(), 0.1, rules)


WRONG = [
    ({"lr": 1}, "has no pattern"),
    ({"pattern": "("}, "not a regular expression"),
    ({"pattern": "a"}, "sets nothing"),
    ({"pattern": "a", "lr": 1, "lr_scale": 2}, "lr and lr_scale"),
    ({"pattern": "a", "lr_scale": "much"}, "lr_scale=much"),
    ({"pattern": "a", "trainable": 3}, "true or false"),
    ({"pattern": "a", "trainable": False, "lr": 1}, "no other options"),
]


@pytest.mark.parametrize(("rule", "says"), WRONG, ids=lambda x: str(x))
def test_a_rule_that_says_nothing_sensible_is_refused(rule, says):
    with pytest.raises(UserError, match=says):
        groups.check_rules([rule])


@pytest.mark.parametrize(
    ("optimizer", "options", "says"),
    [
        ("adamw", "beta: 0.9", r"method.rules\[0\] \(attn\): .*no option of AdamW 'beta'"),
        ("adamw", "lr_scal: 0.1", r"no option of AdamW 'lr_scal'.* \(or the rule's own lr_scale"),
        ("adamw", "trainabel: false", r"'trainabel'.*\(or the rule's own trainable"),
        (
            "adamw",
            "xyzzy: 1",
            r"'xyzzy'; choose from .*lr.*\(a rule also has lr_scale and trainable\)",
        ),
        ("adamw", "weight_decay: -1", r"weight_decay=-1 is not possible[^(]*$"),
        ("sophia", "hessian_every: 3", "must be the same in all"),
        (
            "external optim.class_path=torch.optim.RAdam",
            "momentum: 0.9",
            "no option of torch.optim.RAdam 'momentum'",
        ),
    ],
)
def test_an_option_that_the_optimizer_does_not_have_is_refused_before_anything_is_loaded(
    composed, optimizer, options, says
):
    config = composed(*f"optim={optimizer}".split(), f"method.rules=[{{pattern: attn, {options}}}]")
    with pytest.raises(UserError, match=says):
        optimizers.try_out(config.optim, config.method.rules)


def test_rates_of_rules_go_through_the_schedule_and_the_step(composed):
    model = network()
    rules = "method.rules=[{pattern: conv_in, lr_scale: 0}, {pattern: tokens, betas: [0.5, 0.9]}]"
    config = composed("optim=adamw", "optim.lr=0.1", rules)
    optimizers.try_out(config.optim, config.method.rules)
    optimizer = optimizers.build(config.optim, model, 0, config.method.rules)
    assert optimizers.set_lr(optimizer, 0.5) == 0.05
    assert [group["lr"] for group in optimizer.param_groups] == [0.05, 0.05, 0.0, 0.0, 0.05]
    assert optimizer.param_groups[-1]["betas"] == (0.5, 0.9)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    still = {name for name, p in model.named_parameters() if torch.equal(p, before[name])}
    assert still == {"unet.conv_in.weight", "unet.conv_in.bias"}


def test_a_resumed_optimizer_keeps_the_rules_rates(composed):
    rules = [{"pattern": "conv", "lr_scale": 0.25}]
    first, second = (
        optimizers.build(composed("optim=lion", "optim.lr=0.1").optim, network(), 0, rules)
        for _ in range(2)
    )
    optimizers.set_lr(first, 0.5)
    optimizers.restore(second, first.state_dict())
    optimizers.set_lr(second, 1.0)
    assert [group["lr"] for group in second.param_groups] == [0.1, 0.1, 0.025, 0.025]
    assert isinstance(second, optim.Lion)
