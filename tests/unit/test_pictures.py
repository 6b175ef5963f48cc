"""Every mode of Pillow: as a picture, as a picture with a hole, as a mask, as a label image."""

from __future__ import annotations

import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from psp_lightning.data.labels import LabelMap, colourise, load_label_map
from psp_lightning.data.masks import as_mask
from psp_lightning.data.spec import InputSpec, load_source
from psp_lightning.data.transforms import read_labels
from psp_lightning.utils.errors import UserError
from psp_lightning.utils.pictures import opacity, open_8bit, open_image

HOLE = np.zeros((8, 8), bool)
HOLE[1:4, 2:7] = True
BYTES = HOLE.astype(np.uint8)


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def with_alpha(colour: str | np.ndarray, alpha: np.ndarray, mode: str = "RGBA") -> Image.Image:
    image = Image.new("RGB", alpha.shape[::-1], colour) if isinstance(colour, str) else Image.fromarray(colour)
    image = image.convert(mode)
    image.putalpha(Image.fromarray(alpha))
    return image


def palette(index: np.ndarray, *colours: tuple[int, int, int]) -> Image.Image:
    image = Image.fromarray(index.astype(np.uint8)).convert("P")
    image.putpalette([value for colour in colours for value in colour])
    return image


# --- a picture with a hole

OPAQUE = np.where(HOLE, 0, 255).astype(np.uint8)
TRANSPARENT = {
    "rgba.png": (with_alpha("red", OPAQUE), {}),
    "la.png": (with_alpha("grey", OPAQUE, "LA"), {}),
    "rgba.webp": (with_alpha("red", OPAQUE), {"lossless": True}),
    "palette index.png": (palette(BYTES, (255, 0, 0), (0, 255, 0)), {"transparency": 1}),
    "palette index.gif": (palette(BYTES, (255, 0, 0), (0, 255, 0)), {"transparency": 1}),
    "palette bytes.png": (palette(BYTES, (255, 0, 0), (0, 255, 0)), {"transparency": b"\xff\x20"}),
    "colour.png": (
        Image.fromarray(np.where(HOLE[..., None], (0, 255, 0), (255, 0, 0)).astype(np.uint8)),
        {"transparency": (0, 255, 0)},
    ),
    "grey.png": (Image.fromarray(BYTES * 99), {"transparency": 99}),
    "1 bit.png": (Image.fromarray(HOLE), {"transparency": 255}),
    "16 bit.png": (Image.fromarray(BYTES.astype(np.uint16) * 999), {"transparency": 999}),
}


@pytest.mark.parametrize("name", TRANSPARENT)
def test_transparency_is_the_hole(name: str, tmp_path: Path) -> None:
    image, options = TRANSPARENT[name]
    image.save(tmp_path / name, **options)
    source = load_source(tmp_path / name, InputSpec("masked", 8, mask={"kind": "box"}))
    assert np.array_equal(source[3].numpy(), HOLE)
    assert (source[:3, HOLE] == 0).all()
    assert (np.asarray(open_8bit(tmp_path / name, "RGB"))[HOLE] >= 223).all(), "elsewhere it is on white"


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1", "CMYK", "RGBA", "LA", "I;16"])
def test_opaque_pictures_get_the_drawn_hole(mode: str) -> None:
    image = with_alpha("red", OPAQUE | 255, mode) if mode in ("RGBA", "LA") else Image.new(mode, (8, 8))
    assert opacity(image) is None
    assert load_source(image, InputSpec("masked", 8, mask={"kind": "half", "side": "left"}))[3].sum() == 32


def test_16_bits_per_channel_have_a_transparent_colour_of_16_bits() -> None:
    image = Image.fromarray(np.where(HOLE[..., None], (0, 128, 0), (255, 0, 0)).astype(np.uint8))
    image.info["transparency"] = (0, 128 * 257, 0)  # as Pillow reads it from such a PNG
    alpha = opacity(image)
    assert alpha is not None and np.array_equal(alpha < 128, HOLE)


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("opened", [False, True])
def test_grey_of_2_and_4_bits(bits: int, opened: bool, tmp_path: Path) -> None:
    """The transparent value in the file has as many bits as the pixels. Pillow does not write such files."""
    value, size = 2**bits - 1, HOLE.shape[0]
    samples = np.unpackbits(np.where(HOLE, value, 1).astype(np.uint8)[..., None], axis=-1)[..., 8 - bits :]
    rows = np.packbits(samples.reshape(size, -1), axis=-1)
    chunks = {
        b"IHDR": struct.pack(">IIBBBBB", size, size, bits, 0, 0, 0, 0),
        b"tRNS": struct.pack(">H", value),
        b"IDAT": zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows)),
        b"IEND": b"",
    }
    with (tmp_path / "a.png").open("wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        for name, content in chunks.items():
            file.write(struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content)))
    source = load_source(
        Image.open(file.name) if opened else file.name, InputSpec("masked", size, mask={"kind": "box"})
    )
    assert np.array_equal(source[3].numpy(), HOLE)


# --- a mask

WHITE = BYTES * 255
GREY = np.repeat(WHITE[..., None], 3, -1)
MASKS = {
    "L": Image.fromarray(WHITE),
    "L of 0 and 1": Image.fromarray(BYTES),
    "1": Image.fromarray(HOLE),
    "P": palette(BYTES, (0, 0, 0), (255, 255, 255)),
    "P without a palette": Image.fromarray(WHITE).convert("P"),
    "RGB": Image.fromarray(GREY),
    "RGB with noise": Image.fromarray(np.abs(GREY.astype(int) - [0, 9, 20]).astype(np.uint8)),
    "YCbCr": Image.fromarray(GREY).convert("YCbCr"),
    "HSV": Image.fromarray(GREY).convert("HSV"),
    "CMYK": Image.fromarray(GREY).convert("CMYK"),
    "LA": Image.fromarray(WHITE).convert("LA"),
    "La": Image.fromarray(WHITE).convert("LA").convert("La"),
    "RGBA": Image.fromarray(GREY).convert("RGBA"),
    "RGBa": Image.fromarray(GREY).convert("RGBA").convert("RGBa"),
    "PA": palette(BYTES, (0, 0, 0), (255, 255, 255)).convert("PA"),
    "I;16 of 16 bits": Image.fromarray(WHITE.astype(np.uint16) * 257),
    "I;16 of 0 and 255": Image.fromarray(WHITE.astype(np.uint16)),
    "I;16 of 0 and 1": Image.fromarray(BYTES.astype(np.uint16)),
    "I of 0 and 255": Image.fromarray(WHITE.astype(np.int32)),
    "F of 0 and 1": Image.fromarray(BYTES.astype(np.float32)),
    "F of 0 and 255": Image.fromarray(WHITE.astype(np.float32)),
    "white paint": with_alpha("white", WHITE),
    "black paint": with_alpha("black", WHITE),
    "red paint": with_alpha("red", WHITE),
    "grey paint": with_alpha("grey", WHITE, "LA"),
    "white on hidden black": with_alpha(GREY, WHITE),
}


@pytest.mark.parametrize("mode", MASKS)
def test_masks_of_every_mode(mode: str) -> None:
    assert np.array_equal(as_mask(MASKS[mode], 8), HOLE)


def test_masks_that_are_empty_or_everything() -> None:
    assert not as_mask(Image.new("L", (4, 4)), 4).any() and as_mask(Image.new("RGB", (4, 4), "white"), 4).all()
    assert not as_mask(np.zeros((4, 4), np.uint16), 4).any()


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (palette(BYTES, (0, 0, 0), (128, 0, 0)), "it has colours"),
        (Image.new("RGB", (8, 8), "yellow"), "it has colours"),
        (with_alpha(GREY, np.roll(WHITE, 1)), "transparent pixels and several tones"),
        (with_alpha("white", WHITE * 0), "all of it is transparent"),
        (Image.fromarray(BYTES * 2), "brightest pixel, 2 of 255, is in the lower half"),
        (Image.fromarray(WHITE.astype(np.uint16) * 16), "brightest pixel, 4080 of 65535"),
        (Image.fromarray(WHITE.astype(np.float32) - 9), "values from -9 to 246"),
        (Image.fromarray(WHITE.astype(np.float32) * np.nan), "values from nan"),
        (Image.fromarray(WHITE.astype(np.int32) * 1000), "values from 0 to 255000"),
    ],
)
def test_masks_without_a_reading(image: Image.Image, message: str, tmp_path: Path) -> None:
    path = tmp_path / "m.tif"
    image.save(path)
    with pytest.raises(UserError, match=rf"Mask .*m\.tif: .*{message}.*white is missing"):
        as_mask(path, 8)


# --- a picture


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (Image.new("F", (4, 4), 0.5), "floating-point pixels have no defined range"),
        (Image.new("I", (4, 4), 70000), "range from 70000 to 70000, beyond 16 bits"),
    ],
)
def test_pictures_without_a_reading_are_named(image: Image.Image, message: str, tmp_path: Path) -> None:
    image.save(tmp_path / "p.tif")
    with pytest.raises(UserError, match=rf"p\.tif: .*{message}"):
        open_8bit(tmp_path / "p.tif", "RGB")


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_lab_is_a_picture(mode: str, tmp_path: Path) -> None:
    Image.new("LAB", (4, 4), (255, 128, 128)).save(tmp_path / "p.tif")
    assert np.asarray(open_8bit(tmp_path / "p.tif", mode)).min() > 250


def test_opener_keeps_format_and_name(tmp_path: Path) -> None:
    Image.new("L", (4, 4)).save(tmp_path / "p.png")
    image = open_image(tmp_path / "p.png")
    assert (image.format, image.filename) == ("PNG", str(tmp_path / "p.png"))  # type: ignore[attr-defined]


# --- a label image

IDS = np.random.default_rng(0).integers(0, 19, (32, 32)).astype(np.uint8)
STREET = LabelMap.from_dict(
    {
        "classes": [{"id": i, "name": str(i), "color": color} for i, color in enumerate(([9, 9, 9], [0, 0, 200]))],
        "ignore": [255],
    }
)
IGNORED = np.where(HOLE, 255, 1).astype(np.uint8)


@pytest.mark.parametrize("shape", ["L", "RGB", "RGBA"])
def test_ignored_ids_in_grey_and_in_rgb(shape: str) -> None:
    assert np.array_equal(read_labels(Image.fromarray(IGNORED).convert(shape), STREET), IGNORED)
    one_hot = load_source(
        Image.fromarray(IGNORED).convert(shape), InputSpec("labels", 8, 2, label_map=STREET.to_dict())
    )
    assert np.array_equal(one_hot.sum(0).numpy(), ~HOLE)


def test_grey_rgb_outside_the_map_is_an_id() -> None:
    with pytest.raises(UserError, match=r"label id 7 at row 0, column 0 \(1 pixel\)"):
        load_source(Image.new("RGB", (1, 1), (7, 7, 7)), InputSpec("labels", 8, 2, label_map=STREET.to_dict()))


def test_grey_colours_of_the_map_stay_colours() -> None:
    assert (read_labels(Image.new("RGB", (4, 4), (9, 9, 9)), STREET) == 0).all()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a.jpg", {}),
        ("a.jpg", {"quality": 100}),
        ("a.webp", {"quality": 90}),
        ("a.tif", {"compression": "jpeg"}),
        ("a.jp2", {}),
    ],
)
def test_lossy_label_images_are_rejected(name: str, options: dict, tmp_path: Path) -> None:
    Image.fromarray(IDS).convert("RGB" if name.endswith("webp") else "L").save(tmp_path / name, **options)
    with pytest.raises(UserError, match=rf"{name}: compression .* changes label ids. Save label images as PNG"):
        read_labels(tmp_path / name, load_label_map())


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.bmp", "a.pgm", "a.tga", "a.gif", "a.webp"])
def test_lossless_label_images(name: str, tmp_path: Path) -> None:
    image = Image.fromarray(IDS)
    image.convert("RGB" if name.endswith("webp") else "L").save(tmp_path / name, lossless=True)
    assert np.array_equal(read_labels(tmp_path / name, load_label_map()), IDS)


@pytest.mark.parametrize("name", ["a.png", "a.gif", "a.bmp", "a.tif"])
def test_palette_of_the_maps_colours_is_read_by_colour(name: str, tmp_path: Path) -> None:
    Image.fromarray(colourise(IDS)).convert("P", palette=Image.Palette.ADAPTIVE, colors=32).save(tmp_path / name)
    with Image.open(tmp_path / name) as image:
        assert image.mode == "P" and not np.array_equal(np.asarray(image), IDS), "the palette is not in another order"
    assert np.array_equal(read_labels(tmp_path / name, load_label_map()), IDS)


def test_palette_index_is_the_id_if_the_colours_are_others(tmp_path: Path) -> None:
    palette(IDS, *((i * 12, 255 - i, 7) for i in range(19))).save(tmp_path / "a.png")
    assert np.array_equal(read_labels(tmp_path / "a.png", load_label_map()), IDS)
    palette(IDS, *((i * 12, 255 - i, 7) for i in range(19))).save(tmp_path / "a.gif")
    with pytest.raises(UserError, match=r"a\.gif: GIF files renumber"):
        read_labels(tmp_path / "a.gif", load_label_map())


def test_palettes_that_contradict_themselves(tmp_path: Path) -> None:
    grey = np.where(HOLE, 3, 7)
    palette(HOLE, (7, 7, 7), (3, 3, 3)).save(tmp_path / "a.png")  # grey ids, packed by an optimizer
    with pytest.raises(UserError, match=r"a\.png: palette index 0 has the colour of class 7"):
        read_labels(tmp_path / "a.png", load_label_map())
    palette(HOLE, (7, 7, 7), (3, 3, 3)).save(tmp_path / "a.gif")
    assert np.array_equal(read_labels(tmp_path / "a.gif", load_label_map()), grey)
    palette(HOLE, (1, 2, 3), (204, 0, 0)).save(tmp_path / "b.png")
    assert np.array_equal(read_labels(tmp_path / "b.png", load_label_map()), HOLE), "index 1 has its own colour"
    palette(HOLE, (204, 0, 0), (1, 2, 3)).save(tmp_path / "b.png")
    with pytest.raises(UserError, match="palette index 0 has the colour of class 1"):
        read_labels(tmp_path / "b.png", load_label_map())


def test_float_label_images_need_whole_numbers(tmp_path: Path) -> None:
    Image.fromarray(IDS.astype(np.float32)).save(tmp_path / "a.tif")
    assert np.array_equal(read_labels(tmp_path / "a.tif", load_label_map()), IDS)
    for wrong in (IDS * 0.99, np.where(IDS > 3, np.nan, 0), np.where(IDS > 3, np.inf, 0)):
        Image.fromarray(wrong.astype(np.float32)).save(tmp_path / "a.tif")
        with pytest.raises(UserError, match=r"a\.tif: the pixels are not whole numbers"):
            read_labels(tmp_path / "a.tif", load_label_map())


@pytest.mark.parametrize("number", [10**12, -1, 65534])
def test_ids_out_of_range_are_a_message(number: int) -> None:
    with pytest.raises(UserError, match=rf"id {number} is outside 0\.\.65533"):
        LabelMap.from_dict({"classes": [{"id": number, "name": "a"}]})


@pytest.mark.parametrize(
    ("classes", "message"), [([], "no classes"), ([{"id": float("inf"), "name": "a"}], "infinity")]
)
def test_label_maps_without_ids(classes: list, message: str) -> None:
    with pytest.raises(UserError, match=f"not a label map .*{message}"):
        LabelMap.from_dict({"classes": classes})
    with pytest.raises(UserError, match="n_classes=1000000000000"):
        LabelMap.numbered(10**12)
