"""psp-align: find the faces in photos and cut them out as in the FFHQ data set."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from psp_lightning.cli.settings import command, parse
from psp_lightning.utils.arguments import whole
from psp_lightning.utils.errors import UserError, plural

if TYPE_CHECKING:
    from psp_lightning.build.alignment import AlignmentPlan

USAGE = "psp-align input=DIR output=DIR"
DEFAULTS = {
    "size": 256, "faces": "largest", "landmarks": "", "format": "png", "longest": 1024, "score": 0.9, "turned": False,
    "workers": 2, "batch_size": 1, "device": "cpu", "sheet": False, "overwrite": False, "progress_bar": True,
}  # fmt: skip
HELP = f"""{USAGE} [size=256] [faces=largest] [landmarks=FILE] ...

Finds the faces in photos (MTCNN) and writes them as square images, rotated, cut out and scaled as in the FFHQ data set,
which networks of faces expect as input.

  psp-align input=photos output=faces                          the largest face of each photo, 256 px
  psp-align input=photos output=faces faces=all size=1024      all faces: STEM_0.png (the largest), STEM_1.png, ...
  psp-align input='photos/**/*.jpg' output=faces sheet=true    and an overview of the crops
  psp-align input=photos output=faces landmarks=points.csv     positions from a file instead of the detector

OUTPUT/faces.csv has a row for each face: photo, face (number), status, reason, score, landmarks, corners of the crop,
file of the crop. Positions are x and y in pixels of the upright photo. Status:
  ok         the crop was written
  left out   the face cannot be aligned, for example because only one eye is visible; the reason says why
  no face    the photo has no face
  error      the photo cannot be read
The exit status is 1 if any row is not ok. The same command continues after an interruption.

input         photo, folder (with subfolders) or quoted glob
output        folder to write to; the tree of the input folder is mirrored
size          height and width of the crops in pixels
faces         largest, central (closest to the centre), all, or a number N: the N largest
landmarks     csv or json file with the positions of eyes and mouth: faces.csv of another call, or {{"photo.jpg":
              [[x, y], ...]}} with 4 points (left eye, right eye, left and right corner of the mouth, as seen in the
              photo), 5 (the nose as third) or 68 (dlib)
format        png, jpg or webp
longest       photos with a longer side are searched at this size, in which a face must be 20 px wide
score         smallest score that counts as a face, 0 to 1
turned        true: also search every photo turned by 90, 180 and 270 degrees; false: only
              photos without a face, or with one that may not be upright
workers       worker processes; 0: work in this process
batch_size    photos that a process searches together if they have the same size; useful on GPUs
device        device of the detector: cpu, cuda, cuda:1, mps
sheet         true: also write OUTPUT/sheet.png with the first 64 crops
overwrite     true: replace existing crops; false: skip crops of the same photo and settings
progress_bar  true: show a progress bar
"""


def run(arguments: list[str]) -> None:
    """Run the command."""
    values = parse(arguments, DEFAULTS, ("input", "output"), USAGE)
    from psp_lightning.build.alignment import TABLE, plan_alignment, run_alignment
    from psp_lightning.data.alignment import Alignment
    from psp_lightning.data.faces import Detector

    workers = whole("workers", values["workers"], 0, 1024)
    batch_size = whole("batch_size", values["batch_size"], 1, 1024)
    _check_device(values["device"])
    detector = Detector(values["longest"], values["score"], values["turned"], values["device"])
    settings = Alignment(values["size"], values["faces"], values["format"], detector)
    folder = Path(values["output"]).expanduser()
    landmarks = str(Path(values["landmarks"]).expanduser()) if values["landmarks"] else None
    source = str(Path(values["input"]).expanduser())
    plan = plan_alignment(source, folder, settings, landmarks, values["overwrite"])
    skipped = len(plan.records)
    run_alignment(plan, workers, batch_size, values["progress_bar"])
    if values["sheet"]:
        _save_sheet(folder, plan.rows())
    faults = report(plan.rows()) + report_unknown(plan)
    again = f", {plural(skipped, 'photo')} skipped (overwrite=true repeats them)" if skipped else ""
    print(f"{summary(plan.rows())} in {plural(len(plan.files), 'photo')}{again}; {folder / TABLE}")
    if faults:
        sys.exit(1)


def report(rows: list[dict[str, Any]]) -> int:
    """Print a line for each row that is not ok, and return their number."""
    bad = [row for row in rows if row["status"] != "ok"]
    for row in bad:
        place = f"{row['photo']}, face {row['face']}" if "face" in row else row["photo"]
        named = row["status"] == "error"  # such a reason names the file
        print(f"error: {row['reason']}" if named else f"error: {place}: {row['reason']}", file=sys.stderr)
    return len(bad)


def report_unknown(plan: AlignmentPlan) -> int:
    """Print a line if the landmark file has names that fit no photo, and return their number."""
    if plan.unknown:
        shown = ", ".join(map(repr, plan.unknown[:3])) + (", ..." if len(plan.unknown) > 3 else "")
        number = plural(len(plan.unknown), "name")
        print(f"error: the landmark file has {number} that fit no photo, or several: {shown}", file=sys.stderr)
    return len(plan.unknown)


def summary(rows: list[dict[str, Any]]) -> str:
    """Return the numbers of faces and photos of each status, in words."""
    count = Counter(row["status"] for row in rows)
    text = plural(count["ok"], "face")
    text += f", {count['left out']} left out" if count["left out"] else ""
    text += f", {plural(count['no face'], 'photo')} without a face" if count["no face"] else ""
    return text + (f", {plural(count['error'], 'photo')} failed" if count["error"] else "")


def _check_device(device: str) -> None:
    if device == "cpu":
        return
    import torch

    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device={device} cannot be used: {str(error).splitlines()[0]}. Leave it out.") from None


def _save_sheet(folder: Path, rows: list[dict[str, Any]]) -> None:
    from psp_lightning.lit.prediction import save_sheet

    files = [row["file"] for row in rows if row["status"] == "ok"]
    shown = [
        {"index": i, "source": name, "output": [str(folder / name)], "status": "ok"} for i, name in enumerate(files)
    ]
    save_sheet(folder / "sheet.png", shown, None)


def main() -> None:
    """Entry point of `psp-align`."""
    command(HELP, run)


if __name__ == "__main__":
    main()
