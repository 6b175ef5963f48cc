"""The identity loss: cosine distance between face embeddings."""

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
from psp_lightning.utils.optional import facenet_pytorch
from psp_lightning.zoo.locate import find

INPUT_SIZE = {"ir_se50": 112, "facenet": 160}  # side of the face crops that the network was trained on
RECORD = {"ir_se50": "ir_se50", "facenet": "inception_resnet_v1"}  # weight record of the network


@register_loss("id")
class IDLoss(SimilarityLoss):
    """Cosine distance between the face embeddings of output and target.

    Logs `id_similarity` and, for an RGB source, `id_improvement`.

    Args:
        backbone: `ir_se50` (ArcFace, as in the paper) or `facenet` (InceptionResnetV1 of facenet-pytorch), which
            receive the face crop at 112 or 160 px; or the file or name of an embedding of this library, such as
            `toyfaces/identity`, which receives the whole image.
        weights: file of the network; None looks in the weights folder. Not allowed with an embedding.

    Raises:
        UserError: the backbone is unknown, facenet-pytorch is not installed, the file is missing, unreadable or for
            another network, or `weights` is given with an embedding.

    Source: pSp, section 3.2, eq. 3, with ArcFace (Deng et al. 2019); crop and pooling as in its code at commit
        5cfff38, against which the numbers were checked.
    """

    def __init__(self, backbone: str = "ir_se50", weights: str | os.PathLike[str] | None = None) -> None:
        super().__init__()
        self.input_size: int | None = INPUT_SIZE.get(backbone)
        if "/" in backbone or backbone.endswith(".safetensors"):
            if weights is not None:
                raise UserError(
                    f"loss.id.weights={weights} cannot be combined with loss.id.backbone={backbone}, which is already "
                    "a file. Leave one of them out."
                )
            self.network = freeze(load_embedding(backbone))
            self.convention, self.face_convention = f"{backbone}, whole image", backbone
            return
        if backbone not in RECORD:
            raise UserError(
                f"Unknown identity network '{backbone}'.{suggest(backbone, RECORD)} Known: {', '.join(RECORD)}, and "
                "files of embeddings, such as toyfaces/identity."
            )
        if backbone == "ir_se50":
            network: nn.Module = ArcFaceIRSE(n_layers=50, mode="ir_se", input_size=112)
        else:
            package = facenet_pytorch("The identity network 'facenet'")
            network = package.InceptionResnetV1(pretrained=None)
        path = find(RECORD[backbone], Path(weights) if weights is not None else None)
        # facenet-pytorch's files also contain the classifier of the training set
        load_strict(network, read(path), allow_unexpected=("logits.weight", "logits.bias"), what=str(path))
        self.network = freeze(network)
        self.convention = f"{backbone}, fixed face crop at {self.input_size} px"
        self.face_convention = f"{backbone} at {self.input_size} px"

    def embed(self, image: Tensor) -> Tensor:
        if self.input_size is None:
            return self.network(image)
        return self.embed_face(face_crop(image))  # (B, 3, 188, 188) of 256 px

    def embed_face(self, face: Tensor) -> Tensor:
        if self.input_size is None:
            return self.network(face)
        size = (self.input_size, self.input_size)
        if min(face.shape[-2:]) >= self.input_size:
            face = F.adaptive_avg_pool2d(face, size)
        else:  # pooling would repeat pixels
            face = F.interpolate(face, size, mode="bilinear", align_corners=False)
        return self.network(face)  # (B, 512)
