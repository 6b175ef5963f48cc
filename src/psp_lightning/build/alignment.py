"""Align the faces in a folder of photos: the plan, the work in processes, the record and the table."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader

from psp_lightning.data.alignment import Alignment, AlignmentUnits
from psp_lightning.data.faces import Face
from psp_lightning.data.inputs import InputFile, list_inputs
from psp_lightning.data.landmarks import LandmarkFile, write_table
from psp_lightning.lit.manifest import append_record, difference, read_manifest, save_manifest, stamp
from psp_lightning.utils.errors import UserError
from psp_lightning.utils.memory import limit_primitive_cache
from psp_lightning.utils.optional import facenet_pytorch
from psp_lightning.utils.progress import track

TABLE = "faces.csv"


@dataclass
class AlignmentPlan:
    """The photos, and what is left to do.

    Attributes:
        files: all photos.
        settings: which faces, and how they are cut out.
        folder: folder of the crops.
        landmarks: faces of each photo from a file, or None.
        todo: indices of the photos to process.
        records: records of the photos that are done, by index; `run` adds the others.
        unknown: names in the landmark file that fit no photo.
    """

    files: list[InputFile]
    settings: Alignment
    folder: Path
    landmarks: list[list[Face] | None] | None
    todo: list[int]
    records: dict[int, dict[str, Any]]
    unknown: list[str]

    def record(self, index: int, status: str, **values: Any) -> dict[str, Any]:
        """Return the manifest's record of a photo; `files` are the names of its crops."""
        path, detector = self.files[index].path, self.settings.detector
        made: dict[str, Any] = {"size": self.settings.size, "faces": self.settings.faces}
        mark: Any = stamp(path)
        if self.landmarks is None:
            made |= {"longest": detector.longest, "score": detector.score, "turned": detector.turned}
        else:
            made["landmarks"] = True
            points = self.landmarks[index]
            mark = [mark, None if points is None else [face.landmarks.astype(str).tolist() for face in points]]
        names = values.pop("files", [])
        return {
            "index": index, "source": os.fspath(path), "output": [os.fspath(self.folder / name) for name in names],
            "status": status, "checkpoint": "psp-align", "made": made, "stamp": mark, "files": names, **values,
        }  # fmt: skip

    def rows(self) -> list[dict[str, Any]]:
        """Return the rows of the table, in the order of the photos."""
        return [row for _, record in sorted(self.records.items()) for row in record["faces"]]


def plan_alignment(
    input: str, output: Path, settings: Alignment, landmarks: str | None = None, overwrite: bool = False,
    exclude: Path | None = None,
) -> AlignmentPlan:  # fmt: skip
    """List the photos and find those that are done. Pictures in `exclude`, by default `output`, are not photos.

    Raises:
        UserError: there are no photos, the output folder cannot be written, it contains crops of other photos or
            settings and `overwrite` is false, the landmark file has mistakes, or facenet-pytorch is not installed and
            there is no landmark file.
    """
    files = list_inputs(input, exclude=exclude or output)
    found: list[list[Face] | None] | None = None
    unknown: list[str] = []
    if landmarks is None:
        facenet_pytorch("Face detection")
    else:
        names = [os.fspath(file.path.relative_to(file.root)) for file in files]
        found, unknown = LandmarkFile(landmarks).match(names)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output={output} cannot be written: {error.strerror}.") from None
    plan = AlignmentPlan(files, settings, output, found, [], {}, unknown)
    _find_done(plan, overwrite)
    if plan.todo:  # an interrupted alignment can then tell its own files from others
        save_manifest(output, [*plan.records.values(), *(plan.record(index, "pending") for index in plan.todo)])
    return plan


def _find_done(plan: AlignmentPlan, overwrite: bool) -> None:
    """Fill `records` and `todo` from the manifest and the files of earlier calls; remove crops that are outdated."""
    makers = {os.path.realpath(record["source"]): record for record in read_manifest(plan.folder)}
    by_file = {name: record for record in makers.values() for name in record["files"]}
    existing = _existing(plan)
    refused: list[str] = []
    outdated: list[str] = []
    for index, file in enumerate(plan.files):
        now = plan.record(index, "ok")
        known = makers.get(os.path.realpath(file.path))
        for name in existing.get(file.name, ()):
            reason = difference(by_file.get(name, known), now)
            refused += [f"{plan.folder / name} {reason}"] if reason else []
        same = known is not None and all(known.get(key) == now[key] for key in ("status", "made", "stamp"))
        if known and same and not overwrite and {*known["files"]} <= {*existing.get(file.name, ())}:
            plan.records[index] = {**known, "index": index}
            continue
        plan.todo.append(index)
        outdated += known["files"] if known else []
    if refused and not overwrite:
        raise UserError(
            f"{len(refused)} outputs exist already and may differ from the new ones: {refused[0]}. "
            "overwrite=true replaces them; or set output= to another folder."
        )
    for name in outdated:  # a photo may have fewer faces now
        (plan.folder / name).unlink(missing_ok=True)


def _existing(plan: AlignmentPlan) -> dict[str, list[str]]:
    """Return, by the name of the photo, the files in the output folder that have the names of crops."""
    found: dict[str, list[str]] = {}
    suffix = f".{plan.settings.format}"
    for base, _, names in os.walk(plan.folder):
        for name in names:
            path = (Path(base) / name).relative_to(plan.folder)
            stem = path.with_suffix("").as_posix()
            if path.suffix != suffix:
                continue
            if plan.settings.several:
                match = re.fullmatch(r"(.*)_\d+", stem, re.DOTALL)
                stem = match[1] if match else ""
            found.setdefault(stem, []).append(path.as_posix())
    return found


def run_alignment(plan: AlignmentPlan, workers: int = 2, batch_size: int = 1, progress: bool = True) -> None:
    """Process the photos of `plan.todo`, add their records, and write the manifest and the table.

    Args:
        workers: number of processes; 0: this process.
        batch_size: number of photos that a process reads before it searches them; photos of one size are searched
            together.
        progress: show a progress bar.

    Raises:
        UserError: a worker process ended, usually because the memory was used up.
        OSError: the disk is full or fails.
    """
    blocks = [
        list(range(len(plan.files))[start : start + batch_size]) for start in range(0, len(plan.files), batch_size)
    ]
    todo = set(plan.todo)
    # A unit that is partly done is repeated as a whole: the last bits of the network depend on its batch.
    units = [block for block in blocks if not todo.isdisjoint(block)]
    dataset = AlignmentUnits(plan.files, units, plan.settings, plan.folder, plan.landmarks)
    spawn = "spawn" if workers and plan.settings.detector.device != "cpu" else None  # CUDA does not survive a fork
    loader = DataLoader(
        dataset, batch_size=None, num_workers=min(workers, len(units)), multiprocessing_context=spawn,
        worker_init_fn=limit_primitive_cache,
    )  # fmt: skip
    steps = track(loader, f"{len(plan.files)} photos", len(units), progress and bool(units))
    try:
        for results in steps:
            for result in results:
                if "stop" in result:
                    raise OSError(*result["stop"])
                _keep(plan, result)
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise UserError(
            "A worker process ended unexpectedly, probably because the memory was used up. Set fewer workers; the same "
            "command then continues."
        ) from None
    save_manifest(plan.folder, list(plan.records.values()))
    write_table(plan.folder / TABLE, plan.rows())


def _keep(plan: AlignmentPlan, result: dict[str, Any]) -> None:
    index, faces = result["index"], result["faces"]
    status = "error" if faces[0]["status"] == "error" else "ok"
    error = {"error": faces[0]["reason"]} if status == "error" else {}
    size = {"size": result["size"]} if "size" in result else {}
    plan.records[index] = plan.record(index, status, files=result["files"], faces=faces, **size, **error)
    append_record(plan.folder, plan.records[index])
