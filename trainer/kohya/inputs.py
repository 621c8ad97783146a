"""The model, and pictures with their captions."""

import math
from pathlib import Path

from trainer.kohya import dataset
from trainer.kohya.reading import ScriptOptions
from trainer.kohya.translation import Translation, number


def model(given: ScriptOptions, made: Translation) -> None:
    """Where the model is, and the dtypes of its parts."""
    path = given.take("pretrained_model_name_or_path")
    if path is None:
        made.note("model.path: add it; there is no pretrained_model_name_or_path")
    else:
        made.set("model.path", path)
    if (tokens := given.take_on("max_token_length")) is not None:
        made.set("model.prompt_chunks", round(number("max_token_length", tokens) / 75))
    skip = given.take_on("clip_skip")
    if skip is not None and made.family != "sdxl":  # their scripts for SDXL do not read it
        made.set("model.clip_skip", round(number("clip_skip", skip)) - 1)
    _precision(given, made)


def _precision(given: ScriptOptions, made: Translation) -> None:
    mixed = given.take("mixed_precision", "no")
    half = [name for name in ("full_bf16", "full_fp16") if given.take(name)]
    if mixed == "fp16" or half == ["full_fp16"]:
        made.note("fp16: bf16 here, with the same memory and without a loss scale")
    if mixed == "no" and not half:
        made.set("model.dtype", "float32")
    elif not made.is_lora and not half:
        made.set("model.dtype", "float32")
        made.set("model.compute", "bfloat16")
    fp8 = [name for name in ("fp8_base", "fp8_base_unet") if given.take(name)]
    if fp8 and made.is_lora:
        made.set("model.quantization", "int8")
        made.note(f"{fp8[0]}: 8-bit integers with a scale for each block, here")


def pictures(given: ScriptOptions, made: Translation) -> None:
    """Where pictures are, and how they are cut to size."""
    _sources(given, made)
    has_buckets = bool(given.take("enable_bucket"))
    keeps_small = bool(given.take("bucket_no_upscale")) and has_buckets
    side = _side(given, made, has_buckets)
    made.set("data.buckets", has_buckets)
    made.set("data.upscale", not keeps_small)
    low, high = (
        number(name, given.take(name, usual))
        for name, usual in (("min_bucket_reso", 256), ("max_bucket_reso", 1024))
    )
    # Sides of pictures of up to 4:1, as data.max_aspect is, are half to twice the square's.
    if has_buckets and not keeps_small and (low > side / 2 or high < side * 2):
        made.note(
            f"min_bucket_reso, max_bucket_reso: theirs are {low:g} and {high:g}, which makes long "
            "pictures smaller; data.max_aspect bounds sides here"
        )
    if given.take("cache_latents_to_disk") or given.take("cache_text_encoder_outputs_to_disk"):
        made.set("data.cache", str(Path(str(given.options.get("output_dir", "."))) / "cache"))


def _sources(given: ScriptOptions, made: Translation) -> None:
    weight = given.take("prior_loss_weight")
    file, repeats = given.take("dataset_config"), given.take("dataset_repeats")
    if file is not None:
        sources, options, notes = dataset.from_file(Path(str(file)))
        given.options |= options
        made.notes += notes
    else:
        sources = dataset.from_folders(given)
        if given.options.get("in_json") is None:
            made.set("data.kohya_folders", True)
        elif repeats is not None:
            sources = [source | {"repeats": repeats} for source in sources]
    sources = dataset.weighted(sources, weight)
    if not sources:
        made.note("data.path: add it; there is neither train_data_dir nor dataset_config")
    elif sources == [{"path": sources[0]["path"]}]:
        made.set("data.path", sources[0]["path"])
    else:
        made.set("data.sources", sources)


def _side(given: ScriptOptions, made: Translation, has_buckets: bool) -> int:
    """The side of a square of about the same area: of 1024, "1024,1024" or [832, 1216]."""
    size = given.take("resolution")
    if size is None:
        return 1024 if made.family == "sdxl" else 512
    sides = size if isinstance(size, list) else str(size).split(",")
    numbers = [number("resolution", side) for side in sides]
    if len({*numbers}) > 1 and has_buckets:
        made.note("resolution: pictures have the area of these sides, and their own shape")
    elif len({*numbers}) > 1:
        made.note("resolution: squares of that area here; data.buckets=true keeps pictures' shapes")
    side = 8 * round(math.prod(numbers) ** (1 / len(numbers)) / 8)
    made.set("data.resolution", side)
    return side


def captions(given: ScriptOptions, made: Translation) -> None:
    """How captions are read and changed."""
    made.set("data.caption_dropout", given.take("caption_dropout_rate", 0))
    is_in_table = "in_json" in given.options or "metadata_file" in given.options
    extension = given.take("caption_extension", None if is_in_table else ".caption")
    if extension is not None:
        made.set("data.caption_extension", extension)
    prefix, suffix = given.take("caption_prefix"), given.take("caption_suffix")
    if prefix is not None:
        made.set("data.caption_prefix", f"{prefix} ")
    if suffix is not None:
        made.set("data.caption_suffix", f" {suffix}")
