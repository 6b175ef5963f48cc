"""Identity loss: cosine distance of face embeddings."""

from __future__ import annotations

import os
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor, nn

from psp_lightning.checkpoints.read import read
from psp_lightning.checkpoints.strict import load_strict
from psp_lightning.loading import load_embedding
from psp_lightning.losses.base import face_crop, register_loss
from psp_lightning.losses.similarity import SimilarityLoss
from psp_lightning.models.irse import ArcFaceIRSE
from psp_lightning.models.layers import freeze
from psp_lightning.utils.errors import UserError, suggest
from psp_lightning.zoo.locate import find

INPUT_SIZE = {"ir_se50": 112, "facenet": 160}  # side of the face crop that the network was trained with
RECORD = {"ir_se50": "ir_se50", "facenet": "inception_resnet_v1"}  # weight record of the network


def load_face_network(backbone: str, weights: str | os.PathLike[str] | None) -> nn.Module:
    """Load a frozen network from face crops (B, 3, s, s) in [-1, 1] to unit vectors (B, 512).

    Args:
        backbone: `ir_se50` (ArcFace, the paper's, s = 112) or `facenet` (facenet-pytorch's InceptionResnetV1, s = 160).
        weights: its file; None looks in the weights folder.

    Raises:
        UserError: the backbone is unknown; facenet-pytorch is not installed; the file is missing, unreadable or of
            another network.
    """
    if backbone not in RECORD:
        raise UserError(
            f"Unknown identity network '{backbone}'.{suggest(backbone, RECORD)} Known: {', '.join(RECORD)}, and files "
            "of embeddings, as toyfaces/identity."
        )
    network = ArcFaceIRSE(n_layers=50, mode="ir_se", input_size=112) if backbone == "ir_se50" else _facenet()
    path = find(RECORD[backbone], Path(weights) if weights is not None else None)
    # facenet-pytorch's files also hold the classifier of their training set
    load_strict(network, read(path), allow_unexpected=("logits.weight", "logits.bias"), what=str(path))
    return freeze(network)


def _facenet() -> nn.Module:
    try:
        from facenet_pytorch import InceptionResnetV1
    except ImportError as error:
        raise UserError(
            "The identity network 'facenet' needs the package facenet-pytorch. Its metadata forbids current torch and "
            f"numpy, so install it with: pip install --no-deps facenet-pytorch==2.6.0 ({error})"
        ) from error
    return InceptionResnetV1(pretrained=None)


@register_loss("id")
class IDLoss(SimilarityLoss):
    """Cosine distance between the face embeddings of output and target.

    Logs `id_similarity` and, for an RGB source, `id_improvement`.

    Args:
        backbone: `ir_se50` or `facenet`, which see the face crop; or the file or name of an embedding of this library,
            as `toyfaces/identity`, which sees the whole image.
        weights: the network's file; None looks in the weights folder. Not with an embedding.

    Raises:
        UserError: see `load_face_network`; `weights` is given with an embedding.

    Source: pSp, section 3.2, eq. 3, with ArcFace (Deng et al. 2019); crop and pooling as in its code at commit
        5cfff38, against which the numbers were checked.
    """

    def __init__(self, backbone: str = "ir_se50", weights: str | os.PathLike[str] | None = None) -> None:
        super().__init__()
        self.input_size: int | None = INPUT_SIZE.get(backbone)
        if "/" in backbone or backbone.endswith(".safetensors"):
            if weights is not None:
                raise UserError(
                    f"loss.id.weights={weights} does not go with loss.id.backbone={backbone}, which is a file already: "
                    "leave one of them out."
                )
            self.network = freeze(load_embedding(backbone))
        else:
            self.network = load_face_network(backbone, weights)

    def embed(self, image: Tensor) -> Tensor:
        if self.input_size is None:
            return self.network(image)
        face = face_crop(image)  # (B, 3, 188, 188) of 256 px
        size = (self.input_size, self.input_size)
        if min(face.shape[-2:]) >= self.input_size:
            face = F.adaptive_avg_pool2d(face, size)
        else:  # pooling would repeat pixels
            face = F.interpolate(face, size, mode="bilinear", align_corners=False)
        return self.network(face)  # (B, 512)
