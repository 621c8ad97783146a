"""The optimizer's parameter groups: weight decay, and options per parameter (`method.rules`).

A rule is a mapping with a `pattern`, a regular expression that is searched for in the parameters'
names (unet.down_blocks.1.attentions.0.proj_in.weight), and their options: `lr`, or `lr_scale` times
optim.lr; `trainable: false`; and any option of the optimizer by its name.  The first rule whose
pattern is found applies.  Weight decay is 0 for biases, norms and embeddings, unless a rule sets
it.
"""

import difflib
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from trainer.errors import UserError
from trainer.wording import plural

log = logging.getLogger(__name__)

Rule = Mapping[str, Any]
Member = tuple[nn.Parameter, bool]  # and whether it is exempt from weight decay
Row = tuple[str, str, str, str]  # pattern, tensors, parameters, options

_OWN = ("pattern", "lr_scale", "trainable")  # keys of a rule that are no optimizer options


def check_rules(rules: Sequence[Rule]) -> None:
    """Refuse rules that are wrong for any model and optimizer."""
    for number, rule in enumerate(rules):
        title = f"method.rules[{number}]"
        pattern = rule.get("pattern")
        if not isinstance(pattern, str):
            raise UserError(f"{title} has no pattern; write {{pattern: attn2, lr_scale: 0.1}}")
        try:
            re.compile(pattern)
        except re.error as error:
            raise UserError(f"{title}: {pattern} is not a regular expression: {error}") from error
        rest = [key for key in rule if key != "pattern"]
        if not rest:
            raise UserError(f"{title} ({pattern}) sets nothing; give it lr_scale, or trainable")
        if "lr" in rule and "lr_scale" in rule:
            raise UserError(f"{title} ({pattern}) has lr and lr_scale; keep one of them")
        scale = rule.get("lr_scale", 1.0)
        if isinstance(scale, bool) or not isinstance(scale, int | float) or scale < 0:
            raise UserError(f"{title} ({pattern}): lr_scale={scale} must be a number >= 0")
        if not isinstance(rule.get("trainable", True), bool):
            raise UserError(f"{title} ({pattern}): trainable must be true or false")
        if rule.get("trainable") is False and len(rest) > 1:
            raise UserError(
                f"{title} ({pattern}): parameters that are not trained take no other options; keep "
                "only trainable"
            )


def with_tuples(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options with tuples for lists: YAML has only lists, and torch's betas are a tuple."""
    return {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}


def options_of(rule: Rule, lr: float) -> dict[str, Any]:
    """A rule's options, as keys of a parameter group; `lr` is the configured one, optim.lr."""
    options = with_tuples({key: value for key, value in rule.items() if key not in _OWN})
    return options | ({"lr": lr * rule["lr_scale"]} if "lr_scale" in rule else {})


def besides(rule: Rule, known: Iterable[str]) -> str:
    """A hint for an error: keys that a rule may have besides the optimizer's options (`known`); ""
    if all of the rule's keys are valid."""
    others = [key for key in rule if key not in (*_OWN, *known)]
    own = [name for name in _OWN if name not in rule]
    near = [name for key in others for name in difflib.get_close_matches(key, own, 1, 0.7)]
    if near:
        return f" (or the rule's own {near[0]}?)"
    return f" (a rule also has {' and '.join(own)})" if others and own else ""


def parameter_groups(
    model: nn.Module, lr: float, rules: Sequence[Rule] = ()
) -> list[dict[str, Any]]:
    """The groups: the parameters under no rule, then each rule's; logs a table of them.

    Parameters that a rule does not train stop requiring gradients.  Raises UserError as `assigned`
    does.
    """
    others, *members = assigned(model, rules)
    groups = _split(others, {})
    table = [_row("", group) for group in groups]
    for rule, chosen in zip(rules, members, strict=True):
        if rule.get("trainable") is False:
            for parameter, _ in chosen:
                parameter.requires_grad_(False)
            table.append(_row(rule["pattern"], {"params": [p for p, _ in chosen]}, "not trained"))
            continue
        own = _split(chosen, options_of(rule, lr))
        table += [_row(rule["pattern"], group) for group in own]
        groups += own
    _log_table(table, bool(rules))
    return groups


def assigned(model: nn.Module, rules: Sequence[Rule]) -> list[list[Member]]:
    """The trained parameters under no rule, then each rule's.

    Raises UserError for a rule that matches nothing that earlier rules have not, or if nothing is
    left to train.
    """
    members: list[list[Member]] = [[] for _ in range(1 + len(rules))]
    patterns = [re.compile(rule["pattern"]) for rule in rules]
    for name, parameter, is_spared in _trained(model):
        found = next((i for i, pattern in enumerate(patterns) if pattern.search(name)), -1)
        members[found + 1].append((parameter, is_spared))
    for number, rule in enumerate(rules):
        if not members[number + 1]:
            rest = " that earlier rules leave" if number else ""
            raise UserError(
                f"method.rules[{number}]: {rule['pattern']} matches no trained parameter{rest}; "
                "correct or remove it"
            )
    if not members[0] and all(rule.get("trainable") is False for rule in rules):
        raise UserError("method.rules leave nothing to train; narrow one of them")
    return members


def _trained(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, bool]]:
    """Each trained parameter once, with its name and whether it is exempt from weight decay."""
    seen = set()
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(prefix, recurse=False):
            if parameter.requires_grad and parameter not in seen:
                seen.add(parameter)
                is_scale = "lora_magnitude_vector" in prefix  # DoRA's; a convolution's is 4-d
                no_decay = parameter.ndim < 2 or is_scale or isinstance(module, nn.Embedding)
                yield name, parameter, no_decay


def _split(members: list[Member], options: dict[str, Any]) -> list[dict[str, Any]]:
    """One group with and one without weight decay; a single one if the options set it."""
    if "weight_decay" in options:
        parts = [([parameter for parameter, _ in members], options)]
    else:
        parts = [
            ([p for p, is_spared in members if not is_spared], options),
            ([p for p, is_spared in members if is_spared], options | {"weight_decay": 0.0}),
        ]
    return [{"params": params, **own} for params, own in parts if params]


def _log_table(rows: Sequence[Row], has_patterns: bool) -> None:
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for pattern, tensors, count, options in rows:
        start = f"  {pattern:<{widths[0]}}  " if has_patterns else "  "
        numbers = f"{tensors.rjust(widths[1])}, {count.rjust(widths[2])}"
        log.info("%s", f"{start}{numbers}  {options}".rstrip())


def _row(pattern: str, group: dict[str, Any], note: str = "") -> Row:
    """A group's line in the table."""
    params = group["params"]
    options = {key: value for key, value in group.items() if key != "params"}
    if not note and options == {"weight_decay": 0.0}:
        note = "without weight decay (biases, norms, embeddings)"
    words = note or ", ".join(f"{key} {value}" for key, value in options.items())
    total = sum(parameter.numel() for parameter in params)
    tensors = plural(len(params), "tensor")
    return pattern or "others", tensors, plural(f"{total:,}", "parameter"), words
