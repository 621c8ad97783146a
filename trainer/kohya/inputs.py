"""The model, and pictures with their captions."""

import math
from pathlib import Path
from typing import Any

from trainer.kohya import dataset
from trainer.kohya.reading import Given
from trainer.kohya.translation import Translation, number


def model(given: Given, made: Translation) -> None:
    path = given.take("pretrained_model_name_or_path")
    if path is None:
        made.note("model.path: add it; there is no pretrained_model_name_or_path")
    else:
        made.set("model.path", path)
    if (tokens := given.take("max_token_length")) is not None:
        made.set("model.prompt_chunks", round(number("max_token_length", tokens) / 75))
    if (skip := given.take("clip_skip")) is not None:
        if made.family == "sdxl":
            made.note("clip_skip: has no effect on SDXL in their scripts, and is left out")
        else:
            made.set("model.clip_skip", round(number("clip_skip", skip)) - 1)
    _precision(given, made)


def _precision(given: Given, made: Translation) -> None:
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


def pictures(given: Given, made: Translation) -> None:
    _sources(given, made)
    if (size := given.take("resolution")) is not None:
        made.set("data.resolution", _side(size, made))
    made.set("data.buckets", bool(given.take("enable_bucket")))
    made.set("data.upscale", not given.take("bucket_no_upscale"))
    bounds = [name for name in ("min_bucket_reso", "max_bucket_reso") if given.take(name)]
    if bounds and given.options.get("enable_bucket") and "bucket_no_upscale" not in given.options:
        made.note(f"{' and '.join(bounds)}: sides are bounded by data.max_aspect (4) here")
    if given.take("cache_latents_to_disk") or given.take("cache_text_encoder_outputs_to_disk"):
        made.set("data.cache", str(Path(str(given.options.get("output_dir", "."))) / "cache"))


def _sources(given: Given, made: Translation) -> None:
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


def _side(size: Any, made: Translation) -> int:
    """The side of a square of about the same area: of 1024, "1024,1024" or [832, 1216]."""
    sides = size if isinstance(size, list) else str(size).split(",")
    numbers = [number("resolution", side) for side in sides]
    if len({*numbers}) > 1:
        made.note("resolution: pictures have the area of these sides, and their own shape")
    return 8 * round(math.prod(numbers) ** (1 / len(numbers)) / 8)


def captions(given: Given, made: Translation) -> None:
    made.set("data.caption_dropout", given.take("caption_dropout_rate", 0))
    if (misspelt := given.take("caption_extention")) is not None:
        made.set("data.caption_extension", misspelt)
