"""Options of kohya's scripts that this trainer does not have, and why."""

_CACHED = "pictures are encoded before training: there are data.crops and data.random_flip"
_MASKS = "put each mask next to its picture as NAME.mask.png, and set data.mask=file"
_ALONE = "there is no such option here"

# Nothing is lost without these.
_QUIET = {
    *("xformers", "sdpa", "mem_eff_attn", "lowram", "highvram", "cache_latents", "vae_batch_size"),
    *("cache_text_encoder_outputs", "no_half_vae", "persistent_data_loader_workers"),
    *("max_data_loader_n_workers", "disable_mmap_load_safetensors", "log_config", "output_config"),
    *("save_state_on_train_end", "sample_at_first", "tokenizer_cache_dir", "cache_info"),
    *("skip_cache_check", "use_safetensors", "dim_from_weights", "logging_dir", "log_prefix"),
    *("dynamo_backend", "text_encoder_batch_size"),
    *("save_last_n_epochs_state", "save_last_n_steps_state", "config_file"),
    *("ddp_timeout", "ddp_gradient_as_bucket_view", "ddp_static_graph"),
    *(
        "min_data_loader_n_workers",
        "huber_scale",
        "diffusers_xformers",
        "training_comment",
        "no_metadata",
        "no_token_padding",
    ),
    *("token_warmup_min", "debug_dataset", "noise_offset_type", "console_log_level"),
    *("console_log_simple", "epoch", "sdxl", "wandb_run_name"),
    *("huggingface_repo_type", "huggingface_path_in_repo", "huggingface_token", "async_upload"),
    *("huggingface_repo_visibility", "save_state_to_huggingface"),
    *("flow_continuous_timesteps", "flow_uniform_base_pixels", "cfm_lambda"),
}
_WHY = {
    **dict.fromkeys(("color_aug", "face_crop_aug_range"), _CACHED),
    **dict.fromkeys(("masked_loss", "conditioning_data_dir"), _MASKS),
    "huggingface_repo_id": "results are not uploaded",
    "in_json": "captions come from text files, or a metadata.jsonl or .csv next to the pictures",
    "metadata_file": "captions come from text files, or a metadata.jsonl or .csv beside pictures",
    "resume": "their saved states cannot be resumed here; network_weights can be started from",
    "wandb_api_key": "log in with `wandb login`",
    "v2": "give Stable Diffusion 2 as a diffusers folder",
    "dataset_class": "data is read from folders, archives and tables",
    "skip_image_resolution": "python -m trainer.doctor names small pictures",
    **dict.fromkeys(("flow_use_ot", "contrastive_flow_matching"), "a plain flow is trained here"),
    "flow_uniform_shift": "the same shift for every size: noise.timestep_shift",
    "block_lr": "'method.rules=[{pattern: down_blocks.0, lr_scale: 0.5}]'",
    "deepspeed": "the step is fused here, so that nothing needs to be moved (docs/optimizers)",
    "fused_optimizer_groups": "set runtime.fused_backward=true, which takes every optimizer",
    "blocks_to_swap": "set model.quantization=int8 or nf4, or runtime.fused_backward=true",
}


def why(name: str) -> str:
    """Why an option has no counterpart; empty if nothing is lost without it."""
    return "" if name in _QUIET else _WHY.get(name, _ALONE)
