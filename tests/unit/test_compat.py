"""Names and files of version 0.1.0 in the current version."""

import importlib
import runpy
import subprocess
import sys
import warnings

import pytest
import torch
from hydra.utils import get_object

from psp_lightning.data.datamodules import TaskDataModule
from psp_lightning.data.spec import InputSpec
from psp_lightning.data.stores import PairLayout
from psp_lightning.lit import callbacks
from psp_lightning.utils import compat

# Names that README, docs, notebooks and configuration of 0.1.0 imported and that have moved -> their current place.
MOVED = {
    "checkpoints.io.load_generator": "loading.load_generator",
    "checkpoints.io.load_strict": "checkpoints.strict.load_strict",
    "checkpoints.io.read": "checkpoints.read.read",
    "checkpoints.io.save_atomic": "utils.atomic.save_torch",
    "checkpoints.latent_files.read_latents": "latents.files.read_latents",
    "checkpoints.latent_files.save_latents": "latents.files.save_latents",
    "checkpoints.latents.Latents": "latents.codes.Latents",
    "checkpoints.latents.generator_hash": "checkpoints.weight_files.generator_hash",
    "checkpoints.latents.load_decoder": "loading.load_decoder",
    "checkpoints.networks.load_embedding": "loading.load_embedding",
    "checkpoints.networks.save_psp": "checkpoints.weight_files.save_psp",
    "checkpoints.pretrained.shipped": "zoo.locate.shipped",
    "data.stores.View": "data.stores.PairLayout",
    "data.transforms.load_source": "data.spec.load_source",
    "lit.grids.image_grid": "lit.callbacks.image_grids.image_grid",
    "lit.grids.source_to_rgb": "data.spec.source_to_rgb",
    "lit.module.LitPSP": "lit.psp.LitPSP",
    "lit.samples.sample_images": "lit.callbacks.samples.sample_images",
    "models.frozen.freeze": "models.layers.freeze",
}
# The other names that they imported, which have not moved.
KEPT = """
    PSP data.align.align_face data.datamodules.StoreLike data.datamodules.TaskDataModule data.labels.colourise
    data.datamodules.FrontalizationDataModule data.datamodules.InpaintingDataModule
    data.datamodules.InversionDataModule data.datamodules.Seg2FaceDataModule data.datamodules.Sketch2FaceDataModule
    data.datamodules.SuperResDataModule data.datamodules.ToonifyDataModule data.image_sets.FolderImages
    data.image_sets.ToyFacesImages data.pairing.list_images data.spec.InputSpec data.stores.FolderStore
    data.stores.ToyFacesStore data.toyfaces.ToyFaces data.transforms.rgb lit.callbacks.AverageBatchNorm
    lit.callbacks.ImageGrids lit.callbacks.LastCheckpoint losses.LossInputs losses.LossTerm losses.register_loss
    losses.cropped.L2CropLoss losses.cropped.LPIPSCropLoss losses.identity.IDLoss losses.l2.L2Loss
    losses.lpips.LPIPSLoss losses.moco.MocoLoss losses.perceptual.PerceptualLoss losses.w_norm.WNormLoss
    models.encoders.Encoder4Editing models.encoders.EncoderIntoW models.encoders.EncoderIntoWPlus
    models.encoders.GradualStyleEncoder models.encoders.ReStyleEncoder models.encoders.ReStyleEncoder4Editing
    models.registry.register_encoder models.stylegan2.Generator.seeded optim.ranger.Ranger utils.images.to_pil
    utils.memory.keep_freed_memory
""".split()


def attribute(path: str):
    """Return the object at a path below the package, without a warning."""
    module, _, name = f"psp_lightning.{path}".rpartition(".")
    return getattr(importlib.import_module(module), name)


@pytest.mark.parametrize("how", ["import", "_target_"])
@pytest.mark.parametrize("old", MOVED)
def test_a_moved_name_gives_the_new_object_and_one_warning(old: str, how: str) -> None:
    new, scope = attribute(MOVED[old]), {}
    module, _, name = f"psp_lightning.{old}".rpartition(".")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if how == "import":
            exec(compile(f"from {module} import {name} as found", __file__, "exec"), scope)
        else:
            scope["found"] = get_object(f"{module}.{name}")
    assert scope["found"] is new
    ours = [warning for warning in caught if "psp_lightning" in str(warning.message)]
    assert [warning.category for warning in ours] == [DeprecationWarning]
    assert f"{module}.{name} is now psp_lightning.{MOVED[old]};" in str(ours[0].message)
    if how == "import":
        assert ours[0].filename == __file__, "the warning must point at the import"


@pytest.mark.parametrize("path", KEPT)
def test_other_documented_names_have_not_moved(path: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)
        assert get_object(f"psp_lightning.{path}") is not None


def test_unknown_names_are_not_found() -> None:
    with pytest.raises(ImportError, match="cannot import name 'load_all'"):
        from psp_lightning.checkpoints.io import load_all  # noqa: F401
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("psp_lightning.checkpoints.ia")
    with pytest.raises(ImportError, match="cannot import name 'Vista'"):
        from psp_lightning.data.stores import Vista  # noqa: F401


def test_a_module_that_left_the_package_names_its_replacement() -> None:
    """0.1.0's documentation ran it with `python -m`."""
    message = "no longer part of the package.*python -m benchmarks.toyfaces.records"
    with pytest.raises(ModuleNotFoundError, match=message):
        from psp_lightning.checkpoints.release import release  # noqa: F401
    with pytest.raises(ImportError, match=message):
        runpy.run_module("psp_lightning.checkpoints.release")


def test_old_names_cost_nothing_until_they_are_used() -> None:
    code = """
import sys
import psp_lightning, importlib
importlib.reload(psp_lightning)
assert "torch" not in sys.modules, "an import of the package imports torch"
finders = [finder for finder in sys.meta_path if type(finder).__module__ == "psp_lightning.utils.compat"]
assert len(finders) == 1 and finders[0] is sys.meta_path[-1], sys.meta_path
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_state_dicts_of_0_1_0() -> None:
    old = {"average.input.input": 1, "generator.average.x": 2, "path_mean": 3}
    new = {"g_ema.input.input": 1, "generator.average.x": 2, "path_mean": 3}
    assert compat.rename_state(old) == new and compat.rename_state(new) == new


def test_callbacks_keep_the_keys_of_their_states() -> None:
    """A checkpoint stores callback states by name, so a renamed callback would lose its state on a resume."""
    found = {cls.__qualname__ for cls in map(vars(callbacks).get, callbacks.__all__)} - {"step_checkpoints"}
    assert found == {
        "AverageBatchNorm", "Curves", "EpochStart", "ExportGenerator", "Forecast", "ImageGrids", "LastCheckpoint",
        "LossFalls", "ProgressBar", "Pruning", "SampleGrids", "ValidateEvery",
    }  # fmt: skip
    assert callbacks.EpochStart().state_key == "EpochStart"


def test_data_modules_written_for_0_1_0() -> None:
    with pytest.warns(DeprecationWarning, match=r"Colourise.view is now .*Colourise.layout") as caught:

        class Colourise(TaskDataModule):
            view = PairLayout("colourise")

    assert Colourise.layout == PairLayout("colourise") and len(caught) == 1
    assert caught[0].filename == __file__


@pytest.mark.parametrize(
    ("values", "channels"),
    [
        ({"kind": "rgb", "size": 256, "n_classes": 0, "interpolation": "nearest", "factors": [], "label_map": None,
          "mask": {}}, 3),
        ({"kind": "sketch", "size": 64}, 1),
        ({"kind": "labels", "size": 64, "n_classes": 2, "interpolation": "legacy_bilinear", "factors": [],
          "label_map": {"classes": [{"id": 3, "name": "a", "color": [0, 0, 0]}, {"id": 9, "name": "b"}],
                        "mirror": [[3, 9]], "ignore": [255]}, "mask": {}}, 2),
        ({"kind": "lowres", "size": 64, "n_classes": 0, "interpolation": "nearest", "factors": [1, 2, 32],
          "label_map": None, "mask": {}}, 3),
        ({"kind": "masked", "size": 64, "n_classes": 0, "interpolation": "nearest", "factors": [], "label_map": None,
          "mask": {"kind": "box", "low": 0.2, "high": 0.4}}, 4),
    ],
)  # fmt: skip
def test_input_descriptions_of_0_1_0(values: dict, channels: int) -> None:
    spec = InputSpec.from_dict(values)
    assert spec.channels == spec.source.channels == channels
    assert {key: spec.to_dict()[key] for key in values} == values
    assert torch.isfinite(spec.source.to_rgb(torch.zeros(1, channels, 2, 2))).all()
