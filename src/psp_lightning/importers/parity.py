"""Prove an import: compare what the imported network gives with what the original gave."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from psp_lightning.importers.imports import import_file
from psp_lightning.importers.report import Imported
from psp_lightning.models.psp import PSP
from psp_lightning.models.stylegan2 import Noise
from psp_lightning.utils.errors import UserError

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
INPUTS = ("z", "w", "w_plus", "source")
RELATIVE = 1e-4  # of float values, to the largest of them
LEVELS = 1.0  # of 256, mean over an image of 8 bits: room for the float16 and the rounding of the original
LIMIT = 1 << 31  # bytes of the given values


@dataclass(frozen=True)
class Comparison:
    """The largest and the mean difference of one quantity, and the bound on `measured`."""

    name: str
    largest: float
    mean: float
    bound: float
    measured: str
    unit: str

    @property
    def agrees(self) -> bool:
        """Tell whether the difference is within its bound."""
        return (self.largest if self.measured == "largest" else self.mean) <= self.bound

    def __str__(self) -> str:
        verdict = "agrees" if self.agrees else "DIFFERS"
        return (
            f"{self.name}: {verdict}, largest difference {self.largest:.3g}, mean {self.mean:.3g} "
            f"({self.measured} allowed: {self.bound:.3g}{self.unit})"
        )


def parity(
    file: str | os.PathLike[str],
    against: str | os.PathLike[str],
    seed: int = 0,
    psi: float = 1.0,
    tolerance: float | None = None,
    label: int | None = None,
) -> list[Comparison]:
    """Compare a network with given values.

    Args:
        file: anything that `import_file` reads.
        against: an `.npz` with one of `z` (B, z_dim), `w` (B, style_dim), `w_plus` (B, n_styles, style_dim), `source`
            (B, C, H, W; pSp networks), with `image` (B, C, H, W) float in about [-1, 1], or uint8 with the channels
            first or last; besides `z` also `w`; `psi` as a number, `noise` as `const` or `none`. Or an image of
            NVIDIA's `generate.py --seeds=SEED --trunc=PSI --noise-mode=const`.
        seed: of an image: z is `RandomState(seed).randn(1, z_dim)`.
        psi: truncation towards the average latent, where the file has none.
        tolerance: of float values, relative to the largest (default 1e-4); of 8-bit ones, mean difference in levels of
            256 (default 1).
        label: class of a conditional NVIDIA generator, as in `import_file`.

    Raises:
        UserError: values that are missing or do not fit the network.
    """
    imported, path = import_file(file, label), Path(against).expanduser()
    if path.suffix.lower() in IMAGES:
        z = np.random.RandomState(seed).randn(1, imported.generator.z_dim)
        values: dict[str, Any] = {"z": z, "image": _read_image(path), "psi": psi}
    else:
        values = {"psi": psi, **_read_npz(path)}
        for name, value in values.items():
            kind = "U" if name == "noise" else "fiu"
            array = np.asarray(value)
            if array.dtype.kind not in kind or not array.size or (kind == "fiu" and not np.isfinite(array).all()):
                raise UserError(f"against={path}: {name} is empty, not finite, or of a wrong type ({array.dtype}).")
        if np.asarray(values["psi"]).size > 1:
            raise UserError(f"against={path}: psi is one number, not {np.asarray(values['psi']).size}.")
    computed = _compute(imported, values, path)
    return [_compare(name, computed[name], np.asarray(values[name]), tolerance, path) for name in computed]


def _read_image(path: Path) -> np.ndarray:
    try:
        with Image.open(path) as image:
            grey = image.mode in ("L", "1", "I", "F")
            pixels = np.array(image.convert("L" if grey else "RGB"))
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise UserError(f"against={path} cannot be read as an image: {error}.") from None
    return pixels[None, :, :, None] if grey else pixels[None]


def _read_npz(path: Path) -> dict[str, Any]:
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > LIMIT:
                raise UserError(f"against={path} would unpack to more than {LIMIT >> 30} GiB: give fewer images.")
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files if name in (*INPUTS, "image", "psi", "noise")}
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"against={path} does not exist.") from None
    except Exception as error:  # a damaged archive fails in many ways
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"against={path} is no .npz of arrays, or it is damaged ({reason[:200]}).") from None


@torch.no_grad()
def _compute(imported: Imported, values: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    """Compute what the network gives for the inputs: `image`, and `w` where z and w are given."""
    generator = imported.generator
    given = [name for name in INPUTS if name in values and not (name == "w" and "z" in values)]
    if len(given) != 1:
        raise UserError(f"against={path}: it needs exactly one of {', '.join(INPUTS)}; it has {given or 'none'}.")
    if "image" not in values and not (given == ["z"] and "w" in values):
        raise UserError(f"against={path}: it lacks 'image', what the original gave.")
    name = given[0]
    x = torch.from_numpy(np.array(values[name], dtype=np.float32))
    mode = str(values.get("noise", "const"))
    if mode not in ("const", "none"):
        raise UserError(f"against={path}: noise={mode!r}; comparable are 'const' (the stored maps) and 'none'.")
    noise: Noise = "const" if mode == "const" else [torch.zeros(1, 1, side, side) for side in generator.noise_sides()]
    result: dict[str, Tensor] = {}
    if name == "source":
        if not isinstance(imported.net, PSP):
            raise UserError(f"against={path}: it has 'source', but the file holds a generator without an encoder.")
        codes = imported.net.encode(x)
    else:
        psi = float(np.asarray(values["psi"]).item())
        if name == "z":
            x = generator.mapping(x)
            if psi != 1 and x.ndim == 2:
                average = imported.latent_avg if not isinstance(imported.net, PSP) else imported.net.latent_avg
                average = generator.latent_average() if average is None else average
                x = generator.truncate(x if average.ndim == 1 else x[:, None], average, psi)
            if "w" in values:
                result["w"] = x
        codes = x
    if "image" in values:
        result["image"] = torch.cat([generator.synthesis(row, noise) for row in codes.split(1)])
    return result


def _compare(name: str, found: Tensor, given: np.ndarray, tolerance: float | None, path: Path) -> Comparison:
    if given.dtype == np.uint8:
        if given.ndim == 4 and given.shape[1:] != tuple(found.shape[1:]) and given.shape[-1] == found.shape[1]:
            given = given.transpose(0, 3, 1, 2)
        pixels = (found * 127.5 + 128).clamp(0, 255).to(torch.uint8)
        difference = (pixels.double() - _tensor(given, found, name, path)).abs()
        bound, measured, unit = (LEVELS if tolerance is None else tolerance), "mean", " of 256 levels"
    else:
        wanted = _tensor(given, found, name, path)
        difference = (found.double() - wanted).abs()
        bound = (RELATIVE if tolerance is None else tolerance) * max(1.0, float(wanted.abs().max()))
        measured, unit = "largest", ""
    return Comparison(name, float(difference.max()), float(difference.mean()), bound, measured, unit)


def _tensor(given: np.ndarray, found: Tensor, name: str, path: Path) -> Tensor:
    if tuple(given.shape) != tuple(found.shape) or given.dtype.kind not in "fiu":
        raise UserError(
            f"against={path}: its {name} has shape {tuple(given.shape)} ({given.dtype}), the network gives "
            f"{tuple(found.shape)}."
        )
    return torch.from_numpy(given.astype(np.float64))
