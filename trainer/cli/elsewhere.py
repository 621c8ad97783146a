"""What other trainers (diffusers' scripts, kohya's) call our options."""

from typing import Any

SAME = {  # kohya's with the same meaning and values
    "train_batch_size": "data.batch_size",
    "gradient_accumulation_steps": "runtime.accumulation",
    "seed": "seed",
    "output_name": "name",
    "vae": "model.vae",
    "caption_separator": "data.tag_separator",
    "caption_tag_dropout_rate": "data.tag_dropout",
    "keep_tokens": "data.keep_tokens",
    "keep_tokens_separator": "data.keep_separator",
    "bucket_reso_steps": "data.bucket_step",
    "noise_offset": "noise.offset",
    "ip_noise_gamma": "noise.input_perturbation",
    "min_timestep": "noise.timestep_low",
    "max_timestep": "noise.timestep_high",
    "sample_prompts": "log.prompts_file",
    "network_weights": "method.start_from",
    "network_dropout": "method.dropout",
    "metadata_title": "method.metadata.title",
    "metadata_author": "method.metadata.author",
    "metadata_description": "method.metadata.description",
    "metadata_license": "method.metadata.license",
    "metadata_tags": "method.metadata.tags",
}
# kohya's that are given or not: the option, and its value if given
FLAGS: dict[str, tuple[str, Any]] = {
    "v_parameterization": ("noise.prediction", "v_prediction"),
    "zero_terminal_snr": ("noise.zero_terminal_snr", True),
    "shuffle_caption": ("data.shuffle_tags", True),
    "flip_aug": ("data.random_flip", True),
    "random_crop": ("data.crops", 5),
    "alpha_mask": ("data.mask", "alpha"),
    "debiased_estimation_loss": ("loss.weighting", "debiased"),
    "torch_compile": ("runtime.compile", "regional"),
}
_OTHERS = {  # with other values, or of other scripts
    "cache_latents_to_disk": "data.cache",
    "caption_dropout_rate": "data.caption_dropout",
    "conv_alpha": "method.ranks",
    "conv_dim": "method.ranks",
    "enable_bucket": "data.buckets",
    "flow_model": "noise=flow_matching",
    "flow_uniform_static_ratio": "noise.timestep_shift",
    "fp8_base": "model.quantization",
    "full_bf16": "model.dtype",
    "fused_backward_pass": "runtime.fused_backward",
    "learning_rate": "optim.lr",
    "lr_scheduler": "schedule",
    "lr_warmup_steps": "schedule.warmup_steps",
    "max_train_epochs": "schedule.epochs",
    "max_train_steps": "schedule.steps",
    "min_snr_gamma": "loss.weighting=min_snr loss.gamma",
    "mixed_precision": "model.compute",
    "network_alpha": "method.alpha",
    "network_dim": "method.rank",
    "network_train_unet_only": "method.train",
    "num_train_epochs": "schedule.epochs",
    "optimizer": "optim",
    "optimizer_type": "optim",
    "output_dir": "hydra.run.dir",
    "pretrained_model_name_or_path": "model.path",
    "sample_every_n_steps": "log.sample_every",
    "save_every_n_epochs": "method.export_every",
    "save_every_n_steps": "method.export_every",
    "snr_gamma": "loss.weighting=min_snr loss.gamma",
    "train_data_dir": "data.path",
    "train_text_encoder": "method.train",
    "unet_lr": "optim.lr",
}

# By name, for those that are not called alike.
NAMES = {
    theirs: ours
    for theirs, ours in (SAME | {name: key for name, (key, _) in FLAGS.items()} | _OTHERS).items()
    if ours.rpartition(".")[2] != theirs
}

# What they have options for, and we write in other ways.
WRITTEN = {
    "lr_warmup_ratio": "schedule.warmup_steps=..., a number of steps",
    "num_repeats": "'data.sources=[{path: ..., repeats: 2}]'",
    "repeats": "'data.sources=[{path: ..., repeats: 2}]'",
    "text_encoder_lr": "'method.rules=[{pattern: text_encoder, lr: 5e-5}]', "
    "with 'method.train=[unet,text_encoder]'",
    "warmup_ratio": "schedule.warmup_steps=..., a number of steps",
}
