"""Compare the outputs of an imported network with the outputs of the original."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from psp_lightning.importers.imports import import_file
from psp_lightning.importers.report import Imported
from psp_lightning.models.psp import PSP
from psp_lightning.models.stylegan2 import Noise
from psp_lightning.utils.errors import UserError
from psp_lightning.utils.pictures import open_image, to_8bit

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
INPUTS = ("z", "w", "w_plus", "source")
RELATIVE = 1e-4  # largest difference of float values, relative to the largest value
LEVELS = 1.0  # mean difference of 8-bit images, of 256: allows for float16 and rounding in the original
LIMIT = 1 << 31  # bytes of an unpacked .npz


@dataclass(frozen=True)
class Comparison:
    """The differences of one quantity; `measured` (`largest` or `mean`) must be within `bound`."""

    name: str
    largest: float
    mean: float
    bound: float
    measured: str
    unit: str

    @property
    def agrees(self) -> bool:
        """Whether the difference is within its bound."""
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
    """Compare the outputs of a network with given values.

    Args:
        file: see `import_file`.
        against: an `.npz` with one of `z` (B, z_dim), `w` (B, style_dim), `w_plus` (B, n_styles, style_dim) or, for pSp
            networks, `source` (B, C, H, W); and with `image` (B, C, H, W), float in about [-1, 1], or uint8 with the
            channels first or last. It may also contain `w` beside `z`, a number `psi`, and `noise`: `const` or `none`.
            Or an image of NVIDIA's `generate.py --seeds=SEED --trunc=PSI --noise-mode=const`.
        seed: seed of an image; its z is `RandomState(seed).randn(1, z_dim)`.
        psi: truncation towards the average latent, if the `.npz` does not have it.
        tolerance: for float values, relative to the largest value (default 1e-4); for 8-bit values, the mean
            difference in levels of 256 (default 1).
        label: see `import_file`.

    Raises:
        UserError: values are missing or do not fit the network.
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
            raise UserError(f"against={path}: psi must be one number, not {np.asarray(values['psi']).size}.")
    computed = _compute(imported, values, path)
    return [_compare(name, computed[name], np.asarray(values[name]), tolerance, path) for name in computed]


def _read_image(path: Path) -> np.ndarray:
    image = open_image(path)
    grey = image.mode in ("L", "1", "F") or image.mode[0] == "I"
    pixels = np.array(to_8bit(image, "L" if grey else "RGB"))
    return pixels[None, :, :, None] if grey else pixels[None]


def _read_npz(path: Path) -> dict[str, Any]:
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > LIMIT:
                raise UserError(f"against={path} would unpack to more than {LIMIT >> 30} GiB: use fewer images.")
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files if name in (*INPUTS, "image", "psi", "noise")}
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"against={path} does not exist.") from None
    except Exception as error:  # a damaged archive fails in many ways
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"against={path} is damaged or not an .npz of arrays ({reason[:200]}).") from None


@torch.no_grad()
def _compute(imported: Imported, values: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    """Compute the network's `image` for the inputs, and `w` if both z and w are given."""
    generator = imported.generator
    given = [name for name in INPUTS if name in values and not (name == "w" and "z" in values)]
    if len(given) != 1:
        raise UserError(f"against={path}: it needs exactly one of {', '.join(INPUTS)}; it has {given or 'none'}.")
    if "image" not in values and not (given == ["z"] and "w" in values):
        raise UserError(f"against={path}: it lacks 'image', the output of the original.")
    name = given[0]
    x = torch.from_numpy(np.array(values[name], dtype=np.float32))
    mode = str(values.get("noise", "const"))
    if mode not in ("const", "none"):
        raise UserError(f"against={path}: noise={mode!r} must be 'const' (the stored maps) or 'none'.")
    noise: Noise = "const" if mode == "const" else [torch.zeros(1, 1, side, side) for side in generator.noise_sides()]
    result: dict[str, Tensor] = {}
    if name == "source":
        if not isinstance(imported.net, PSP):
            raise UserError(f"against={path}: it has 'source', but the network is a generator without an encoder.")
        x = imported.net.encode(x)
    elif name == "z":
        x = generator.mapping(x)
        psi = float(np.asarray(values["psi"]).item())
        if psi != 1 and x.ndim == 2:
            average = imported.latent_avg if not isinstance(imported.net, PSP) else imported.net.latent_avg
            average = generator.latent_average() if average is None else average
            x = generator.truncate(x if average.ndim == 1 else x[:, None], average, psi)
        if "w" in values:
            result["w"] = x
    if "image" in values:
        result["image"] = torch.cat([generator.synthesis(row, noise) for row in x.split(1)])
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
            f"against={path}: its {name} has shape {tuple(given.shape)} ({given.dtype}), but the network's has "
            f"{tuple(found.shape)}."
        )
    return torch.from_numpy(given.astype(np.float64))
