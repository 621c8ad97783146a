"""The configuration: every file composes, defaults have one source, errors name the mistake."""

import contextlib
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import compose_raw, new_process
from omegaconf import OmegaConf

import optim
from trainer import config
from trainer.checks import validate
from trainer.cli import choices, compose, elsewhere
from trainer.config import group_names
from trainer.errors import UserError
from trainer.training import optimizers

CONF = config.conf_dir()
CHOICES = [f"{group}={name}" for group in config.group_names() for name in config.choices_of(group)]
NEEDED = {  # values that a choice leaves to the user
    "model=sdxl": [f"model.path={config.ASSETS}/tiny_sdxl"],
    "model=sd15": ["model.path=owner/name"],
    "data=folder": [f"data.path={config.ASSETS}/emoji24"],
    "optim=external": ["optim.class_path=torch.optim.RAdam"],
} | {
    f"experiment={name}": ["model.path=owner/name", f"data.path={config.ASSETS}/emoji24"]
    for name in ("large", "sdxl", "sdxl_lora", "sd15", "sd15_lora")
}


@pytest.mark.parametrize("choice", CHOICES)
def test_every_conf_file_composes_and_is_valid(choice, composed):
    made = composed(choice, *NEEDED.get(choice, []))
    assert isinstance(made, config.Config)
    if isinstance(made.optim, config.PeerConfig):
        pytest.importorskip(made.optim.class_path.split(".")[0])
    optimizers.try_out(made.optim)


@pytest.mark.parametrize("choice", [c for c in CHOICES if not c.startswith("sweep")])
def test_every_conf_file_says_what_it_is_for(choice):
    lines = (CONF / f"{choice.replace('=', '/')}.yaml").read_text().splitlines()
    assert any(line.startswith("# ") and len(line) > 20 for line in lines[:2])


@pytest.mark.parametrize("name", sorted(optim.FAMILY))
def test_the_class_signature_is_the_one_source_of_a_default(name, composed):
    """`optim=NAME`, `optim.build(NAME)` and the class agree, and the YAML repeats no value."""
    written = OmegaConf.load(CONF / "optim" / f"{name}.yaml")
    assert set(written) <= {"defaults", "method", "runtime"}
    values = dataclasses.asdict(composed(f"optim={name}").optim)
    assert values.pop("name") == name
    built = optim.build(name, [torch.nn.Parameter(torch.zeros(2))]).defaults
    built.pop("seed")  # set by the run
    assert values.pop("backend") == "auto"  # belongs to the optimizer, not to a group
    assert {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()} == built


def test_every_optimizer_of_the_family_has_a_conf_file():
    names = {path.stem for path in (CONF / "optim").glob("*.yaml")}
    assert names == {*optim.FAMILY, "external"}


def test_a_sweep_choice_lists_the_family():
    text = (CONF / "sweep" / "optimizers.yaml").read_text()
    assert set(text.split("optim: ")[1].strip().split(",")) == set(optim.FAMILY)


MISTAKES = [
    # arguments, parts of the one-line message
    (["optim.lrr=1"], ["optim.lrr", "did you mean 'lr'"]),
    (["optim=lion", "optim.beta2=0.9"], ["optim.beta2", "'betas'"]),
    (["optim=adamww"], ["optim=adamww", "did you mean 'adamw'"]),
    (["optmi=adamw"], ["optmi", "did you mean 'optim'"]),
    (["shedule.steps=3"], ["shedule.steps", "did you mean 'schedule.steps'"]),
    (["-m", "optim=adamw,lionn"], ["optim=lionn", "did you mean 'lion'"]),
    (["optim.lr=abc"], ["optim.lr", "could not be converted to Float"]),
    (["optim.lr=-1"], ["optim=adafactor8bit", "lr=-1.0", "finite number >= 0"]),
    (["optim=adamw", "optim.betas=[0.9,2]"], ["betas", "2 numbers in [0, 1)"]),
    (["method.rank=4"], ["method.rank", "method=lora have it"]),
    (["method=lora", "method.rank=0"], ["method.rank=0", "out of range"]),
    (["method=lora", "method.targets=[to_z]"], ["method.targets", "to_z"]),
    (["data=folder"], ["data.path has no value", "data.path=..."]),
    (["data.path=/nowhere"], ["data.path=/nowhere", "not a folder"]),
    (["model.path=/nowhere"], ["model.path=/nowhere", "does not exist"]),
    (["model.path=/tmp"], ["model.path=/tmp", "model_index.json"]),
    (["model.dtype=fp8"], ["model.dtype=fp8", "bfloat16"]),
    (["runtime.device=gpu0"], ["runtime.device=gpu0", "cuda:N"]),
    (["data.caption_dropout=2"], ["data.caption_dropout=2", "[0, 1]"]),
    (["+optim.foo=1"], ["+optim.foo", "there is no option of optim 'foo'"]),
    (["++data.batchsize=9"], ["+data.batchsize", "did you mean 'batch_size'"]),
    (["+foo=1"], ["+foo", "there is no option 'foo'"]),
    (["method.ema.decay=0.9"], ["choose its group first (ema=bf16 or ema=fp32)"]),
    (["name="], ["name is empty"]),
    (["data.path=null", "data.sources=[{path: a, repeat: 2}]"], ["data.sources", "'repeats'"]),
    (["optim=[adamw,lion]"], ["optim takes one choice", "-m"]),
    (["optim=adamw,lion"], ["optim=adamw,lion", "add -m"]),
    (["model.clip_skip=11"], ["model.clip_skip=11", "skip at most"]),
    (["model.vae=typo"], ["model.vae=typo does not exist"]),
    (["method=lora", "method.targets=['*q']"], ["method.targets: *q is not a regular expression"]),
    (["method=lora", "method.start_from=no.safetensors"], ["method.start_from=no.safetensors"]),
    (
        ["method.train=[unet,text_encoder]", "model.text_dtype=float16"],
        ["text encoders cannot be trained in float16"],
    ),
    (["+optim.lr=3"], ["optim.lr already exists; set it without +"]),
    (["method.metadata.titel=a"], ["no option of method.metadata 'titel'", "did you mean 'title'"]),
    (
        ["method.metadata.publisher=a"],
        ["choose from author, description, license, tags, thumbnail, title, trigger_phrase, usa"],
    ),
    (["method.metadata={publisher: a}"], ["'publisher'; choose from author, description, lic"]),
    (["+method.metadata.publisher=a"], ["'publisher'; choose from author, description, lic"]),
    (["method.metadata=cats"], ["it is a mapping; write 'method.metadata={title: ...}'"]),
    (["metadata_author=me"], ["it is called 'method.metadata.author' here"]),
    (["log.wandb.mode=online"], ["log.wandb", "choose its group first (log=wandb"]),
    (["-m", "seed=0,1", "optim.lrr=1,2"], ["optim.lrr", "did you mean 'lr'"]),
    (["optim=sophia", "loss=huber"], ["optim=sophia", "loss=huber", "use loss=mse"]),
    (
        ["optim=sophia", "optim.on_nonfinite=raise"],
        ["optim.on_nonfinite=raise", "optim=sophia", "use optim.on_nonfinite=skip"],
    ),
    (["optim=null"], ["optim has no choice"]),
    (["experiment=[smoke,low]"], ["experiment=low: there is no experiment choice 'low'"]),
    (["noise=null"], ["noise has no choice"]),
    (["noise.prediction=v"], ["noise.prediction=v", "v_prediction"]),
    (
        ["noise.prediction=epsilon", "noise.zero_terminal_snr=true"],
        ["noise.zero_terminal_snr=true", "set noise.prediction=v_prediction"],
    ),
    (["noise.prediction=epsilon"], ["zero terminal SNR", "noise.zero_terminal_snr=false"]),
    (
        ["noise.timestep_low=500", "noise.timestep_high=500"],
        ["noise.timestep_low=500", "noise.timestep_high=500", "[low, high)"],
    ),
    (["noise.timestep_high=2000"], ["noise.timestep_high=2000", "[0, 1000)"]),
    (["noise.offset=-1"], ["noise.offset=-1", "in [0, 1]"]),
    (["loss.weighting=snr"], ["loss.weighting=snr", "min_snr"]),
    (["loss.schedule=snr"], ["loss.schedule", "loss=huber has it"]),
    (["loss.unmasked_weight=2"], ["loss.unmasked_weight=2", "in [0, 1]"]),
    (["schedule=wsd", "schedule.shape=square"], ["schedule.shape=square", "sqrt"]),
    (["schedule=wsd", "schedule.decay=1.5"], ["schedule.decay=1.5", "in [0, 1]"]),
    (["schedule=polynomial", "schedule.power=0"], ["schedule.power=0", "out of range"]),
    (["data.path=/a=b"], ["needs quotes", "'data.path=\"/a=b\"'"]),
    (["data.path="], ["data.path is empty"]),
    (["data.caption_extension=txt"], ["data.caption_extension=txt", ".txt"]),
    (["data.caption_extension=.png"], ["data.caption_extension=.png"]),
    (["data.resolution=100"], ["data.resolution=100", "multiple of 8"]),
    (["data.background=blurple"], ["data.background=blurple", "#rrggbb"]),
    (["data.sources=[{path:/nowhere}]", "data.path=null"], ["data.sources.0.path=/nowhere"]),
    (["data.sources=[{path:/,repeats:0}]"], ["data.sources.0.repeats=0", "at least 1"]),
    (["data.sources=[{path:/}]"], ["data.path and data.sources are both set"]),
    (["data.cache_dtype=fp8"], ["data.cache_dtype=fp8", "bfloat16"]),
    (["runtime.device=mps"], ["runtime.device=mps: Apple", "not supported", "runtime.device=cpu"]),
    (["schedule=linear", "schedule.name=constant"], ["choose it as schedule=constant"]),
    (["optim.name=adafactor"], ["choose it as optim=adafactor"]),
    (["method=lora", "method.targets=[to_q,to_kk]"], ["method.targets", "to_kk matches no linear"]),
    (["optim=external", "optim.class_path=torch.optim.LBFGS"], ["LBFGS", "closure"]),
    (["optim=external", "optim.class_path=optim.Lion"], ["use optim=lion"]),
    (
        ["runtime.fused_backward=true"],
        ["method.clip=global ", "rms (each tensor by itself)", "runtime.fused_backward=false"],
    ),
    (["resume=latest"], ["resume=latest", "no checkpoint"]),
    (["-m", "optim=adamw,lion", "--cfg", "job"], ["Only one of --run, --multirun", "--cfg"]),
    (["seed=0,1"], ["seed=0,1: to sweep over these values, add -m; the option takes one"]),
    (["log.prompts=a cat, red"], ["as a list, 'log.prompts=[a cat, red]'"]),
    (["optim.lr=1e-4,1e-3"], ["to sweep over these values, add -m; the option takes one"]),
    (["optim=adamw", "optim.betas=0.9,0.99"], ["add -m; as a list, 'optim.betas=[0.9,0.99]'"]),
    (["method=lora", "method.targets=to_q,to_v"], ["as a list, 'method.targets=[to_q,to_v]'"]),
    (
        ["data.resolution=1024,1024"],
        ["one number", "write data.resolution=1024; to sweep over them, add -m"],
    ),
    (["data.resolution=512,768"], ["=512, or for several 'data.resolutions=[512,768]'; to"]),
    (["schedule.warmup_steps=0.1"], ["0.1 of schedule.steps=550 is schedule.warmup_steps=55"]),
    (
        ["schedule.steps=9000", "schedule.warmup_steps=5%"],
        ["whole number of optimizer steps; 0.05 of", "=9000 is schedule.warmup_steps=450"],
    ),
    (["schedule.warmup_steps=1epoch"], ["whole number of optimizer steps; leave it out for 20"]),
    (["'data.sources=[{path: /a}]'"], ["remove the quotes around the whole argument"]),
    (['"seed=1"'], ['"seed=1": remove the quotes around the whole argument']),
    (["-m", "seed=0,1", "optim=true"], ["optim must be one of", "adamw"]),
    (["hydra/launcher=submitit_slurm"], ["pip install hydra-submitit-launcher --upgrade"]),
    (["-m", "hydra/launcher=joblib", "seed=0,1"], ["pip install hydra-joblib-launcher --upgrade"]),
    (["hydra/launcher=basik"], ["no hydra/launcher choice 'basik'", "did you mean 'basic'"]),
    (["hydra/sweeper=x"], ["no hydra/sweeper choice 'x'", "basic, nevergrad, optuna"]),
    (["resume=/nowhere"], ["resume=/nowhere", "no checkpoint"]),
    (["optim=external", "optim.class_path=torch.optim.Nope"], ["class_path", "Nope"]),
    (
        ["optim=external", "optim.class_path=torch.optim.RAdam", "+optim.options.btas=[0.9,0.9]"],
        ["optim.options.btas", "did you mean 'betas'"],
    ),
    (
        ["optim=external", "optim.class_path=torch.optim.SGD", "+optim.options.momentum=abc"],
        ["torch.optim.SGD with momentum='abc'"],
    ),
    (
        ["optim=external", "optim.class_path=torch.optim.SparseAdam"],
        ["torch.optim.SparseAdam cannot make a step", "dense gradients"],
    ),
    (["method=lora", "method.targets=[]"], ["method.targets=[]", "adapts no layer of unet"]),
    (["method=lora", "method.train=[unet,unet]"], ["method.train=['unet', 'unet']", "twice"]),
    (["ema=true"], ["ema must be one of", "bf16"]),
    (["ema=null"], ["ema has no choice", "none"]),
    (["log.prompts_file=nowhere.txt"], ["log.prompts_file=nowhere.txt", "No such file"]),
    (["optim.lr=${nope}"], ["optim.lr: interpolation key 'nope' not found"]),
    (["log.prompts=a", "cat"], ["cat is not an option", "write 'log.prompts=a cat'"]),
    (["sdxl", "optim=lion"], ["sdxl is not an option", "key=value"]),
    (
        ["hydra.run.dir=/proc/a"],
        ["/proc/a: No such file or directory; name another folder with hydra.run.dir=..."],
    ),
    (
        ["-m", "seed=0,1", "hydra.sweep.dir=/proc/a"],
        ["/proc/a: No such file or directory; name another folder with hydra.sweep.dir=..."],
    ),
    (["method.train=unet"], ["method.train is a list; write 'method.train=[unet]'"]),
    (["log.prompts='a cat'"], ["log.prompts is a list; write \"log.prompts=['a cat']\""]),
    (["train.steps=20"], ["did you mean 'schedule.steps'"]),
    (["optim.steps=20"], ["did you mean 'schedule.steps'"]),
    (["lr=1e-4"], ["did you mean 'optim.lr'"]),
    (["batchsize=2"], ["no option 'batchsize'", "did you mean 'data.batch_size'"]),
    (["path=/a"], ["did you mean 'model.path' or 'data.path'"]),
    (
        ["-m", "schedule=cosine,constant", "schedule.final_scale=0,1"],
        ["there is no option of schedule=constant 'final_scale'"],
    ),
    (["experiment=low_memory", "experiment=smoke"], ["write experiment=[low_memory,smoke]"]),
    (["experiment=[low_memory]", "experiment=smoke"], ["write experiment=[low_memory,smoke]"]),
    (
        ["experiment=smoke", "data.sources=[/a]"],
        ["data.sources=[/a]: each item is a mapping; write 'data.sources=[{path: ...}]'"],
    ),
    (["method=lora", "method.ranks=[4]"], ["'method.ranks=[{pattern: ..., rank: ...}]'"]),
    (["experiment=smoke", "method.rules=[attn]"], ["method.rules: each rule is a mapping"]),
    (["experiment=smoke", "name=${nope}"], ["interpolation key 'nope' not found"]),
    (["experiment=smoke", "~data.path"], ["~data.path: an option cannot be removed"]),
    (["~seed"], ["seed has no value; leave ~seed out"]),
    (["seed=null"], ["seed=null: it must have a value"]),
    (["method.ema=true"], ["method.ema=true", "choose its group first (ema=bf16 or ema=fp32)"]),
    (["optim=lion", "optim=adamw"], ["optim is given more than once (lion,adamw)"]),
    (["seed=-1"], ["seed=-1", "in [0, 2^64 - 1]"]),
    ([f"seed={2**64}"], [f"seed={2**64}", "in [0, 2^64 - 1]"]),
    (["schedule.epochs=inf"], ["schedule.epochs=inf", "out of range"]),
    (["method=lora", "method.alpha=inf"], ["method.alpha=inf", "out of range"]),
    (["data.path=null", "data.sources=[{path: /, weight: 0}]"], ["every weight is 0"]),
    (
        ["schedule.steps=2", "schedule.warmup_steps=20"],
        ["schedule.warmup_steps=20", "[0, 2]", "set schedule.warmup_steps=0"],
    ),
    (
        ["schedule=wsd", "schedule.power=2"],
        ["'schedule.power' here; schedule=polynomial has it"],
    ),
    (["optim.LR=1"], ["did you mean 'lr'"]),
    (["learning_rate=1e-4"], ["it is called 'optim.lr' here"]),
    (["optim.learning_rate=1e-4"], ["it is called 'optim.lr' here"]),
    (
        ["optim.text_encoder_lr=5e-5"],
        ["write 'method.rules=[{pattern: text_encoder, lr: 5e-5}]'"],
    ),
    (["data.num_repeats=2"], ["write 'data.sources=[{path: ..., repeats: 2}]'"]),
    (["noise.min_timestep=9"], ["it is called 'noise.timestep_low' here"]),
    (["max_timestep=9"], ["it is called 'noise.timestep_high' here"]),
    (["schedule.warmup_ratio=0.1"], ["write schedule.warmup_steps=..., a number of steps"]),
    (["--max_train_epochs=3"], ["no dashes", "it is called 'schedule.epochs' here"]),
    (["--seed=3"], ["--seed=3: options have no dashes; write seed=3"]),
    (
        ["log.negative_prompt=low quality, blurred"],
        ["'log.negative_prompt=\"low quality, blurred\"'"],
    ),
    (["experiment=sdxl_lora", "method=full"], ["experiment=sdxl_lora sets method.rank"]),
    (
        ["optim=external", "optim.class_path=torch.optim.RAdam", "optim.weight_decay=0.1"],
        ["'+optim.options.weight_decay=...'"],
    ),
]


def test_what_others_call_our_options_leads_to_options():
    compose.register()
    valid = {*choices.options_of(["method=lora", "loss=mse"]), *group_names(), "hydra.run.dir"}
    named = " ".join(elsewhere.NAMES.values()).split()
    assert {option.partition("=")[0] for option in named} <= valid


@pytest.mark.parametrize(("arguments", "says"), MISTAKES, ids=lambda x: " ".join(x[:3]))
def test_a_mistake_is_one_line_that_names_the_key_and_the_remedy(command, in_tmp, arguments, says):
    status, _, err = command(*arguments)
    assert status == 2
    lines = [line for line in err.splitlines() if line.strip()]
    assert len(lines) == 1, err
    assert lines[0].startswith("error: ")
    for part in says:
        assert part in lines[0]
    assert not list(in_tmp.glob("runs/*/*/metrics.jsonl")), "a refused run has begun"


def test_choices_of_ones_own_are_found_and_a_mistake_beside_them_is_one_line(command, in_tmp):
    (in_tmp / "mine/optim").mkdir(parents=True)
    (in_tmp / "mine/optim/radam.yaml").write_text(
        "defaults: [external]\nclass_path: torch.optim.RAdam\noptions: {eps: 1e-7}\n"
    )
    given = ("--config-dir", "mine", "optim=radam")
    status, out, _ = command(*given, "optim.options.eps=1e-6", "--cfg", "job", "--package", "optim")
    assert status == 0
    assert "class_path: torch.optim.RAdam" in out
    assert "eps: 1.0e-06" in out
    status, _, err = command(*given, "optim.lrr=3")
    assert status == 2
    assert err.startswith("error: Could not override 'optim.lrr'.")
    assert err.count("\n") == 1


@pytest.mark.parametrize("choice", ["optim=radam", "experiment=[smoke,mine]"])
def test_a_run_with_choices_of_ones_own_asks_for_their_folder_when_it_is_resumed(
    command, in_tmp, choice
):
    (in_tmp / "checkpoint.json").write_text(json.dumps({"overrides": [choice]}))
    status, _, err = command("resume=.")
    assert status == 2
    assert err.endswith("is resumed with the same --config-dir\n")
    assert err.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_named(command):
    status, _, err = command("runtime.device=cuda")
    assert status == 2
    assert "runtime.device=cpu" in err


def test_help_lists_every_group_and_choice(command):
    status, out, _ = command("--help")
    assert status == 0
    for choice in CHOICES:
        group, name = choice.split("=")
        line = next(line for line in out.splitlines() if line.split()[:1] == [group])
        assert name in line


def test_what_help_says_to_ask_further_has_an_answer(command):
    _, out, _ = command("--help")
    asked = re.findall(r"python -m trainer --help (.*)", out)
    assert len(asked) == 3
    for topics in asked:
        status, out, _ = command("--help", *topics.split())
        assert (status, topics.split()[-1].partition("=")[0] in out) == (0, True)


def test_what_help_says_to_set_first_are_options(command):
    _, out, _ = command("--help")
    listed = out.split("Options to set first:")[1].split("Choices")[0]
    named = re.findall(r"^  ([a-z.]+)=(\S+) ", listed, re.M)
    assert {key for key, _ in named} >= {"data.path", "model.path", "optim.lr", "schedule.steps"}
    compose_raw("data=folder", "model=sdxl", *(f"{key}={value}" for key, value in named))


@pytest.mark.parametrize(
    "arguments",
    [
        ["seed=3", "--cfg", "job", "optim=lion"],
        ["-c", "job", "seed=3", "optim=lion"],
        ["seed=3", "--config-dir", ".", "optim=lion", "--cfg=job"],
        ["seed=3", "--resolve", "optim=lion", "-c", "job"],
    ],
)
def test_flags_may_stand_between_options(command, arguments):
    status, out, err = command(*arguments)
    assert (status, err) == (0, "")
    assert "seed: 3" in out
    assert "name: lion" in out


def test_several_experiments_are_a_list(composed):
    both = composed("experiment=[low_memory,smoke]")
    assert both.runtime.fused_backward
    assert both.schedule.steps == 4


@pytest.mark.parametrize(
    "name", ["", ".doctor", ".draw", ".export", ".kohya", ".planner", ".sweep"]
)
def test_ctrl_c_while_libraries_are_imported_is_one_line(tmp_path, name):
    """Fake libraries send the signal."""
    interrupt = "import os, signal; os.kill(os.getpid(), signal.SIGINT)"
    for library in ("hydra", "omegaconf", "torch"):
        (tmp_path / f"{library}.py").write_text(interrupt)
    given = {".draw": ["a", "--out=a.png"], ".export": ["a", "b"]}.get(name, ["--help"])
    done = new_process(*given, cwd=tmp_path, module=f"trainer{name}")
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "stopped\n")


@pytest.mark.parametrize("name", ["doctor", "planner", "sweep"])
def test_ctrl_c_at_other_commands_is_one_line(tmp_path, name):
    """They wait for the text of a pipe, which is opened as soon as they read it."""
    pipe = tmp_path / "summary.json"
    os.mkfifo(pipe)
    given = str(tmp_path) if name == "sweep" else f"log.prompts_file={pipe}"
    process = subprocess.Popen(
        [sys.executable, "-m", f"trainer.{name}", given], stderr=subprocess.PIPE, text=True
    )
    writer = None
    while writer is None:
        assert process.poll() is None
        with contextlib.suppress(OSError):  # nobody reads it yet
            writer = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert (process.wait(timeout=60), process.stderr.read()) == (130, "stopped\n")
    os.close(writer)


def test_cfg_job_shows_the_chosen_options(command):
    status, out, _ = command("optim=lion", "--cfg", "job", "--package", "optim")
    assert status == 0
    assert "betas:" in out
    assert "lr: 0.0002" in out


def test_a_missing_value_is_reported_before_anything_else():
    with pytest.raises(UserError, match=r"data\.path has no value"):
        validate.to_dataclasses(compose_raw("data=folder"))


@pytest.mark.parametrize(
    "group", ["data", "log", "loss", "method", "model", "noise", "runtime", "schedule"]
)
def test_the_values_of_a_choice_are_those_that_are_composed(group):
    for choice in config.choices_of(group):
        made = OmegaConf.to_container(compose_raw(f"{group}={choice}"), resolve=False)[group]
        assert made | config.values_of(group, choice) == made
