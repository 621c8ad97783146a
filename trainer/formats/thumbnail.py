"""A picture in a file's metadata, `modelspec.thumbnail`: a data URL of a small JPEG."""

import base64
import io
from pathlib import Path

from PIL import Image, ImageOps

from trainer.errors import UserError, reason

_SIDE = 256  # pixels, which modelspec recommends


def data_url(given: str) -> str:
    """A data URL for the picture file of this path; a data URL is returned as it is.

    Raises UserError if the file cannot be read.
    """
    if given.startswith("data:image/"):
        return given
    try:
        with Image.open(Path(given).expanduser()) as picture:
            small = ImageOps.exif_transpose(picture).convert("RGB")
    except Exception as error:  # a decoder may raise any
        raise UserError(
            f"method.metadata.thumbnail={given} cannot be read: {reason(error)}"
        ) from error
    small.thumbnail((_SIDE, _SIDE))
    content = io.BytesIO()
    small.save(content, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}"
