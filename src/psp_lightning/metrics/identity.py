"""Identity similarity of faces that a detector finds and that are then aligned, as in pSp's evaluation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from psp_lightning.data.faces import Detector
from psp_lightning.metrics.images import ImageMean
from psp_lightning.metrics.registry import register_metric
from psp_lightning.utils.arguments import number
from psp_lightning.utils.errors import UserError
from psp_lightning.utils.images import from_uint8, to_pil
from psp_lightning.utils.optional import facenet_pytorch

SIZE = 112  # pixels, side of the crop
# Where ArcFace (arXiv:1801.07698) expects eyes, nose and corners of the mouth in this crop: x, y; the first pixel is 0.
PLACES = np.array([[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]])


def cut_for_recognition(image: Image.Image, landmarks: np.ndarray) -> Image.Image:
    """Return a face as face recognition networks expect it: rotated, scaled and shifted, without shear.

    The transform maps `PLACES` to the landmarks with the least squared distance in pixels of the image. The image is
    sampled bilinearly; where the crop extends beyond the image, it is black. An image in which the face is at least
    four times as large as in the crop is first reduced by a whole factor, because bilinear samples would skip pixels.

    Args:
        image: RGB image.
        landmarks: x and y of left eye, right eye, nose, left and right corner of the mouth in pixels, float64 (5, 2).

    Returns:
        An RGB image of 112 x 112 pixels.
    """
    places, points = (array @ (1, 1j) for array in (PLACES, landmarks))  # complex: a product rotates and scales
    offsets = places - places.mean()
    factor = (offsets.conj() @ (points - points.mean())) / (offsets.conj() @ offsets).real
    shift = points.mean() - factor * places.mean()
    shift += (0.5 + 0.5j) * (1 - factor)  # for Pillow, the centre of the first pixel is 0.5
    if (shrink := int(abs(factor) / 2)) > 1:
        image, factor, shift = image.reduce(shrink), factor / shrink, shift / shrink
    rows = (factor.real, -factor.imag, shift.real, factor.imag, factor.real, shift.imag)
    return image.transform((SIZE, SIZE), Image.Transform.AFFINE, rows, Image.Resampling.BILINEAR)


@register_metric("id_aligned")
class AlignedIdSimilarity(ImageMean):
    """Mean cosine similarity of the identities of output and target, whose faces are aligned first; higher is better.

    MTCNN searches both images, and the face with the highest score is cut out of each. If it finds no face in one of
    them, the pair has no value (NaN) and does not count. The images are compared as 8 bits. Values are in [-1, 1].

    Args:
        similarity: function that maps two batches of crops (B, 3, 112, 112) to (B,) and takes `aligned=True`; see
            `SimilarityLoss.similarity`.
        score: smallest score of a face, 0 to 1. MTCNN itself drops faces below 0.7.

    Raises:
        UserError: facenet-pytorch, which contains MTCNN, is not installed, or `score` is invalid.

    Source: the evaluation of pSp (arXiv:2008.00951), scripts/calc_id_loss_parallel.py of its code at commit 5cfff38.
    """

    aligned = True  # the images that `similarity` receives
    higher_is_better = True

    def __init__(self, similarity: Callable[..., Tensor], score: float = 0.7, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        facenet_pytorch("The metric id_aligned")
        self.similarity = similarity
        self.score = number("score", score, 0, 1)
        self.convention = (
            f"cosine of the embeddings; both faces found by MTCNN, score from {self.score:g} on, aligned at {SIZE} px"
        )

    def per_image(self, y_hat: Tensor, y: Tensor) -> Tensor:
        values = torch.full((len(y),), torch.nan, device=y.device)
        pairs = [(self._face(a), self._face(b)) for a, b in zip(y_hat, y, strict=True)]
        crops = {i: pair for i, pair in enumerate(pairs) if all(isinstance(face, Tensor) for face in pair)}
        if crops:
            outputs, targets = (torch.stack(faces).to(y.device) for faces in zip(*crops.values(), strict=True))
            values[list(crops)] = self.similarity(outputs, targets, aligned=True)
        return values

    def reason(self, y_hat: Tensor, y: Tensor, **needed: Any) -> str:
        """Return why `per_image` has no value for an output and a target (1, 3, H, W)."""
        faces = {"output": self._face(y_hat[0]), "target": self._face(y[0])}
        return ", ".join(f"{face} in the {name}" for name, face in faces.items() if isinstance(face, str))

    def _face(self, image: Tensor) -> Tensor | str:
        """Return the face in an image (3, H, W), float32 (3, 112, 112) in [-1, 1], or why there is none."""
        device = str(image.device) if image.is_cuda else "cpu"
        picture = to_pil(image)
        try:
            (faces,) = Detector(score=self.score, turned=None, device=device)([picture])
        except UserError as error:
            return f"failed face detection ({error})"
        if not faces:
            return "no face"
        best = max(faces, key=lambda face: face.score or 0)
        crop = np.array(cut_for_recognition(picture, best.landmarks))
        return from_uint8(torch.from_numpy(crop).permute(2, 0, 1))

    def _add(self, values: Tensor) -> None:
        super()._add(values[~values.isnan()])
