"""Specs, decoding of odd images, label maps, stores and the dataset's augmentation."""

import os

import numpy as np
import pytest
import torch
from PIL import Image

from psp_lightning.data import labels, transforms
from psp_lightning.data.datasets import TaskDataset
from psp_lightning.data.spec import InputSpec, load_source
from psp_lightning.data.stores import FolderStore, PairLayout, ToyFacesStore
from psp_lightning.utils.errors import UserError


# specs
def test_spec_round_trip_and_channels():
    specs = {
        3: InputSpec("rgb", 64),
        1: InputSpec("sketch"),
        19: InputSpec("labels", n_classes=19, interpolation="legacy_bilinear"),
        4: InputSpec("masked", mask={"kind": "box"}),
    }
    for channels, spec in specs.items():
        assert spec.channels == channels and InputSpec.from_dict(spec.to_dict()) == spec
    lowres = InputSpec("lowres", 64, factors=(2, 4))
    assert lowres.to_dict()["factors"] == [2, 4] and InputSpec.from_dict(lowres.to_dict()) == lowres
    assert InputSpec.from_dict({"kind": "sketch"}).size == 256
    assert InputSpec("labels", label_map=labels.load_label_map().to_dict()).channels == 19


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "lables"}, "Did you mean 'labels'"),
        ({"kind": "labels"}, "n_classes"),
        ({"kind": "lowres", "size": 16, "factors": [32]}, "factor 32"),
        ({"kind": "rgb", "interpolation": "cubic"}, "cubic"),
        ({"kind": "rgb", "sise": 3}, "Did you mean 'size'"),
        ({}, "kind"),
    ],
)
def test_spec_errors(values, message):
    with pytest.raises(UserError, match=message):
        InputSpec.from_dict(values)


# decoding
def test_modes_become_the_same_rgb(tmp_path):
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    base = Image.fromarray(grey)
    expected = transforms.rgb(base.convert("RGB"), 16)
    variants = {
        "L": base,
        "RGBA": base.convert("RGBA"),
        "LA": base.convert("LA"),
        "P": base.convert("P"),
        "16-bit": Image.fromarray(grey.astype(np.uint16) * 257),
    }
    for name, image in variants.items():
        image.save(tmp_path / f"{name}.png")
        assert torch.equal(transforms.rgb(tmp_path / f"{name}.png", 16), expected), name
    base.convert("CMYK").save(tmp_path / "cmyk.tif")
    assert transforms.rgb(tmp_path / "cmyk.tif", 16).shape == (3, 16, 16)


def test_transparent_is_white_and_exif_is_honoured(tmp_path):
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(tmp_path / "a.png")
    assert (transforms.sketch(tmp_path / "a.png", 8) == 1).all()
    image = Image.new("RGB", (8, 8))
    image.paste((255, 255, 255), (0, 0, 8, 4))  # top half
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    image.save(tmp_path / "b.png", exif=exif)
    tensor = transforms.rgb(tmp_path / "b.png", 8)
    assert (tensor[:, 4:] == 1).all() and (tensor[:, :4] == -1).all()


def test_unreadable_images_are_reported_by_name(tmp_path):
    (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    Image.new("RGB", (64, 64)).save(tmp_path / "whole.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:300])
    for name in ("bad.png", "cut.jpg", "none.png"):
        with pytest.raises(UserError, match=name):
            transforms.rgb(tmp_path / name, 8)


# labels
def test_label_ids_outside_the_map(tmp_path):
    ids = np.zeros((8, 8), np.uint8)
    ids[2, 5] = 32
    Image.fromarray(ids).save(tmp_path / "m.png")
    with pytest.raises(UserError, match=r"m\.png: label id 32 at row 2, column 5 \(1 pixel\).*19 classes"):
        load_source(tmp_path / "m.png", InputSpec("labels", 4, 19))


def test_palette_colours_and_gaps(tmp_path):
    ids = np.random.default_rng(0).integers(0, 19, (12, 12)).astype(np.uint8)
    expected = transforms.labels(Image.fromarray(ids), 12, labels.load_label_map())
    palette = Image.fromarray(ids)
    palette.putpalette([7] * 768)
    palette.save(tmp_path / "p.png")
    Image.fromarray(labels.colourise(ids)).save(tmp_path / "c.png")
    for name in ("p.png", "c.png"):
        assert torch.equal(transforms.labels(tmp_path / name, 12, labels.load_label_map()), expected), name
    assert torch.equal(expected.sum(0), torch.ones(12, 12))
    Image.new("RGB", (4, 4), (1, 2, 3)).save(tmp_path / "x.png")
    with pytest.raises(UserError, match=r"x\.png: the colour \(1, 2, 3\)"):
        transforms.labels(tmp_path / "x.png", 4, labels.load_label_map())
    street = labels.LabelMap.from_dict(
        {"classes": [{"id": 7, "name": "road"}, {"id": 300, "name": "sky"}], "ignore": [255]}
    )
    hot = transforms.one_hot(np.array([[7, 300, 255]]), street)
    assert hot[:, 0].tolist() == [[1, 0, 0], [0, 1, 0]]


def test_label_map_errors(tmp_path):
    path = tmp_path / "map.yaml"
    for text, message in (
        ("classes: [", "not a YAML file"),
        ("a: 1", "not a label map"),
        ("classes: [{id: 1, name: a}, {id: 1, name: b}]", "id 1 is given twice"),
        ("classes: [{id: 1, name: a}]\nmirror: [[1, 2]]", "id 2"),
        ("classes: [{id: 1.5, name: a}]", "1.5 is not a whole number"),
        ("classes: [{id: 1, name: a, color: [0, 0, 0.5]}]", "0.5 is not a whole number"),
        ("classes: [{id: 1, name: a}]\nmirror: [[1, 1.2]]", "1.2 is not a whole number"),
        ("classes: [{id: 1, name: a}]\nignore: [254.9]", "254.9 is not a whole number"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=message) as error:
            labels.load_label_map(path)
        assert "map.yaml" in str(error.value)
    with pytest.raises(UserError, match="nowhere.yaml"):
        labels.load_label_map("nowhere.yaml")


# stores and dataset
def photos_folder(folder, n=3, size=20):
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(n):
        Image.fromarray(rng.integers(0, 255, (size, size, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return folder


def dataset(store, spec, layout, **options):
    store.prepare(layout)
    return TaskDataset(store, spec, target_size=options.pop("target_size", 16), **options)


def test_items_depend_on_seed_epoch_and_index_only(tmp_path):
    folder = photos_folder(tmp_path / "a")
    spec = InputSpec("lowres", 16, factors=(1, 2, 4, 8))
    data = dataset(FolderStore(folder), spec, PairLayout("superres"), flip=0.5)
    items = [data[(epoch, 1)] for epoch in range(8)]
    again = [data[(epoch, 1)] for epoch in reversed(range(8))][::-1]
    assert all(torch.equal(a["source"], b["source"]) for a, b in zip(items, again, strict=True))
    assert len({item["source"].numpy().tobytes() for item in items}) > 2
    fixed = dataset(FolderStore(folder), spec, PairLayout("superres"), flip=0.5, train=False)
    assert torch.equal(fixed[(0, 1)]["source"], fixed[(5, 1)]["source"])
    assert torch.equal(fixed[1]["target"], transforms.rgb(folder / "1.png", 16))


def test_flips_are_joint(tmp_path):
    spec = InputSpec("rgb", 16)
    data = dataset(FolderStore(photos_folder(tmp_path / "a")), spec, PairLayout("inversion"), flip=0.5)
    items = [data[(epoch, 0)] for epoch in range(10)]
    assert all(torch.equal(item["source"], item["target"]) for item in items)
    assert len({item["target"].numpy().tobytes() for item in items}) == 2
    # frontalization on a folder: source and target are flipped independently
    data = dataset(FolderStore(tmp_path / "a"), spec, PairLayout("frontalization", "image", "frontal"), flip=0.5)
    data.independent_flip = True
    same = [torch.equal(item["source"], item["target"]) for item in (data[(epoch, 0)] for epoch in range(20))]
    assert 0 < sum(same) < 20


def test_flipped_labels_swap_left_and_right():
    layout = PairLayout("seg2face", "labels")
    plain = dataset(ToyFacesStore(32, 0, 3), InputSpec("labels", 32, 19), layout, target_size=32)
    flipped = dataset(ToyFacesStore(32, 0, 3), plain.spec, layout, target_size=32, flip=1.0)
    a, b = plain[0], flipped[0]
    assert torch.equal(b["target"], a["target"].flip(-1))
    partners = {4: 5, 5: 4, 6: 7, 7: 6, 8: 9, 9: 8}  # eyes, brows and ears
    for channel in range(19):
        expected = a["source"][partners.get(channel, channel)].flip(-1)
        assert torch.equal(b["source"][channel], expected), f"channel {channel}"


def test_folder_store_names_what_is_missing(tmp_path):
    folder = photos_folder(tmp_path / "a")
    with pytest.raises(UserError, match="data.root=DIR"):
        FolderStore().prepare(PairLayout("inversion"))
    with pytest.raises(UserError, match=r"seg2face needs data.source=DIR \(the labels\) and data.target=DIR"):
        FolderStore(target=folder).prepare(PairLayout("seg2face", "labels"))
    with pytest.raises(UserError, match="has no subfolder sketch"):
        FolderStore(folder).prepare(PairLayout("sketch2face", "sketch"))
    with pytest.raises(UserError, match="inpainting makes the holes itself"):
        FolderStore(source=folder, target=folder).prepare(PairLayout("inpainting"))


def test_names_that_are_not_utf8_are_split(tmp_path):
    folder = photos_folder(tmp_path / "a")
    (folder / os.fsdecode(b"caf\xe9.png")).write_bytes(next(folder.iterdir()).read_bytes())
    parts = [FolderStore(folder, part=part) for part in ("train", "val")]
    for store in parts:
        store.prepare(PairLayout("inversion"))
    assert sum(map(len, parts)) == len(list(folder.iterdir()))


def test_toy_store_has_everything():
    for layout in (PairLayout("frontalization", "image", "frontal"), PairLayout("toonify", "image", "toon")):
        data = dataset(ToyFacesStore(32, 0, 3), InputSpec("rgb", 32), layout, target_size=32)
        assert not torch.equal(data[0]["source"], data[0]["target"])
    layout = PairLayout("sketch2face", "sketch")
    data = dataset(ToyFacesStore(32, 0, 3), InputSpec("sketch", 24), layout, target_size=32)
    assert data[0]["source"].shape == (1, 24, 24) and data[0]["path"] == "toyfaces/seed0/000000"
