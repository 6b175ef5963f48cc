"""psp-predict on photos: cut the faces out before the prediction, and put the results back after it."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from PIL import Image, ImageFilter
from torch.utils.data import DataLoader, Dataset

from psp_lightning.build.alignment import AlignmentPlan, plan_alignment, run_alignment
from psp_lightning.data.alignment import Alignment, face_of, quiet_about_size
from psp_lightning.data.faces import Detector
from psp_lightning.data.inputs import InputFile
from psp_lightning.data.paste import paste_back
from psp_lightning.data.spec import InputSpec
from psp_lightning.data.transforms import rgb
from psp_lightning.lit.manifest import append_record, difference, read_manifest, save_manifest, stamp
from psp_lightning.loading import load_embedding
from psp_lightning.models.face_parser import KINDS, ToyFaceParser
from psp_lightning.utils.arguments import number
from psp_lightning.utils.atomic import DISK
from psp_lightning.utils.devices import started_rank
from psp_lightning.utils.errors import UserError
from psp_lightning.utils.images import FORMATS, save_atomic
from psp_lightning.utils.progress import track

ALIGNED, PASTED = "aligned", "pasted"  # folders below the output folder
TAKES_FACES = ("rgb", "lowres", "masked")  # kinds of source that are made from a photo of a face
FACE = ("skin", "eyes", "mouth")  # kinds of region that are pasted if a parser finds them


def check_photo_settings(cfg: DictConfig) -> None:
    """Raise a UserError for invalid settings of alignment and pasting."""
    for key in ("align", "turned", "paste_back"):
        if not isinstance(cfg[key], bool):
            raise UserError(f"{key}={cfg[key]} must be true or false.")
    if cfg.paste_back and not cfg.align:
        raise UserError("paste_back=true needs align=true: the place of a face is known only if it was cut out here.")
    if cfg.align and started_rank() is not None:
        raise UserError("align=true does not run under torchrun or srun. Start psp-predict itself, with devices=N.")
    if not cfg.align and cfg.landmarks is not None:
        raise UserError("landmarks=FILE needs align=true.")
    if not isinstance(cfg.paste.match_colour, bool):
        raise UserError(f"paste.match_colour={cfg.paste.match_colour} must be true or false.")
    number("paste.feather", cfg.paste.feather, 0, 0.5)


def align_inputs(cfg: DictConfig, spec: InputSpec, target_size: int | None) -> AlignmentPlan:
    """Cut the faces out of the photos in `input`, to the size of the network's source, or a larger `target_size`.

    Raises:
        UserError: the network takes no faces, its outputs cannot be put back although `paste_back` is set, or an error
            of `plan_alignment` occurs.
    """
    if spec.kind not in TAKES_FACES:
        raise UserError(f"align=true is for photos of faces, but {cfg.ckpt} takes {spec.kind} images. Leave it out.")
    if cfg.paste_back and spec.task is not None:
        raise UserError(
            f"paste_back=true cannot be used with {cfg.ckpt}: {spec.task} turns the face, so the result does not fit "
            "into its place in the photo. Leave it out."
        )
    settings = Alignment(max(spec.size, target_size or 8), cfg.faces, "png", Detector(turned=cfg.turned))
    folder = Path(cfg.output)
    plan = plan_alignment(str(cfg.input), folder / ALIGNED, settings, cfg.landmarks, cfg.overwrite, exclude=folder)
    run_alignment(plan, cfg.num_workers, progress=cfg.progress_bar)
    return plan


def crops(plan: AlignmentPlan) -> list[InputFile]:
    """Return the aligned faces as inputs of the prediction."""
    names = [row["file"] for row in plan.rows() if row["status"] == "ok"]
    return [InputFile(plan.folder / name, os.path.splitext(name)[0], plan.folder) for name in names]


@dataclass
class PasteJob:
    """A photo and the outputs that belong in it.

    Attributes:
        photo: file of the photo.
        faces: for each face, its output, its crop and the corners of the crop in the photo.
        record: the manifest's record of the pasted photo, without its status.
        path: file to write.
    """

    photo: Path
    faces: list[tuple[Path, Path, np.ndarray]]
    record: dict[str, Any]
    path: Path


def paste_jobs(
    cfg: DictConfig, plan: AlignmentPlan, outputs: dict[str, list[Path]], made: dict[str, Any]
) -> list[PasteJob]:
    """Return what is to be pasted, in the order of the photos.

    Args:
        outputs: the output images of each crop, by the crop's path.
        made: what determines the outputs, from their records.
    """
    jobs: list[PasteJob] = []
    paste = {f"paste.{key}": value for key, value in cfg.paste.items()}
    for index, file in enumerate(plan.files):
        rows = [row for row in plan.records[index]["faces"] if row["status"] == "ok"]
        faces = [(plan.folder / row["file"], face_of(row).corners) for row in rows]
        faces = [(crop, corners) for crop, corners in faces if os.fspath(crop) in outputs]
        for k in range(cfg.mix.n_outputs if faces else 0):
            name = f"{file.name}{'' if cfg.mix.n_outputs == 1 else f'_{k}'}.{cfg.format}"
            path = Path(cfg.output) / PASTED / name
            parts = [(outputs[os.fspath(crop)][k], crop, corners) for crop, corners in faces]
            record = {
                "index": len(jobs), "source": os.fspath(file.path), "output": [os.fspath(path)], "files": [name],
                "checkpoint": str(cfg.ckpt), "made": {**made, **paste},
                "stamp": [stamp(file.path), *(stamp(output) for output, _, _ in parts)],
            }  # fmt: skip
            jobs.append(PasteJob(file.path, parts, record, path))
    return jobs


def paste_outputs(cfg: DictConfig, jobs: list[PasteJob]) -> dict[str, list[str]]:
    """Paste the outputs into their photos, except where this was done already.

    Returns:
        The files that were `written` and `skipped`, and the reasons why others `failed`.

    Raises:
        UserError: a file of another origin has the name of an output and `overwrite` is false, or `paste.parser` is not
            a face parser.
        OSError: the disk is full or fails.
    """
    folder = Path(cfg.output) / PASTED
    makers = {name: record for record in read_manifest(folder) for name in record["files"]}
    result: dict[str, list[str]] = {"written": [], "skipped": [], "failed": []}
    records, todo = [], []
    for job in jobs:
        maker = makers.get(job.record["files"][0])
        if job.path.exists() and not cfg.overwrite:
            if maker is None or os.path.realpath(maker["source"]) != os.path.realpath(job.record["source"]):
                raise UserError(f"{job.path} {difference(maker, job.record)}. overwrite=true replaces it.")
            if all(maker[key] == job.record[key] for key in ("made", "stamp")) and maker["status"] == "ok":
                records.append({**job.record, "status": "ok"})
                result["skipped"].append(os.fspath(job.path))
                continue
        todo.append(job)
    parser = None if cfg.paste.parser is None else _load_parser(cfg.paste.parser)
    work = _Pasting(todo, cfg.paste.feather, cfg.paste.match_colour, None if parser is None else cfg.paste.parser)
    folder.mkdir(parents=True, exist_ok=True)
    save_manifest(folder, [*records, *({**job.record, "status": "pending"} for job in todo)])
    loader = DataLoader(work, batch_size=None, num_workers=min(cfg.num_workers, len(todo)))
    steps = track(loader, f"paste into {len(todo)} photos", len(todo), cfg.progress_bar and bool(todo))
    for job, failure in zip(todo, steps, strict=True):
        if failure is not None and "stop" in failure:
            raise OSError(*failure["stop"])
        if failure is None:
            result["written"].append(os.fspath(job.path))
            records.append({**job.record, "status": "ok"})
        else:
            result["failed"].append(failure["error"])
            records.append({**job.record, "status": "error", "files": [], "output": [], **failure})
        append_record(folder, records[-1])
    save_manifest(folder, records)
    return result


class _Pasting(Dataset[dict[str, Any] | None]):
    """A dataset whose items paste faces into a photo and write it. An item is None, or the reason for a failure."""

    def __init__(self, jobs: list[PasteJob], feather: float, match_colour: bool, parser: str | None) -> None:
        self.jobs, self.feather, self.match_colour, self.parser = jobs, feather, match_colour, parser

    def __len__(self) -> int:
        return len(self.jobs)

    def __getitem__(self, index: int) -> dict[str, Any] | None:
        job = self.jobs[index]
        edited = [output for output, _, _ in job.faces]
        corners = np.stack([place for _, _, place in job.faces])
        try:
            masks = None
            if self.parser is not None:
                masks = [face_region(_load_parser(self.parser), [output, crop]) for output, crop, _ in job.faces]
            with quiet_about_size():
                picture = paste_back(job.photo, edited, corners, self.feather, self.match_colour, masks)
            kept = {str(key): value for key, value in picture.info.items()}
            save_atomic(picture, job.path, **FORMATS[job.path.suffix[1:]], **kept)
        except UserError as error:
            return {"error": str(error)}
        except (OSError, ValueError) as error:  # ValueError: the photo is too large for the format
            if isinstance(error, OSError) and error.errno in DISK:
                return {"stop": [error.errno, error.strerror, os.fspath(job.path)]}
            return {"error": f"{job.path} cannot be written: {error}"}
        return None


@functools.lru_cache(maxsize=1)
def _load_parser(name: str) -> ToyFaceParser:
    network = load_embedding(name)
    if not isinstance(network, ToyFaceParser):
        raise UserError(f"paste.parser={name} is a {type(network).__name__}, not a face parser.")
    return network.eval()


def face_region(parser: ToyFaceParser, images: list[Path]) -> Image.Image:
    """Return the region of a face in any of several pictures of it: white on black with a soft edge, mode L."""
    kinds = torch.tensor([list(KINDS).index(kind) for kind in FACE])
    with torch.inference_mode():
        found = parser.regions(torch.stack([rgb(path, parser.input_size) for path in images]))
    inside = torch.isin(found, kinds).any(0).numpy()
    mask = Image.fromarray(np.where(inside, 255, 0).astype(np.uint8)).resize((256, 256), Image.Resampling.BILINEAR)
    return mask.filter(ImageFilter.MaxFilter(9)).filter(ImageFilter.GaussianBlur(6))
