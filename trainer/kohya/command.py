"""kohya's options as this trainer's.

Their defaults are written out where ours differ, so that the command trains as theirs would.
"""

from trainer.kohya import inputs, learning, method, needless, results
from trainer.kohya.reading import Given
from trainer.kohya.translation import Translation

_PARTS = (
    *(inputs.model, inputs.pictures, inputs.captions, method.method),
    *(learning.optimizer, learning.length, learning.objective, results.results),
)
_SAME = {  # options with the same meaning and values
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
_FLAGS = {  # options that are given or not
    "v_parameterization": ("noise.prediction", "v_prediction"),
    "zero_terminal_snr": ("noise.zero_terminal_snr", True),
    "shuffle_caption": ("data.shuffle_tags", True),
    "flip_aug": ("data.random_flip", True),
    "alpha_mask": ("data.mask", "alpha"),
    "debiased_estimation_loss": ("loss.weighting", "debiased"),
    "torch_compile": ("runtime.compile", "regional"),
}


def translate(given: Given, family: str) -> Translation:
    """The options of this trainer.  Raises UserError if theirs train what it cannot."""
    is_lora = "network_module" in given.options or given.script.endswith("train_network.py")
    made = Translation(family=family, is_lora=is_lora, notes=[*given.notes])
    made.choose(f"experiment={family}{'_lora' if is_lora else ''}")
    for part in _PARTS:
        part(given, made)
    for theirs, ours in _SAME.items():
        if (value := given.take(theirs)) is not None:
            made.set(ours, value)
    for theirs, (ours, value) in _FLAGS.items():
        if given.take(theirs):
            made.set(ours, value)
    made.notes += [f"{name}: {needless.why(name)}" for name in given.others if needless.why(name)]
    return made
