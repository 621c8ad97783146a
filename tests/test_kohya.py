"""python -m trainer.kohya: commands and files of kohya's scripts as commands of this trainer."""

import shlex
import signal
import subprocess
import sys

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from trainer.cli import compose
from trainer.config import for_hydra
from trainer.kohya import __main__ as command

LORA = ["sdxl_train_network.py", "--pretrained_model_name_or_path=/m.safetensors"]
LORA += ["--train_data_dir=/d", "--mixed_precision=bf16", "--network_train_unet_only"]
FULL = ["sdxl_train.py", "--pretrained_model_name_or_path=/m.safetensors", "--train_data_dir=/d"]


@pytest.fixture
def translated(capsys):
    """-> (exit status, overrides, what is said on stderr)."""

    def run(*arguments):
        try:
            status = command.main([str(each) for each in arguments])
        except SystemExit as error:
            status = error.code
        out, err = capsys.readouterr()
        words = shlex.split(out.replace("\\\n", " "))
        assert words[:3] == (["python", "-m", "trainer"] if out else [])
        return status, words[3:], err

    return run


def test_a_command_becomes_the_options_that_train_the_same(translated):
    status, overrides, err = translated(
        *("--", "accelerate", "launch", "--num_processes", "1", *LORA),
        *("--network_dim=64", "--network_alpha", "32", "--learning_rate", "1e-4"),
        *("--optimizer_type=AdamW8bit", "--optimizer_args", "weight_decay=0.1", "betas=0.9,0.99"),
        *("--lr_scheduler=cosine_with_restarts", "--lr_scheduler_num_cycles=3"),
        *("--lr_warmup_steps=0.1", "--max_train_steps=3000", "--train_batch_size=4"),
        *("--resolution=1024,1024", "--enable_bucket", "--bucket_no_upscale", "--xformers"),
        *("--cache_latents", "--gradient_checkpointing", "--min_snr_gamma=1", "--shuffle_caption"),
        *("--save_every_n_epochs=2", "--save_last_n_epochs=6", "--output_dir=/o"),
        *("--output_name=cats", "--seed=42", "--max_token_length=225"),
    )
    assert (status, err) == (0, "")
    assert overrides[0] == "experiment=sdxl_lora"
    assert {
        *("model.path=/m.safetensors", "data.path=/d", "data.kohya_folders=true"),
        *("method.rank=64", "method.alpha=32", "optim.lr=1e-4", "optim=adamw8bit"),
        *("optim.weight_decay=0.1", "optim.betas=[0.9,0.99]", "schedule=cosine_restarts"),
        *("schedule.steps=3000", "schedule.warmup_steps=300"),
        *("data.batch_size=4", "loss.weighting=min_snr", "loss.gamma=1", "data.shuffle_tags=true"),
        *("method.export_every=2epoch", "method.keep_exports=3", "hydra.run.dir=/o/cats"),
        *("name=cats", "seed=42", "model.prompt_chunks=3", "data.caption_dropout=0"),
    } <= {*overrides}
    keys = [override.partition("=")[0] for override in overrides]
    assert len({*keys}) == len(keys)
    # What the preset has anyway is not repeated.
    assert not {"data.resolution", "data.buckets", "data.upscale", "method.clip"} & {*keys}


CASES = [  # (options, what comes of them, a word of the notes)
    (LORA, {"method.rank=4", "method.alpha=1", "optim=adamw", "optim.lr=2e-06"}, ""),
    (LORA, {"schedule=constant", "schedule.steps=1600", "schedule.warmup_steps=0"}, ""),
    (LORA, {"data.buckets=false", "data.upscale=true", "method.export_every=0"}, ""),
    (LORA, {"runtime.gradient_checkpointing=false"}, ""),
    ([*LORA, "--network_module=lycoris.kohya", "--network_args", "algo=locon", "dora_wd=True"],
     {"method.dora=true"}, "conv_in, conv_out and time_embedding are not adapted"),
    ([*LORA, "--network_args", "conv_dim=8"],
     {'method.ranks=[{pattern: "resnets.*conv[12]|samplers",rank: 8,alpha: 1}]'}, ""),
    ([*LORA, "--network_args", "conv_dim=8", "conv_alpha=4"],
     {'method.ranks=[{pattern: "resnets.*conv[12]|samplers",rank: 8,alpha: 4}]'}, ""),
    ([*LORA, "--network_args", "conv_dim=0", "rank_dropout=0", "mid_lr_weight=1"], set(), ""),
    ([*LORA, "--network_dim=8", "--network_alpha=0"], {"method.rank=8", "method.alpha=8"}, ""),
    ([*LORA, "--network_args", "rank_dropout=0.1"], set(), "network_args rank_dropout"),
    ([*LORA, "--network_module=lycoris.kohya", "--network_dim=8", "--network_alpha=2",
      "--network_args", "algo=lora", "preset=full", "dropout=0.1"],
     {'method.ranks=[{pattern: "resnets.*conv[12]|samplers",rank: 8,alpha: 2}]',
      "method.dropout=0.1"}, "conv_in, conv_out and time_embedding"),
    ([*LORA, "--network_module=lycoris.kohya", "--network_dim=8", "--network_alpha=4",
      "--network_args", "algo=lokr", "factor=4", "decompose_both=True", "dropout=0.1"],
     {"method=lokr", "method.factor=4", "method.decompose_both=true", "method.rank=8",
      'method.ranks=[{pattern: "resnets.*conv[12]|samplers",rank: 8,alpha: 4}]'}, "conv_in"),
    ([*LORA, "--network_module=lycoris.kohya", "--network_args", "algo=lokr", "full_matrix=True",
      "conv_dim=4", "use_tucker=True"],
     {"method=lokr", "method.factor=null", "method.rank=10000",
      'method.ranks=[{pattern: "resnets.*conv[12]|samplers",rank: 10000,alpha: 10000}]'},
     "network_args use_tucker: there is no such option here"),
    ([*LORA, "--network_module=lycoris.kohya", "--network_args", "algo=loha", "dora_wd=True"],
     {"method=loha", "method.rank=4"}, "network_args dora_wd: there is no such option here"),
    ([*LORA, "--network_module=networks.lokr", "--network_args", "factor=4", "conv_dim=8"],
     {"method=lokr", "method.factor=4",
      'method.ranks=[{pattern: "resnets.*conv[12]|samplers",rank: 8,alpha: 1}]'}, ""),
    ([*LORA, "--network_module=networks.loha", "--network_dropout=0.1"], {"method=loha"}, ""),
    ([*LORA, "--network_module=lycoris.kohya", "--network_args", "preset=attn-mlp"],
     {"method.targets=[to_q,to_k,to_v,to_out.0,ff.net.0.proj,ff.net.2,proj_in,proj_out]"}, ""),
    ([*LORA, "--network_module=lycoris.kohya", "--network_args", "preset=mine.toml"], set(),
     "preset=mine.toml: not translated"),
    ([*LORA, "--dim_from_weights", "--network_weights=/l"], {"method.start_from=/l"},
     "dim_from_weights: set method.rank"),
    ([*LORA[:3], "--network_module=lycoris.kohya", "--network_args", "preset=unet-only"],
     {"method.rank=4"}, "preset"),
    ([*LORA[:3], "--unet_lr=0", "--text_encoder_lr=1e-5"],
     {"method.train=[text_encoder,text_encoder_2]"}, ""),
    ([*LORA, "--min_snr_gamma=0", "--multires_noise_iterations=0", "--adaptive_noise_scale=0",
      "--multires_noise_discount=0.3", "--sample_every_n_steps=0", "--max_token_length=75"],
     {"method.export_every=0"}, ""),
    ([*LORA, "--caption_prefix=sks", "--caption_suffix=photo"],
     {'data.caption_prefix="sks "', 'data.caption_suffix=" photo"'}, ""),
    ([*LORA, "--in_json=/j"], {"model.path=/m.safetensors"}, "in_json: captions come"),
    (LORA, {"data.caption_extension=.caption"}, ""),
    ([*LORA, "--max_train_epoch=3", "--caption_extention=.txt"],
     {"schedule.epochs=3", "data.caption_extension=.txt"}, ""),
    ([*LORA, "--lr_scheduler=cosine", "--lr_scheduler_min_lr_ratio=0.1"], {"schedule=cosine"}, ""),
    ([*LORA, "--lr_scheduler=cosine_with_min_lr", "--lr_scheduler_min_lr_ratio=0.1"],
     {"schedule=cosine", "schedule.final_scale=0.1"}, ""),
    ([*LORA, "--lr_scheduler=warmup_stable_decay", "--lr_decay_steps=0.5"],
     {"schedule=wsd", "schedule.decay=0.5", "schedule.shape=cosine"}, ""),
    ([*LORA, "--lr_scheduler=cosine", "--lr_scheduler_type=MyLR", "--lr_scheduler_args", "t=3"],
     {"schedule=constant"}, "lr_scheduler=MyLR: not translated"),
    ([*LORA, "--save_every_n_steps=5", "--save_every_n_epochs=1"], {"method.export_every=1epoch"},
     "save_every_n_steps: left out"),
    ([*LORA, "--sample_sampler=euler", "--huggingface_repo_type=model"], set(), ""),
    ([*LORA, "--sample_prompts=a.toml", "--sample_every_n_epochs=2", "--sample_sampler=euler"],
     {"log.sample_every=2epoch"}, "sample_prompts: write"),
    ([*LORA[:3], "--text_encoder_lr", "5e-5", "1e-5"],
     {"method.train=[unet,text_encoder,text_encoder_2]", "model.dtype=float32",
      "method.rules=[{pattern: text_encoder_2,lr: 1e-5},{pattern: text_encoder,lr: 5e-5}]"}, ""),
    ([*LORA[:3], "--text_encoder_lr=0"], {"model.dtype=float32"}, ""),
    ([*LORA[:3], "--text_encoder_lr", "0", "1e-5"],
     {"method.train=[unet,text_encoder_2]", "method.rules=[{pattern: text_encoder_2,lr: 1e-5}]"},
     ""),
    ([*LORA[:3], "--unet_lr=1e-4", "--learning_rate=1e-5"],
     {"optim.lr=1e-4", "method.train=[unet,text_encoder,text_encoder_2]",
      "method.rules=[{pattern: text_encoder_2,lr: 1e-5},{pattern: text_encoder,lr: 1e-5}]"}, ""),
    ([*LORA, "--unet_lr=3e-4", "--learning_rate=1"], {"optim.lr=3e-4"}, ""),
    ([*LORA, "--optimizer_type=Prodigy", "--learning_rate=1", "--optimizer_args", "decouple=True",
      "d_coef=2", "use_bias_correction=True"],
     {"optim=prodigy", "optim.slice_p=1", "optim.d_coef=2", "optim.bias_correction=true",
      "optim.weight_decay=0.0"}, ""),
    ([*LORA, "--optimizer_type=AdamWScheduleFree", "--lr_scheduler=cosine"],
     {"optim=adamw_schedulefree", "optim.weight_decay=0.0", "schedule=constant"}, ""),
    ([*LORA, "--optimizer_type=prodigyplus.ProdigyPlusScheduleFree", "--learning_rate=1",
      "--lr_scheduler=cosine", "--optimizer_args", "d_coef=0.5", "split_groups=False",
      "use_orthograd=True"],
     {"optim=prodigy_schedulefree", "optim.lr=1", "optim.d_coef=1.0", "optim.orthograd=true",
      "optim.betas=[0.9,0.99]", "optim.weight_decay=0.0", "schedule=constant"}, ""),
    ([*LORA, "--optimizer_type=prodigyplus.prodigy_plus_schedulefree.ProdigyPlusScheduleFree",
      "--lr_scheduler=cosine", "--optimizer_args", "use_schedulefree=False", "use_speed=True"],
     {"optim=prodigy", "optim.betas=[0.9,0.99]", "schedule=constant"},
     "use_speed: there is no option of prodigy"),
    ([*LORA, "--optimizer_type=DAdaptLion"], set(), "optimizer_type=DAdaptLion: not translated"),
    ([*LORA, "--loss_type=huber", "--huber_c=0.2"],
     {"loss=huber", "loss.delta=0.2", "loss.schedule=snr"}, "Huber's loss"),
    ([*LORA, "--multires_noise_iterations=6"], {"noise.pyramid=0.3"}, ""),
    ([*LORA, "--noise_offset=0.05", "--flip_aug", "--v_parameterization", "--zero_terminal_snr"],
     {"noise.offset=0.05", "data.random_flip=true", "noise.prediction=v_prediction",
      "noise.zero_terminal_snr=true"}, ""),
    ([*LORA, "--random_crop", "--color_aug"], {"data.crops=5"}, "color_aug: pictures are encoded"),
    ([*LORA, "--flow_model", "--flow_use_ot", "--flow_timestep_distribution=logit_normal",
      "--flow_logit_mean=-0.2", "--flow_logit_std=1.5", "--flow_uniform_static_ratio=2.5"],
     {"noise=flow_matching", "noise.logit_mean=-0.2",
      "noise.logit_std=1.5", "noise.timestep_shift=2.5"}, "flow_use_ot: a plain flow"),
    ([*LORA, "--flow_model", "--flow_timestep_distribution=uniform", "--min_snr_gamma=5"],
     {"noise=flow_matching", "noise.timesteps=uniform", "noise.timestep_shift=1.0"},
     "min_snr_gamma: left out"),
    ([*LORA, "--reg_data_dir=/r", "--prior_loss_weight=0.5"],
     {"data.sources=[{path: /d},{path: /r,prior: true,weight: 0.5}]"}, ""),
    ([*LORA, "--save_every_n_steps=250", "--save_state", "--save_precision=fp16"],
     {"method.export_every=250", "runtime.save_every=250", "method.export_dtype=float16"}, ""),
    ([*LORA, "--log_with=all", "--log_tracker_name=cats"],
     {"log=wandb", "log.wandb.mode=online", "log.wandb.project=cats", "log.tensorboard=true"}, ""),
    ([*LORA, "--mixed_precision=fp16"], set(), "fp16: bf16 here"),
    ([*LORA, "--fp8_base"], {"model.quantization=int8"}, "8-bit integers"),
    ([*LORA, "--max_train_epochs=4", "--lr_warmup_steps=0.1", "--lr_scheduler=cosine"],
     {"schedule=cosine", "schedule.epochs=4"}, "lr_warmup_steps=0.1"),
    ([*LORA, "--color_aug", "--sdpa", "--masked_loss"], set(), "NAME.mask.png"),
    ([*LORA, "--no_such_option=3"], set(), "no_such_option: there is no such option here"),
    ([*LORA, "--enable_bucket", "--max_bucket_reso=2048"], {"data.upscale=true"}, ""),
    ([*LORA, "--enable_bucket"], {"data.upscale=true"}, "theirs are 256 and 1024"),
    ([*LORA, "--bucket_no_upscale"], {"data.upscale=true", "data.buckets=false"}, ""),
    ([*LORA, "--clip_skip=2"], set(), ""),
    (["train_network.py", *LORA[1:], "--clip_skip=2"],
     {"experiment=sd15_lora", "model.clip_skip=1"}, ""),
    ([*FULL, "--mixed_precision=bf16", "--optimizer_type=Adafactor"],
     {"experiment=sdxl", "model.dtype=float32", "model.compute=bfloat16",
      "runtime.fused_backward=false", "method.clip=global", "optim=adafactor8bit",
      "optim.relative_step=true", "optim.scale_parameter=true", "optim.beta2=null",
      "optim.lr=0.01", "method.export=[single_file]"}, ""),
    ([*FULL, "--full_bf16", "--fused_backward_pass", "--optimizer_type=Adafactor",
      "--learning_rate=4e-6", "--optimizer_args", "relative_step=False", "scale_parameter=False"],
     {"optim=adafactor8bit", "optim.lr=4e-6"}, "clips each tensor"),
    ([*FULL, "--fused_backward_pass", "--max_grad_norm=0"], {"experiment=sdxl"}, ""),
    ([*FULL, "--train_text_encoder", "--learning_rate=1e-6", "--learning_rate_te1=1e-6",
      "--learning_rate_te2=1e-6"], {"method.train=[unet,text_encoder,text_encoder_2]"}, ""),
    ([*FULL, "--train_text_encoder", "--learning_rate_te1=1e-6", "--save_model_as=diffusers"],
     {"method.train=[unet,text_encoder,text_encoder_2]",
      "method.rules=[{pattern: text_encoder,lr: 1e-6}]"}, ""),
]  # fmt: skip


@pytest.mark.parametrize(
    ("words", "wanted", "note"), CASES, ids=[" ".join(words)[-60:] for words, *_ in CASES]
)
def test_what_trains_the_same_is_set_and_the_rest_is_said(translated, words, wanted, note):
    status, overrides, err = translated("--", *words)
    assert status == 0
    assert wanted <= {*overrides}
    assert note in err if note else err == ""


def test_a_file_of_options_is_read_with_its_datasets(translated, tmp_path):
    datasets, options = tmp_path / "data.toml", tmp_path / "lora.toml"
    datasets.write_text("""
        [general]
        shuffle_caption = true
        caption_extension = ".txt"
        [[datasets]]
        resolution = [832, 1216]
        batch_size = 2
        [[datasets.subsets]]
        image_dir = "C:\\\\my cats"
        num_repeats = 10
        class_tokens = "sks cat"
        keep_tokens = 1
        [[datasets.subsets]]
        image_dir = "/reg, all"
        is_reg = true
        keep_tokens = 2
    """)
    options.write_text(f"""
        [model]
        pretrained_model_name_or_path = "/m.safetensors"
        [network]
        network_module = "networks.lora"
        network_train_unet_only = true
        network_dim = 16
        [training]
        mixed_precision = "bf16"
        learning_rate = 0.0001
        gradient_checkpointing = true
        cache_latents = true
        flip_aug = false
        seed = 0
        dataset_config = "{datasets}"
    """)
    status, overrides, err = translated(options)
    assert status == 0, err
    assert "taken for SDXL" in err
    assert "keep_tokens: differs between subsets; 1 for all of them" in err
    assert "resolution: squares of that area here" in err
    composed = compose.composed(overrides)
    first, second = composed.data.sources
    assert (first.path, first.repeats, first.caption) == ("C:\\my cats", 10, "sks cat")
    assert (second.path, second.repeats, second.prior) == ("/reg, all", 1, True)
    assert composed.data.resolution == 1008  # 832 * 1216 is 1005.9 squared
    assert composed.data.batch_size == 2
    assert composed.data.shuffle_tags
    assert not composed.data.random_flip
    assert translated(options, "--model", "sd15")[1][0] == "experiment=sd15_lora"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("train.sh", "#!/bin/sh\ncd x\naccelerate launch a/{} \\\n  --vae '/v w.pt' \\\n{}\n"),
        ("train.bat", 'accelerate launch "a\\{}" ^\r\n  --vae "/v w.pt" ^\r\n{}\r\n'),
    ],
)
def test_a_script_with_the_command_is_read(translated, tmp_path, name, text):
    (tmp_path / name).write_text(text.format(LORA[0], "  " + " ".join(LORA[1:])))
    status, overrides, err = translated(tmp_path / name)
    assert (status, err) == (0, "")
    assert 'model.vae="/v w.pt"' in overrides
    assert "data.path=/d" in overrides


def test_the_first_of_several_commands_is_translated(translated, tmp_path):
    (tmp_path / "a.sh").write_text("".join(f"python {LORA[0]} --seed {i}\n" for i in (3, 4)))
    status, overrides, err = translated(tmp_path / "a.sh")
    assert status == 0
    assert "seed=3" in overrides
    assert "a.sh: the first of its 2 commands is translated" in err


WRONG = [
    (["--", "flux_train_network.py", "--a"], "flux_train_network.py is not translated"),
    (["--", *LORA, "--network_module=networks.oft"], "networks.oft cannot be trained here"),
    (
        ["--", *LORA, "--network_module=lycoris.kohya", "--network_args", "algo=boft"],
        "boft cannot be trained here",
    ),
    (
        ["--", *LORA, "--network_module=networks.lokr", "--network_args", "factor=x"],
        "network_args factor: 'x' is not a number",
    ),
    (["--", *LORA, "--network_args", "conv_dim"], "'conv_dim' is not of the form name=value"),
    (["--", *LORA, "--max_grad_norm=much"], "max_grad_norm: 'much' is not a number"),
    (["--", *LORA, "--noise_offset=7"], "noise.offset=7"),
    (["--", "sdxl_train.py", "bf16"], "bf16: an option of kohya's scripts begins with --"),
    (["--", "--t5xxl=/t"], "t5xxl is an option of scripts that are not translated"),
    (["--", "--max_resolution=1024"], "these are settings of kohya_ss' GUI"),
    (["/no/such.toml"], "/no/such.toml: cannot be read"),
    (["settings.json"], "settings.json: give the .toml"),
    ([], "give a file, or the words of a command after --"),
]


@pytest.mark.parametrize(("words", "error"), WRONG, ids=[error[-40:] for _, error in WRONG])
def test_what_cannot_be_translated_is_an_error_that_says_why(translated, words, error):
    status, overrides, err = translated(*words)
    assert (status, overrides) == (2, [])
    assert error in err


@pytest.mark.parametrize(
    ("file", "text", "error"),
    [
        ("a.toml", "x = ", "not valid TOML"),
        ("a.sh", "echo hello", "no command of a Python script"),
        ("a.sh", "python train_network.py --a 'b", "cannot be read: No closing quotation"),
        ("a.toml", "[[datasets]]", "a.toml says only where pictures are"),
        ("a.toml", 'dataset_config = "a.toml"', "there is no [[datasets.subsets]] in it"),
    ],
)
def test_a_file_without_options_is_an_error(translated, tmp_path, monkeypatch, file, text, error):
    monkeypatch.chdir(tmp_path)
    (tmp_path / file).write_text(text)
    status, _, err = translated(file)
    assert status == 2
    assert error in err


VALUES = [None, True, 3, 1e-5, "plain", "a b", 'say "no", {x}', "C:\\d\\", "a b\\", '\\"', "$x"]
VALUES += ["für", {"p": "a b", "q": [2]}, [1, "a,b"]]


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_a_written_value_is_read_by_hydra_as_it_was(value):
    override = OverridesParser.create().parse_override(f"key={for_hydra(value)}")
    assert override.value() == value


@pytest.mark.skipif(not hasattr(signal, "SIGPIPE"), reason="not on Windows")
def test_a_reader_that_has_enough_is_no_error():
    words = [sys.executable, "-m", "trainer.kohya", "--", *LORA]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == -signal.SIGPIPE
