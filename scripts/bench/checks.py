"""What every GPU must compute: the CPU's numbers, the same ones every time, without waiting.

Each check is of one claim, on small tensors of every kind (`bench/cases.py`).
"""

import contextlib
import copy
import io
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import Parameter

import optim
from bench.cases import CASES, Case, copied, gradients, kernels_of, make, prepare, set_grads
from bench.outcomes import Finding, Skip
from bench.subject import Subject
from bench.tolerances import blur_of, param_misses
from optim import newton_schulz

BF16 = torch.bfloat16
STEPS = 3
MATRICES = [(70, 1100), (1100, 70), (256, 256), (1, 5)]
SHOWN = 3  # of what is wrong, in a line
# What APOLLO's and Muon's steps are made of are sums of many products by another library.
PRODUCTS_SLACK = 30.0
BF16_SHARE = 0.03  # of an orthogonal matrix's norm, that iterations in bf16 may miss it by

# Those whose runs are repeated in other ways: one of each rule, and what sums or encodes most.
NAMES = (
    *("adamw_factored", "adopt_factored", "adamw8bit", "adafactor8bit", "lion8bit", "sgd"),
    *("apollo", "muon"),
)
REPEATED = [case for case in CASES if case.name in NAMES and not case.options] + [
    case for case in CASES if "orthograd" in case.options
]
BAD = (float("nan"), float("inf"), -float("inf"), 1e30)

Run = tuple[list[Parameter], optim.FusedOptimizer]


def compiles(subject: Subject, cases: list[Case], deadline: float) -> Finding:
    """Every kernel compiles, and the second time comes from the disk."""
    names = kernels_of(cases)
    seconds, compiled = [], []
    for _ in range(2):
        gpu = subject.fresh()
        before = gpu.num_compiled
        with gpu.here():
            began = time.perf_counter()
            loaded = gpu.load(names)
            seconds.append(time.perf_counter() - began)
        compiled.append(gpu.num_compiled - before)
        missing = [name for name in names if name not in loaded]
    cold, warm = seconds
    return Finding(
        holds=not missing and not compiled[1],
        line=f"{len(names)} kernels of {len(cases)} cases: {cold:.1f} s, then {warm:.2f} s, "
        f"{len(names) - compiled[1]} of them from the disk",
        facts={"kernels": len(names), "cold_seconds": cold, "warm_seconds": warm},
    )


# Parity -------------------------------------------------------------------------------------------


def agrees_with_the_cpu(subject: Subject, cases: list[Case], deadline: float) -> Finding:
    """Every rule, codec, feature and dtype: bitwise where promised, else within tolerances.

    Muon's matrices are orthogonalized in fp32 here: in bf16, stochastic rounding would have other
    results in one of a hundred weights.  What bf16 makes of a matrix is compared on its own.
    """
    wrong, unlike, tensors, done = wrong_directions(subject), {}, 0, 0
    for case in cases:
        if time.monotonic() > deadline:
            break
        misses, differing, compared = _parity(subject, case)
        wrong += [f"{case}: {miss}" for miss in misses]
        if differing:
            unlike[str(case)] = differing
        tensors += compared
        done += 1
    against = "the CPU engine" if subject.native else "plain PyTorch"
    left = f", {len(cases) - done} cases not reached" if done < len(cases) else ""
    return Finding(
        holds=not wrong and bool(done),
        line=f"{done} cases, {tensors} tensors against {against}: {sum(unlike.values())} not "
        f"bitwise, {len(wrong)} wrong{left}{_some(wrong)}",
        facts={"tensors": tensors, "not_bitwise": unlike, "wrong": wrong, "against": against},
    )


def _parity(subject: Subject, case: Case) -> tuple[list[str], int, int]:
    """Steps of both from the same state: -> what is wrong; how many tensors were not the same bits;
    how many were compared."""
    params, reference = make(case, backend="native" if subject.native else "torch")
    twins, twin = make(case, subject.device)
    exact = subject.native and case.is_bitwise()
    wrong, differing, compared = [], 0, 0
    for step in range(STEPS):
        before = [p.detach().clone() for p in params]
        prepare(params, reference, step)
        with subject.engines():
            prepare(twins, twin, step)
        for group in (params, twins):
            set_grads(group, step)
            _grad(group[0])[3, 700] = torch.nan
        reference.step()
        with subject.engines(), orthogonalizing_in(torch.float32):
            twin.step()
        for index, (p, q, old) in enumerate(zip(params, twins, before, strict=True)):
            one, two = _tensors(reference, p), _tensors(twin, q)
            unlike = [key for key in one if key not in two or not _same(one[key], two[key])]
            compared += len(one)
            differing += len(unlike)
            if unlike and exact:
                wrong += [f"step {step + 1}, {tuple(p.shape)} {key}: not bitwise" for key in unlike]
            elif unlike:
                copied = Parameter(two.pop("weights"))
                del one["weights"]
                slack, blur = 1.0, 0.0
                if case.is_projected():
                    slack = PRODUCTS_SLACK
                    blur = blur_of(index, reference.param_groups[0], p, step + 1)
                elif case.is_orthogonalized():
                    slack = PRODUCTS_SLACK
                lines = param_misses(p, copied, old, one, two, slack, blur)
                wrong += [f"step {step + 1}, {line}" for line in lines]
        if differing:  # the next step begins from the same again
            for p, q in zip(params, twins, strict=True):
                q.data.copy_(p)
            twin.load_state_dict(copy.deepcopy(reference.state_dict()))
    return wrong, differing, compared


@contextlib.contextmanager
def orthogonalizing_in(dtype: torch.dtype) -> Iterator[None]:
    """Within it, every device orthogonalizes in this dtype."""
    usual = newton_schulz.precision
    newton_schulz.precision = lambda device: dtype
    try:
        yield
    finally:
        newton_schulz.precision = usual


def wrong_directions(subject: Subject) -> list[str]:
    """Orthogonal matrices that differ from the CPU's by more than rounding to bf16 explains."""
    wrong = []
    for shape in MATRICES:
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        wanted = newton_schulz.orthogonalized(x, 5)
        found = newton_schulz.orthogonalized(x.to(subject.device), 5).cpu()
        share = ((found - wanted).norm() / wanted.norm()).item()
        if not share <= BF16_SHARE:
            wrong.append(f"orthogonal {shape}: {share:.1%} apart")
    return wrong


# The same bits ------------------------------------------------------------------------------------


def repeats(subject: Subject, cases: list[Case], deadline: float) -> Finding:
    """The same run gives the same bits however it is made."""
    ways: dict[str, Callable[[Subject, Case], Run]] = {
        "again": _plainly,
        "on another stream": _on_another_stream,
        "by step_param": _by_step_param,
        "inside backward": _inside_backward,
        "resumed": _resumed,
        "deep-copied": _deep_copied,
    }
    wrong, compared = [], 0
    for case in cases:
        usual = _plainly(subject, case)
        for way, go in ways.items():
            found = _differences(usual, go(subject, case))
            compared += 1
            wrong += [f"{case} {way}: {line}" for line in found]
    return Finding(
        holds=not wrong,
        line=f"{compared} runs ({', '.join(ways)}) of {len(cases)} cases: "
        f"{len(wrong)} tensors differ{_some(wrong)}",
        facts={"runs": compared, "wrong": wrong},
    )


def _plainly(subject: Subject, case: Case) -> Run:
    run = make(case, subject.device)
    _steps(subject, run, range(2 * STEPS))
    return run


def _on_another_stream(subject: Subject, case: Case) -> Run:
    run = make(case, subject.device)
    subject.wait()
    with subject.side_stream():
        _steps(subject, run, range(2 * STEPS))
    subject.wait()
    return run


def _by_step_param(subject: Subject, case: Case) -> Run:
    params, optimizer = make(case, subject.device)
    with subject.engines():
        for step in range(2 * STEPS):
            set_grads(params, step)
            for param in reversed(params):
                optimizer.step_param(param)
    return params, optimizer


def _inside_backward(subject: Subject, case: Case) -> Run:
    params, optimizer = make(case, subject.device)
    with subject.engines():
        fused = optim.fuse_backward(optimizer, bucket_bytes=4096)
        for step in range(2 * STEPS):
            pairs = zip(params, gradients(params, step), strict=True)
            torch.stack([(p * g).sum().float() for p, g in pairs]).sum().backward()
            optimizer.step()
        fused.remove()
    return params, optimizer


def _resumed(subject: Subject, case: Case) -> Run:
    run = make(case, subject.device)
    _steps(subject, run, range(STEPS))
    file = io.BytesIO()
    torch.save({"weights": [p.detach() for p in run[0]], "state": run[1].state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, map_location="cpu", weights_only=True)
    params, optimizer = make(case, subject.device)
    for param, weights in zip(params, saved["weights"], strict=True):
        param.data.copy_(weights)
    optimizer.load_state_dict(saved["state"])
    _steps(subject, (params, optimizer), range(STEPS, 2 * STEPS))
    return params, optimizer


def _deep_copied(subject: Subject, case: Case) -> Run:
    run = make(case, subject.device)
    _steps(subject, run, range(STEPS))
    twin = copied(*run)
    _steps(subject, run, range(STEPS, STEPS + 1))  # the original's steps are its own
    _steps(subject, twin, range(STEPS, 2 * STEPS))
    return twin


def _steps(subject: Subject, run: Run, steps: range) -> None:
    params, optimizer = run
    with subject.engines():
        for step in steps:
            set_grads(params, step)
            optimizer.step()


# Gradients that cannot be used --------------------------------------------------------------------


def skips_nonfinite(subject: Subject, cases: list[Case], deadline: float) -> Finding:
    """Unusable elements are counted, and leave their weights as they were."""
    wrong = []
    for case in cases:
        params, optimizer = make(case, subject.device)
        before = params[0].detach().clone()
        for step in range(STEPS):
            set_grads(params, step)
            # 1e30 is infinite in fp16
            _grad(params[0])[1, : len(BAD)] = torch.tensor(BAD).to(params[0])
            with subject.engines():
                optimizer.step()
        count, expected = optimizer.nonfinite_count(), STEPS * len(BAD)
        if count != expected:
            wrong.append(f"{case}: counted {count}, not {expected}")
        kept = params[0].detach()[1, : len(BAD)]
        if not torch.equal(kept, before[1, : len(BAD)]):
            wrong.append(f"{case}: their weights moved")
        if not all(bool(p.isfinite().all()) for p in params):
            wrong.append(f"{case}: weights are not finite")
        if (params[0].detach() == before).float().mean() > 0.5:
            wrong.append(f"{case}: most weights did not move")
    return Finding(
        holds=not wrong,
        line=f"{len(cases)} cases, {STEPS * len(BAD)} elements each{_some(wrong)}",
        facts={"wrong": wrong},
    )


# No waiting ---------------------------------------------------------------------------------------

FEATURES: list[dict[str, object]] = [{}, {"max_grad_norm": 0.5}]


def never_waits(subject: Subject, cases: list[Case], deadline: float) -> Finding:
    """A step reads nothing back: with a global norm, a learning rate on the device, gradients at
    new addresses."""
    number = torch.ones((), device=subject.device)
    if subject.device.type == "cuda" and not _refused(subject, number):
        raise Skip("torch does not notice here that a number is read")
    steps, wrong = 0, []
    for case in cases:
        for features in FEATURES:
            params, optimizer = make(case, subject.device, **features)
            lr = torch.full((), 0.01, device=subject.device)
            optimizer.param_groups[0]["lr"] = lr
            grads = [gradients(params, step) for step in range(2 * STEPS)]
            with subject.engines():
                _step_with(params, optimizer, grads[0])
                _step_with(params, optimizer, grads[1])
                subject.wait()
                try:
                    with subject.no_waiting():
                        for new in grads[2:]:
                            lr.mul_(0.9)
                            _step_with(params, optimizer, new)
                            steps += 1
                except RuntimeError as error:
                    wrong.append(f"{case} {features or ''}: {error}".splitlines()[0])
    return Finding(
        holds=not wrong,
        line=f"{steps} steps of {len(cases)} cases with lr on the device{_some(wrong)}",
        facts={"steps": steps, "wrong": wrong},
    )


def _refused(subject: Subject, number: Tensor) -> bool:
    """Whether reading a number raises where waiting is forbidden: else nothing can be seen."""
    try:
        with subject.no_waiting():
            number.item()
    except RuntimeError:
        return True
    return False


def _step_with(
    params: list[Parameter], optimizer: torch.optim.Optimizer, grads: list[Tensor]
) -> None:
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    optimizer.step()


# Comparing ----------------------------------------------------------------------------------------


def _tensors(optimizer: torch.optim.Optimizer, param: Parameter) -> dict[str, Tensor]:
    """A parameter's weights and state, on the host."""
    return {
        "weights": param.detach().cpu(),
        **{key: x.cpu() for key, x in optimizer.state[param].items()},
    }


def _differences(one: Run, two: Run) -> list[str]:
    """The tensors of two runs that are not the same bits."""
    found = []
    for p, q in zip(one[0], two[0], strict=True):
        a, b = _tensors(one[1], p), _tensors(two[1], q)
        keys = sorted(a.keys() | b.keys())
        found += [
            f"{tuple(p.shape)} {key}"
            for key in keys
            if key not in a or key not in b or not _same(a[key], b[key])
        ]
    return found


def _same(a: Tensor, b: Tensor) -> bool:
    """The same bits, a NaN equal to itself and 0 not to -0."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    return torch.equal(a.contiguous().flatten().view(torch.uint8),
                       b.contiguous().flatten().view(torch.uint8))  # fmt: skip


def _grad(param: Parameter) -> Tensor:
    assert param.grad is not None
    return param.grad


def _some(wrong: list[str]) -> str:
    """The first of these, for a line."""
    more = f" and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
    return f"; {'; '.join(wrong[:SHOWN])}{more}" if wrong else ""


def small_steps(device: str = "cuda") -> None:
    """What compute-sanitizer watches: steps of small tensors that take every kind of kernel."""
    subject = Subject(torch.device(device, torch.cuda.current_device()))
    for case in (REPEATED[0], REPEATED[-1], *(c for c in REPEATED if c.name == "adafactor8bit")):
        _steps(subject, make(case, subject.device), range(2))
    subject.wait()
