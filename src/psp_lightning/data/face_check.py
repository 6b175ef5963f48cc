"""Check whether pictures show a face in the place where FFHQ's crop has it, as the identity networks expect."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable

import numpy as np
from PIL import Image

from psp_lightning.data.checks import Finding
from psp_lightning.data.faces import Detector, Face
from psp_lightning.utils.errors import UserError, plural
from psp_lightning.utils.optional import facenet_pytorch

EDGE = 256  # pixels, height and width of the picture that is searched for a face
# How far eyes may lie from their place in FFHQ, as a share of the picture's width. The distance is 0.01 for aligned
# photographs, 0.06 on average and 0.11 at most for drawn faces, and 0.29 for a portrait that was not aligned.
FFHQ_CROP, OWN_CROP = 0.05, 0.15
FEW = 0.8  # share of pictures that should show a face, and of faces that should be aligned


def eye_offset(picture: Image.Image) -> float | None:
    """Return how far the eyes lie from their place in FFHQ, as a share of the picture's width; None without a face.

    Args:
        picture: RGB image; it is squashed to a square as in training.

    Raises:
        UserError: facenet-pytorch is not installed.
    """
    facenet_pytorch("Face detection")
    square = picture.resize((EDGE, EDGE), Image.Resampling.BICUBIC)
    faces: list[Face] = []
    with contextlib.suppress(UserError):  # the detector fails on some pictures
        (faces,) = Detector(score=0).upright([square])
    if not faces:
        return None
    eyes = faces[0].landmarks[:2]
    corner, lower, _, right = faces[0].corners  # corners of the aligned crop, in pixels of this picture
    across, down = right - corner, lower - corner
    placed = [[(eye - corner) @ across / (across @ across), (eye - corner) @ down / (down @ down)] for eye in eyes]
    return float(np.linalg.norm(np.array(placed) - eyes / EDGE, axis=1).mean())


def check_faces(offsets: Iterable[float | None], far: float = FFHQ_CROP) -> list[Finding]:
    """Report pictures without a face, and faces that are not aligned, from the results of `eye_offset`.

    Args:
        offsets: result of `eye_offset` for each picture.
        far: largest offset of an aligned face.
    """
    offsets = list(offsets)
    found = [offset for offset in offsets if offset is not None]
    if not offsets:
        return []
    findings = []
    if len(found) < FEW * len(offsets):
        text = f"a face is found in {len(found)} of {plural(len(offsets), 'image')} ({len(found) / len(offsets):.0%})"
        advice = "The id loss compares faces: leave it out, loss=[l2,lpips,moco], or use images of faces."
        findings.append(Finding("faces", True, text, advice))
    wrong = [offset for offset in found if offset > far]
    if found and len(wrong) > (1 - FEW) * len(found):
        text = (
            f"in {len(wrong)} of {plural(len(found), 'face')} the eyes lie more than {far:.0%} of the width from their "
            f"place in FFHQ (median {np.median(found):.0%})"
        )
        advice = "The id loss looks at FFHQ's crop. Align the images with psp-align input=DIR output=DIR."
        findings.append(Finding("faces", True, text, advice))
    return findings
