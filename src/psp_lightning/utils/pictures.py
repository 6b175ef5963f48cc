"""Decode pictures, always in the same way: upright, and as 8-bit RGB or grey.

The EXIF orientation is applied, 16-bit values are divided by 257, palettes are resolved, transparency is composited
over white, and Pillow converts CMYK and other modes. Only the first frame of an animation is used.
"""

from __future__ import annotations

import os

import numpy as np
from PIL import Image, ImageOps

from psp_lightning.utils.errors import UserError

ImageLike = str | os.PathLike[str] | Image.Image


def open_image(source: ImageLike, what: str = "image") -> Image.Image:
    """Decode a picture and apply its EXIF orientation. The result knows its `format` and `filename`.

    Args:
        source: path or PIL image.
        what: noun for messages.

    Raises:
        UserError: if the file is missing, truncated or not an image. The message names it.
    """
    try:
        if isinstance(source, Image.Image):
            _scale_transparent_value(source)
            picture = ImageOps.exif_transpose(source)
            picture.format = source.format
        else:
            with Image.open(source) as image:
                _scale_transparent_value(image)
                image.load()
                ImageOps.exif_transpose(image, in_place=True)  # a copy of a large photo would double the memory
                picture = image
    except FileNotFoundError:
        raise UserError(f"{what.capitalize()} {source} does not exist.") from None
    except Exception as error:  # Pillow's readers fail in many ways on damaged files
        raise UserError(f"Cannot read {what} {name_of(source)}: {error}. Replace or remove the file.") from None
    picture.filename = name_of(source)  # type: ignore[attr-defined]
    return picture


def _scale_transparent_value(image: Image.Image) -> None:
    """Scale the transparent value of a grey PNG with 2 or 4 bits to 8 bits; Pillow's decoder scales only the pixels."""
    tile = getattr(image, "tile", None)  # empty once the pixels are decoded
    if tile and image.format == "PNG" and "transparency" in image.info:
        image.info["transparency"] *= {"L;2": 85, "L;4": 17}.get(tile[0][3], 1)


def name_of(source: ImageLike) -> str:
    """Return the picture's name for messages."""
    return (getattr(source, "filename", "") or "image") if isinstance(source, Image.Image) else os.fspath(source)


def to_rgba(image: Image.Image) -> Image.Image | None:
    """Return a picture with an alpha channel, a transparent colour or a palette with transparency as RGBA, or None."""
    key = image.info.get("transparency")
    if image.mode[0] == "I" and isinstance(key, int):  # Pillow ignores the transparent value of 16-bit grey
        rgba = _to_8bit_grey(image).convert("RGBA")
        rgba.putalpha(Image.fromarray(np.where(np.asarray(image) == key, np.uint8(0), np.uint8(255))))
        return rgba
    if image.mode == "La":
        return image.convert("LA").convert("RGBA")
    if image.mode in ("RGBA", "LA", "PA", "RGBa"):
        return image if image.mode == "RGBA" else image.convert("RGBA")
    if key is None or image.mode not in ("1", "L", "P", "RGB"):
        return None
    if image.mode == "RGB" and max(key) > 255:  # the file has 16 bits per channel; Pillow keeps the upper 8
        image = image.copy()
        image.info["transparency"] = tuple(value >> 8 for value in key)
    return image.convert("RGBA")


def opacity(image: Image.Image) -> np.ndarray | None:
    """Return the opacity of each pixel, uint8 (H, W), or None if every pixel is opaque.

    Alpha channels, transparent palette entries and a single transparent colour (PNG, GIF) count alike.
    """
    rgba = to_rgba(image)
    alpha = None if rgba is None else np.asarray(rgba.getchannel("A"))
    return None if alpha is None or alpha.min() == 255 else alpha


def _to_8bit_grey(image: Image.Image) -> Image.Image:
    """Return 16-bit grey, which Pillow's conversion would clip at 255, divided by 257."""
    wide = image.convert("I")
    low, high = wide.getextrema()
    if low < 0 or high > 65535:  # type: ignore[operator]
        raise UserError(
            f"{name_of(image)}: the pixels range from {low} to {high}, beyond 16 bits. "
            "Save the image with 8 or 16 bits per channel."
        )
    return wide.point([round(value / 257) for value in range(65536)], "L")


def to_8bit(image: Image.Image, mode: str) -> Image.Image:
    """Convert to `RGB` or `L` by the rules in the module's docstring.

    Raises:
        UserError: if the pixels have no defined range.
    """
    if image.mode == "F":
        raise UserError(
            f"{name_of(image)}: floating-point pixels have no defined range. "
            "Save the image with 8 or 16 bits per channel."
        )
    rgba = to_rgba(image)
    if rgba is not None:
        image = rgba
        if image.getextrema()[3][0] < 255:  # type: ignore[index,misc]
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    elif image.mode[0] == "I":
        image = _to_8bit_grey(image)
    elif image.mode in ("P", "LAB"):  # Pillow converts LAB only to RGB
        image = image.convert("RGB")
    return image if image.mode == mode else image.convert(mode)


def open_8bit(source: ImageLike, mode: str) -> Image.Image:
    """Decode a picture, apply its EXIF orientation and convert it to `RGB` or `L`.

    Raises:
        UserError: if the picture cannot be read or converted. The message names the file.
    """
    return to_8bit(open_image(source), mode)
