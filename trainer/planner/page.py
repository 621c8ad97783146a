"""A plan as text and bars."""

from collections.abc import Iterable

from trainer.planner.plan import Plan
from trainer.planner.room import Room
from trainer.reporting.report import format_bytes
from trainer.sampling import drawer

_WIDTH = 48  # of a bar, in characters
_KINDS = {  # the parts of a bar, by their letters
    "W": "weights",
    "O": "optimizer state",
    "S": "scratch of its steps",
    "E": "average of the weights",
    "G": "gradients",
    "A": "activations",
    "L": "libraries' workspaces",
    "P": "this process",
}


def page(plan: Plan, room: Room) -> str:
    """The whole plan."""
    free, most = room.free_bytes, max(plan.needed_bytes, plan.reserved(plan.drawing_bytes))
    scale = max(most, free) if most > free / 3 else most
    phases = {
        "encoding captions": plan.captions_bytes,
        "encoding pictures": plan.pictures_bytes,
        "training": plan.training_bytes,
        "drawing pictures": plan.drawing_bytes,
    }
    lines = [_title(plan), ""]
    for name, peak in phases.items():
        parts = _parts(plan) if name == "training" else {"#": peak}
        if peak:
            lines.append(f"  {name:<18}{format_bytes(peak):>9}  {_bar(parts, scale, free)}")
    lines += ["", "in training:"]
    for letter, size in _parts(plan).items():
        if size:
            note = _note(plan, letter)
            lines.append(f"  {letter} {_KINDS[letter]:<23}{format_bytes(size):>9}  {note}".rstrip())
    return "\n".join([*lines, "", verdict(plan, room), *_remarks(plan, room)])


def verdict(plan: Plan, room: Room) -> str:
    """Whether it fits, in a line."""
    fits = "fits" if plan.fits(room) else "does not fit"
    needed, free = format_bytes(plan.needed_bytes), format_bytes(room.free_bytes)
    notes = [f"the peak and {plan.fragmented:.0%} for fragmentation"] if plan.fragmented else []
    drawing = plan.reserved(plan.drawing_bytes)
    if plan.needed_bytes < drawing <= room.free_bytes:
        notes.append(f"{format_bytes(drawing)} while it draws")
    needed += f" ({'; '.join(notes)})" if notes else ""
    return f"{fits}: a run needs {needed}, and {room.where} has {free} free"


def _title(plan: Plan) -> str:
    config, rehearsal = plan.config, plan.rehearsal
    count, trained = rehearsal.num_parameters, rehearsal.num_trained
    of = "all" if trained == count else f"{trained:,} of"
    return (
        f"method={config.method.name}, {of} {count:,} parameters, "
        f"optim={config.optim.name}, {config.data.largest_resolution} px, batch "
        f"{config.data.batch_size}; peaks:"
    )


def _parts(plan: Plan) -> dict[str, int]:
    training = plan.rehearsal.training
    return {
        "W": training.weights,
        "O": training.optimizer_state or 0,
        "S": training.optimizer_scratch,
        "E": training.averages,
        "G": training.gradients,
        "A": training.activations,
        "L": plan.libraries_bytes,
        "P": plan.process_bytes,
    }


def _bar(parts: dict[str, int], scale: int, free: int) -> str:
    """Letters in proportion, rounded so that the total is right; an exclamation mark where free
    memory ends, if it is within the bar."""
    drawn, total = "", 0
    for letter, size in parts.items():
        total += size
        drawn += letter * (round(total / scale * _WIDTH) - len(drawn))
    drawn = drawn.ljust(_WIDTH)
    if free < scale:
        end = round(free / scale * _WIDTH)
        drawn = f"{drawn[:end]}!{drawn[end + 1 :]}"
    return f"|{drawn}|"


def _note(plan: Plan, letter: str) -> str:
    runtime = plan.config.runtime
    if letter == "G" and runtime.frees_gradients:
        return "freed as they are used (runtime.fused_backward)"
    if letter == "A" and runtime.gradient_checkpointing:
        return "recomputed in the backward pass (runtime.gradient_checkpointing)"
    return ""


def _remarks(plan: Plan, room: Room) -> Iterable[str]:
    if plan.rehearsal.training.optimizer_state is None:
        yield (
            f"without the state of optim={plan.config.optim.name}, which can only be measured in a "
            "real step"
        )
    if plan.reserved(plan.least_drawing_bytes) > room.free_bytes:
        yield (
            "pictures will not be drawn: there is too little memory (log.sample_count=0 turns "
            "drawing off)"
        )
    elif plan.reserved(plan.drawing_bytes) > room.free_bytes:
        tiled = plan.reserved(plan.drawing_aside_bytes) > room.free_bytes
        how = f", and it decodes in tiles of {drawer.TILE} pixels" if tiled else ""
        yield f"while the VAE decodes drawn pictures, the UNet is moved to host memory{how}"
    runtime = plan.config.runtime
    if runtime.compile != "none":
        keeps = plan.config.model.quantization != "none" and not runtime.gradient_checkpointing
        yield (
            "compiled blocks (runtime.compile) keep decoded weights, which are not in this plan"
            if keeps
            else "compiled blocks (runtime.compile) may need less"
        )
