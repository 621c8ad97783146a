"""The family within torch's machinery: savers, scalers, schedulers, several ranks."""

import contextlib
import copy
import gc
import pickle
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from helpers import assert_same, build, make_params, run, set_grads
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn import Parameter

import optim
from optim import native, plan

NAMES = sorted(optim.FAMILY)


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("name", NAMES)
def test_an_optimizer_and_its_state_are_freed_when_it_is_deleted(name, backend):
    """As torch's are; otherwise gigabytes would wait for the garbage collector."""
    params = make_params(torch.bfloat16)
    gc.disable()
    try:
        optimizer = build(name, params, backend=backend)
        run(optimizer, params, range(2))
        optimizer.load_state_dict(optimizer.state_dict())
        run(optimizer, params, range(1))
        alive = weakref.ref(optimizer)
        del optimizer
        assert alive() is None
    finally:
        gc.enable()


def goes_on_alike(name, reload, tmp_path, **options):
    """Compare 3 + 3 steps, with the state passed through `reload` in between, with 6 in a row."""
    straight, stopped = make_params(torch.bfloat16), make_params(torch.bfloat16)
    run(build(name, straight, **options), straight, range(6))
    first = build(name, stopped, **options)
    run(first, stopped, range(3))
    second = build(name, stopped, **options)
    second.load_state_dict(reload(first, second, tmp_path))
    run(second, stopped, range(3, 6))
    assert_same(straight, stopped)


def through_safetensors(first, second, folder):
    saved = first.state_dict()
    flat = {f"{i}/{key}": x for i, s in saved["state"].items() for key, x in s.items()}
    save_file(flat, folder / "state.safetensors")
    state: dict = {i: {} for i in saved["state"]}
    for key, x in load_file(folder / "state.safetensors").items():
        index, _, name = key.partition("/")
        state[int(index)][name] = x
    return saved | {"state": state}


def through_distributed_checkpoint(first, second, folder):
    dcp.save({"optimizer": first.state_dict()}, checkpoint_id=folder / "dcp")
    second.init_state()
    target = {"optimizer": second.state_dict()}
    dcp.load(target, checkpoint_id=folder / "dcp")
    return target["optimizer"]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("way", [through_safetensors, through_distributed_checkpoint])
@pytest.mark.parametrize("name", NAMES)
def test_state_survives_other_savers_bitwise(name, way, tmp_path):
    goes_on_alike(name, way, tmp_path)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("name", "options"),
    [(name, {"flatten_optimizer_state_dict": flat}) for name in NAMES for flat in (False, True)]
    + [("prodigy_factored", {"full_state_dict": True, "cpu_offload": True})],
    ids=str,
)
def test_torchs_own_pair_of_state_dicts_goes_on_bitwise(name, options, tmp_path):
    """`get_state_dict` keeps only `state` and `param_groups`; a flattened one keeps only the group
    entries that the optimizer's own groups have."""
    wanted = StateDictOptions(**options)

    def fresh():
        model = nn.Sequential(nn.Linear(12, 20), nn.LayerNorm(20), nn.Linear(20, 12))
        for p, values in zip(model.parameters(), make_params(shapes=shapes_of(model)), strict=True):
            p.data.copy_(values)
        return model.to(torch.bfloat16)

    straight, stopped, resumed = fresh(), fresh(), fresh()
    run(build(name, straight.parameters()), list(straight.parameters()), range(6))
    first, second = build(name, stopped.parameters()), build(name, resumed.parameters())
    run(first, list(stopped.parameters()), range(3))
    dcp.save(
        dict(zip("mo", get_state_dict(stopped, first, options=wanted), strict=True)),
        checkpoint_id=tmp_path / "dcp",
    )
    target = dict(zip("mo", get_state_dict(resumed, second, options=wanted), strict=True))
    dcp.load(target, checkpoint_id=tmp_path / "dcp")
    set_state_dict(
        resumed,
        second,
        model_state_dict=target["m"],
        optim_state_dict=target["o"],
        options=wanted,
    )
    run(second, list(resumed.parameters()), range(3, 6))
    assert_same(straight.parameters(), resumed.parameters())


def shapes_of(model):
    return [tuple(p.shape) for p in model.parameters()]


@pytest.mark.parametrize("name", NAMES)
def test_kahan_compensation_is_part_of_the_state(name, tmp_path):
    goes_on_alike(
        name, lambda first, *_: copy.deepcopy(first.state_dict()), tmp_path, rounding="kahan"
    )


@contextlib.contextmanager
def other_default(default):
    """torch with another default dtype or device."""
    is_dtype = isinstance(default, torch.dtype)
    (torch.set_default_dtype if is_dtype else torch.set_default_device)(default)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)


@pytest.mark.parametrize(
    ("default", "backend"),
    [(dtype, who) for dtype in (torch.bfloat16, torch.float64) for who in ("auto", "torch")]
    + [("meta", "auto"), ("meta", "torch")],
    ids=str,
)
@pytest.mark.parametrize("name", NAMES)
def test_torchs_defaults_have_no_say_in_what_is_allocated(name, default, backend):
    options = {} if "orthograd" in optim.FAMILY[name].refuses else {"orthograd": True}

    def train(within):
        params = make_params(torch.bfloat16)
        set_grads(params, 0)
        with within:
            optimizer = build(name, params, backend=backend, **options)
            optimizer.step()
            optimizer.step_param(*params)
            optimizer.step()
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        return params, [x for p in params for x in optimizer.state[p].values()]

    (params, state), (others, other_state) = (
        train(other_default(default)),
        train(contextlib.nullcontext()),
    )
    assert_same(params, others)
    assert_same(state, other_state)
    assert [x.dtype for x in state] == [x.dtype for x in other_state]


def test_a_work_list_is_on_the_host_whatever_the_default_device_is():
    descriptors = (plan.Descriptor * 2)()
    for each in descriptors:
        each.rows, each.cols = 100, 600
    with other_default("meta"):
        for alone in (False, True):
            bucket = plan.Bucket([0, 1], descriptors, alone)
            assert bucket.num_tiles == 8
            lists = (bucket.members, bucket.first_tile, bucket.vectors, bucket.tiles)
            assert not any(x.is_meta for x in lists)


def test_gradients_of_another_dtype_and_mixed_dtypes_in_a_group():
    mixed = [Parameter(torch.ones(8, 8, dtype=d)) for d in (torch.bfloat16, torch.float32)]
    mixed.append(Parameter(torch.ones(8, 8, dtype=torch.float16)))
    optimizer = optim.build("adafactor8bit", mixed, lr=0.1)
    for p in mixed:
        p.grad = torch.ones(8, 8, dtype=p.dtype)
    optimizer.step()
    for p in mixed:
        assert p.float().mean().item() == pytest.approx(0.9, abs=0.01)


def test_a_group_added_later_and_a_parameter_without_a_gradient():
    params = make_params()
    optimizer = optim.build("adamw", params[:2])
    run(optimizer, params[:2], range(2))
    optimizer.add_param_group({"params": params[2:], "lr": 0.5})
    set_grads(params, 2)
    params[3].grad = None
    still = params[3].detach().clone()
    optimizer.step()
    assert torch.equal(params[3], still)
    assert params[3] not in optimizer.state
    assert int(optimizer.state[params[0]]["step"]) == 3
    assert int(optimizer.state[params[2]]["step"]) == 1


def test_closures_and_step_hooks_are_called():
    params = make_params()
    optimizer = optim.build("lion", params)
    called = []
    optimizer.register_step_pre_hook(lambda *_: called.append("pre"))
    optimizer.register_step_post_hook(lambda *_: called.append("post"))

    def closure():
        assert torch.is_grad_enabled()
        called.append("closure")
        set_grads(params, 0)
        return torch.tensor(3.0)

    assert optimizer.step(closure) == 3.0
    assert called == ["pre", "closure", "post"]


@pytest.mark.parametrize(
    "scheduler",
    [
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 4),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, 10, cycle_momentum=False),
        lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda t: 0.5**t),
        lambda o: torch.optim.lr_scheduler.SequentialLR(
            o,
            [
                torch.optim.lr_scheduler.LinearLR(o, 0.1, total_iters=2),
                torch.optim.lr_scheduler.StepLR(o, 2),
            ],
            [2],
        ),
    ],
    ids=["cosine", "one-cycle", "lambda", "sequential"],
)
def test_torch_schedulers_drive_the_rate_and_survive_a_reload(scheduler):
    params = make_params()
    optimizer = optim.build("sgd", params, lr=0.1, momentum=0.0)
    driver = scheduler(optimizer)
    for step in range(4):
        before = params[0].detach().clone()
        set_grads(params, step)
        rate = optimizer.param_groups[0]["lr"]
        optimizer.step()
        driver.step()
        assert torch.allclose(before - params[0], rate * params[0].grad, atol=1e-6)
    twin = optim.build("sgd", params)
    twin.load_state_dict(optimizer.state_dict())
    assert twin.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("name", NAMES)
def test_a_rate_that_rounding_has_left_below_zero_is_zero(name, backend):
    """torch's LinearLR can end there, and weights of zero would follow any rate."""
    ends = []
    for rate in (0.0, -2e-22, torch.tensor(-2e-22)):
        params = [*make_params(), Parameter(torch.zeros(3))]
        optimizer = build(name, params, backend=backend, weight_decay=0.5)
        run(optimizer, params, range(2))
        optimizer.param_groups[0]["lr"] = rate
        run(optimizer, params, range(2, 4))
        ends.append([*params, *(x for p in params for x in optimizer.state[p].values())])
    assert_same(ends[0], ends[1])
    assert_same(ends[0], ends[2])


def test_linear_schedules_to_zero_may_end_below_it():
    params = make_params(shapes=[(2, 2)])
    optimizer = optim.SGD(params, lr=1e-4)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / 3, 0.0, 4)
    rates = []
    for step in range(6):
        run(optimizer, params, [step])
        schedule.step()
        rates.append(optimizer.param_groups[0]["lr"])
    assert min(rates) < 0, "this is about a rate that rounds below zero"


def test_a_grad_scaler_skips_an_overflow_and_scales_the_rest():
    param = Parameter(torch.ones(4))
    optimizer = optim.build("sgd", [param], lr=0.5, momentum=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4)
    for factor, expected in ((1.0, 0.5), (torch.inf, 0.5)):
        optimizer.zero_grad()
        scaler.scale((param * factor).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        assert torch.allclose(param, torch.full((4,), expected))
    assert scaler.get_scale() == 2.0**3


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("fused", [False, True])
def test_a_compiled_training_step_trains_alike_and_does_not_trace_the_optimizer(backend, fused):
    graphs = []

    def recorded(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    def train(compiled):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.Linear(16, 4))
        optimizer = optim.build("adafactor8bit", model.to(torch.bfloat16).parameters(), lr=0.01)
        if fused:
            optim.fuse_backward(optimizer, 1)

        def step(x):
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

        if compiled:
            step = torch.compile(step, backend=recorded)
        generator = torch.Generator().manual_seed(1)
        for _ in range(3):
            step(torch.randn(4, 8, generator=generator).to(torch.bfloat16))
        return list(model.parameters())

    assert_same(train(False), train(True))
    assert len(graphs) == 1  # the model's; tracing each parameter's step would add several


@pytest.mark.parametrize(("name", "remedy"), [("adafactor8bit", "DDP, ZeRO-1"), ("prodigy", "DDP")])
def test_a_dtensor_is_refused_with_the_reason(name, remedy, tmp_path):
    """Under ZeRO-1 each process would find its own d."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/r", rank=0, world_size=1)
    try:
        mesh = dist.init_device_mesh("cpu", (1,))
        sharded = distribute_tensor(torch.ones(4, 4), mesh, [Shard(0)])
        says = rf"DTensor \(shape \(4, 4\)\).*of one shard.*\({remedy}\)"
        with pytest.raises(TypeError, match=says):
            optim.build(name, [Parameter(sharded)])
    finally:
        dist.destroy_process_group()


def _train_rank(rank, size, runs, address, results):
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=size)
    torch.set_num_threads(rank + 1)  # ranks may differ
    torch.manual_seed(rank)  # the global generator must not matter
    for name, backend in runs:
        params = make_params(torch.bfloat16)
        optimizer = optim.build(name, params, backend=backend)
        for step in range(3):
            set_grads(params, 10 * step + rank)
            for p in params:
                total = p.grad.float()
                dist.all_reduce(total)
                p.grad = total.to(p.dtype)
            optimizer.step()
        results[rank, name, backend] = [p.detach().float() for p in params]
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_with_the_same_gradients_stay_bitwise_equal(tmp_path):
    backends = ["torch"] if native.unavailable() else ["torch", "native"]
    names = ["adafactor8bit", "adopt_factored", "adamw8bit"]
    runs = [(name, backend) for name in names for backend in backends]
    with mp.Manager() as manager:
        results = manager.dict()
        address = f"file://{tmp_path}/rendezvous"
        mp.spawn(_train_rank, args=(2, runs, address, results), nprocs=2)
        for name, backend in runs:
            assert_same(results[0, name, backend], results[1, name, backend])


def test_the_number_of_threads_changes_no_bit():
    before = torch.get_num_threads()
    runs = []
    for count in (1, 2):
        torch.set_num_threads(count)
        params = make_params(torch.bfloat16, [(700, 300), (64, 32, 3, 3)])
        run(optim.build("adafactor8bit", params), params, range(2))
        runs.append(params)
    torch.set_num_threads(before)
    assert_same(*runs)


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name", NAMES)
def test_steps_are_made_with_deterministic_algorithms(name, deterministic):
    params = make_params(torch.bfloat16)
    optimizer = build(name, params)
    run(optimizer, params, range(2))
    assert {state["step"].item() for state in optimizer.state.values()} == {2}


@pytest.mark.parametrize("name", NAMES)
def test_a_copy_takes_over_a_state(name):
    params = make_params(torch.bfloat16)
    optimizer = build(name, params)
    run(optimizer, params, range(2))
    for again in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        again.load_state_dict(optimizer.state_dict())
        again.add_param_group({"params": [Parameter(torch.ones(3))]})
        assert again.param_groups[-1].keys() == optimizer.param_groups[0].keys()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_graph_that_needs_the_old_weights_is_refused_after_a_step(dtype):
    w = Parameter(torch.ones(4, dtype=dtype))
    optimizer = optim.AdamW([w])
    loss = w.square().sum()
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("name", ["apollo", "adamw_factored", "adafactor8bit"])
def test_autocast_around_a_step_changes_nothing(name, backend):
    ordinary, mixed = make_params(torch.float32), make_params(torch.float32)
    run(build(name, ordinary, backend=backend), ordinary, range(3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        run(build(name, mixed, backend=backend), mixed, range(3))
    assert_same(ordinary, mixed)


@pytest.mark.parametrize("name", NAMES)
def test_a_group_without_parameters_is_stepped_and_keeps_no_state(name):
    optimizer = optim.build(name, [{"params": []}])
    optimizer.step()
    assert not optimizer.state


def test_a_parameter_is_given_once_to_what_steps_some():
    p = Parameter(torch.ones(4))
    p.grad = torch.ones(4)
    with pytest.raises(ValueError, match="passed twice"):
        optim.SGD([p]).step_param(p, p)


def test_threads_that_step_parameters_of_one_optimizer_take_turns():
    alone, together = ([Parameter(torch.ones(64, 64)) for _ in range(8)] for _ in range(2))
    first, second = optim.AdamWFactored(alone), optim.AdamWFactored(together)
    for _ in range(20):
        for p in (*alone, *together):
            p.grad = torch.arange(4096.0).view(64, 64) + 1
        for p in alone:
            first.step_param(p)
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(second.step_param, together))
    assert_same(alone, together)


@pytest.mark.skipif(not dist.is_gloo_available(), reason="torch without gloo")
@pytest.mark.parametrize("use_orig_params", [False, True])
def test_the_flat_parameters_of_fsdp_are_refused(tmp_path, use_orig_params):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/a", rank=0, world_size=1)
    try:
        model = FullyShardedDataParallel(
            nn.Linear(4, 4), device_id=torch.device("cpu"), use_orig_params=use_orig_params
        )
        with pytest.raises(TypeError, match=r"FSDP.*DDP"):
            optim.AdamWFactored(model.parameters())
    finally:
        dist.destroy_process_group()
