"""From a picture's bytes to what the VAE sees: upright, sRGB, 8 bits, on a known background.

Everything is decoded from bytes, so paths may contain any character.
"""

import io
import math
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError
from torch import Tensor

from trainer.data.buckets import Fit, Size

Image.MAX_IMAGE_PIXELS = None  # `decode` enforces data.max_pixels instead

_SRGB = ImageCms.createProfile("sRGB")
_ALPHA = {"RGBA", "LA", "PA", "RGBa", "La"}


@dataclass(kw_only=True)
class Picture:
    """A decoded picture."""

    rgb: Image.Image
    alpha: Image.Image | None  # mode L; 255 is opaque
    notes: list[str] = field(default_factory=list)  # what was ignored in the file

    @property
    def size(self) -> Size:
        return self.rgb.height, self.rgb.width

    @property
    def is_transparent(self) -> bool:
        """Whether any pixel is not fully opaque."""
        return self.alpha is not None and self.alpha.getextrema() != (255, 255)


def decode(content: bytes, max_pixels: int, background: str = "white") -> Picture:
    """The first frame, rotated by its EXIF orientation, in sRGB, composited over `background`.

    Raises whatever Pillow's decoders raise for damaged bytes, and ValueError for a picture that is
    too large or whose pixel values have no defined range.
    """
    if not content:
        raise ValueError("the file is empty")
    try:
        opened = Image.open(io.BytesIO(content))
    except UnidentifiedImageError:
        raise ValueError("it is not in a picture format that Pillow reads") from None
    with opened as file:
        if file.width * file.height > max_pixels:
            raise ValueError(
                f"it has {file.width} x {file.height} pixels, more than "
                f"data.max_pixels={max_pixels}"
            )
        notes = ["more than one frame; the first is used"] if _is_animated(file) else []
        kind, image = file.format, _upright(file, notes)
    image = _eight_bits(image, kind)
    alpha = None
    if image.mode in _ALPHA or "transparency" in image.info:
        profile = image.info.get("icc_profile")
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
        opaque = _srgb(image.convert("RGB"), profile, notes)
        opaque.putalpha(alpha)
        behind = Image.new("RGBA", image.size, background)
        rgb = Image.alpha_composite(behind, opaque).convert("RGB")
    else:
        rgb = _srgb(image, image.info.get("icc_profile"), notes)
    return Picture(rgb=rgb, alpha=alpha, notes=notes)


def pixels(rgb: Image.Image, fit: Fit) -> Tensor:
    """A picture, cropped and resized to its bucket: -> fp32 (3, h, w) in [-1, 1]."""
    resized = _cropped(rgb, fit, Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(resized, dtype=np.float32)).permute(2, 0, 1) / 127.5 - 1


def mask(grey: Image.Image, fit: Fit) -> Tensor:
    """A mask, cropped and resized like its picture: -> fp32 (1, h, w) in [0, 1]."""
    resized = _cropped(grey.convert("L"), fit, Image.Resampling.BOX)  # no overshoot
    return torch.from_numpy(np.array(resized, dtype=np.float32))[None] / 255


def decode_mask(content: bytes, size: Size, max_pixels: int) -> Image.Image:
    """A mask file for a picture of this size, as grey values.

    Raises ValueError if its aspect ratio is not the picture's.
    """
    grey = decode(content, max_pixels).rgb.convert("L")
    if abs(math.log(grey.width / grey.height * size[0] / size[1])) > 0.02:
        raise ValueError(
            f"its mask is {grey.width} x {grey.height} pixels, which does not match the picture, "
            f"{size[1]} x {size[0]}"
        )
    return grey


def is_black(grey: Image.Image) -> bool:
    """Whether every pixel of a mask, or of an alpha channel, is 0."""
    return grey.getextrema() == (0, 0)


def _cropped(image: Image.Image, fit: Fit, how: Image.Resampling) -> Image.Image:
    """Resize the largest crop of the bucket's aspect ratio to the bucket, antialiased."""
    bucket = fit.bucket
    if image.width * bucket[0] >= image.height * bucket[1]:
        height: float = image.height
        width: float = image.height * bucket[1] / bucket[0]
    else:
        height, width = image.width * bucket[0] / bucket[1], image.width
    left, top = (image.width - width) * fit.place, (image.height - height) * fit.place
    box = (left, top, left + width, top + height)
    return image.resize((bucket[1], bucket[0]), how, box=box)


def _is_animated(file: Image.Image) -> bool:
    """Whether it has several frames or pages; the extra picture in a phone's MPO does not count."""
    return getattr(file, "n_frames", 1) > 1 and file.format != "MPO"


def _upright(file: Image.Image, notes: list[str]) -> Image.Image:
    file.load()
    try:
        return ImageOps.exif_transpose(file)
    except Exception:  # damaged EXIF makes Pillow's parser raise almost anything
        notes.append("unreadable EXIF data; not rotated")
        return file.copy()


def _eight_bits(image: Image.Image, kind: str | None) -> Image.Image:
    """Scale 16-bit pixels to 8 bits; Pillow's own conversion would clip them."""
    if image.mode.startswith("I;16") or (image.mode == "I" and kind == "PNG"):
        values = np.asarray(image, dtype=np.float32)
        grey = Image.fromarray((values / 257).round().astype("uint8"))
        if "icc_profile" in image.info:
            grey.info["icc_profile"] = image.info["icc_profile"]
        if isinstance(key := image.info.get("transparency"), int):
            opaque = Image.fromarray(np.where(values == key, 0, 255).astype("uint8"))
            return Image.merge("LA", (grey, opaque))
        return grey
    if image.mode in ("I", "F"):
        raise ValueError(f"{image.mode} pixels (32 bits) have no defined range; save it as 8 bits")
    return image


def _srgb(image: Image.Image, profile: bytes | None, notes: list[str]) -> Image.Image:
    """Convert to sRGB, using the file's colour profile if it has one."""
    if not profile:
        return image.convert("RGB")
    if image.mode not in ("RGB", "L", "CMYK", "LAB"):
        image = image.convert("RGB")
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if ImageCms.getProfileDescription(source).startswith("sRGB"):
            return image.convert("RGB")
        converted = ImageCms.profileToProfile(image, source, _SRGB, outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError):
        notes.append("a colour profile that does not fit them; sRGB is assumed")
        return image.convert("RGB")
    assert converted is not None  # None only for in-place conversion
    return converted
