"""Records of public weights: what they are, where they are published, under which terms.

Origins, licences and digests are as their publishers state them; none of the files is redistributed here.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Record:
    """One file of public weights.

    Attributes:
        name: key in `RECORDS`.
        filename: name inside `weights_dir()`.
        url: where it is published.
        licence: terms as the publisher states them; read them before use.
        used_by: what needs it.
        sha256: digest, or its published first digits; None where the publisher gives none.
        size: as the publisher states it; None where it does not.
    """

    name: str
    filename: str
    url: str
    licence: str
    used_by: str
    sha256: str | None = None
    size: str | None = None

    @property
    def drive_id(self) -> str | None:
        """The file's id on Google Drive, where it lies there."""
        return self.url.rsplit("=", 1)[-1] if "drive.google.com" in self.url else None

    def command(self, folder: Path) -> str:
        """The shell command that puts the file into `folder`."""
        target = shlex.quote(str(folder / self.filename))
        make = f"mkdir -p {shlex.quote(str(folder))} && "
        if self.drive_id is not None:
            return f"{make}pip install gdown && gdown {self.drive_id} -O {target}"
        return f"{make}curl -L -o {target} {self.url}"


_DRIVE = "https://drive.google.com/uc?id="
_TORCHVISION = "BSD-3-Clause code; trained on ImageNet (non-commercial research terms)"

_PSP = "MIT code (eladrich/pixel2style2pixel), over NVIDIA's non-commercial StyleGAN2; "
_E4E = "MIT code (omertov/encoder4editing), over NVIDIA's non-commercial StyleGAN2; "
_FFHQ, _CELEBA = "FFHQ is CC BY-NC-SA 4.0", "CelebA-HQ is for non-commercial research"
_NETWORK = "psp-predict ckpt=FILE"

RECORDS: dict[str, Record] = {
    r.name: r
    for r in (
        Record(
            "ir_se50",
            "model_ir_se50.pth",
            _DRIVE + "1KW7bjndL3QG3sxBbZxreGHigcCCpsDgn",
            "MIT code (InsightFace_Pytorch); trained on MS-Celeb-1M, research use",
            "the identity loss and the encoder's first weights",
        ),
        Record(
            "curricularface_ir101",
            "CurricularFace_Backbone.pth",
            _DRIVE + "1f4IwVa2-Bn9vWLwB-bUwm53U_MlvinAj",
            "MIT code (CurricularFace); research use",
            "identity similarity as a metric",
        ),
        Record(
            "alexnet",
            "alexnet-owt-7be5be79.pth",
            "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
            _TORCHVISION,
            "the lpips loss, net alex",
            "7be5be79",
            "233 MB",
        ),
        Record(
            "vgg16",
            "vgg16-397923af.pth",
            "https://download.pytorch.org/models/vgg16-397923af.pth",
            _TORCHVISION,
            "the lpips loss, net vgg",
            "397923af",
            "528 MB",
        ),
        Record(
            "squeezenet",
            "squeezenet1_1-b8a52dc0.pth",
            "https://download.pytorch.org/models/squeezenet1_1-b8a52dc0.pth",
            _TORCHVISION,
            "the lpips loss, net squeeze",
            "b8a52dc0",
            "5 MB",
        ),
        Record(
            "moco_v2",
            "moco_v2_800ep_pretrain.pth.tar",
            "https://dl.fbaipublicfiles.com/moco/moco_checkpoints/moco_v2_800ep/moco_v2_800ep_pretrain.pth.tar",
            "CC BY-NC 4.0 (facebookresearch/moco)",
            "the moco loss",
        ),
        Record(
            "inception_resnet_v1",
            "20180402-114759-vggface2.pt",
            "https://github.com/timesler/facenet-pytorch/releases/download/v2.2.9/20180402-114759-vggface2.pt",
            "MIT code (facenet-pytorch); trained on VGGFace2, research use",
            "the identity loss with backbone=facenet",
        ),
        Record(
            "stylegan2_ffhq",
            "stylegan2-ffhq-config-f.pt",
            _DRIVE + "1EM87UquaoQmk17Q8d5kYIAHqu0dkYqdT",
            "Nvidia Source Code License-NC (converted by rosinality); FFHQ is CC BY-NC-SA 4.0",
            "the generator of domain=ffhq",
        ),
        Record(
            "psp_ffhq_encode",
            "psp_ffhq_encode.pt",
            _DRIVE + "1bMTNWkh5LArlaWSc_wa8VKyq2V42T2z0",
            _PSP + _FFHQ,
            f"{_NETWORK}: StyleGAN inversion",
        ),
        Record(
            "psp_ffhq_frontalization",
            "psp_ffhq_frontalization.pt",
            _DRIVE + "1_S4THAzXb-97DbpXmanjHtXRyKxqjARv",
            _PSP + _FFHQ,
            f"{_NETWORK}: face frontalisation",
        ),
        Record(
            "psp_celebs_sketch_to_face",
            "psp_celebs_sketch_to_face.pt",
            _DRIVE + "1lB7wk7MwtdxL-LL4Z_T76DuCfk00aSXA",
            _PSP + _CELEBA,
            f"{_NETWORK}: sketch to face",
        ),
        Record(
            "psp_celebs_seg_to_face",
            "psp_celebs_seg_to_face.pt",
            _DRIVE + "1VpEKc6E6yG3xhYuZ0cq8D2_1CbT0Dstz",
            _PSP + _CELEBA,
            f"{_NETWORK}: label map to face",
        ),
        Record(
            "psp_celebs_super_resolution",
            "psp_celebs_super_resolution.pt",
            _DRIVE + "1ZpmSXBpJ9pFEov6-jjQstAlfYbkebECu",
            _PSP + _CELEBA,
            f"{_NETWORK}: super-resolution",
        ),
        Record(
            "psp_ffhq_toonify",
            "psp_ffhq_toonify.pt",
            _DRIVE + "1YKoiVuFaqdvzDP5CZaqa3k5phL-VDmyz",
            _PSP + _FFHQ,
            f"{_NETWORK}: toonify",
        ),
        Record(
            "e4e_ffhq_encode",
            "e4e_ffhq_encode.pt",
            _DRIVE + "1cUv_reLE6k3604or78EranS7XzuVMWeO",
            _E4E + _FFHQ,
            f"{_NETWORK}: inversion for editing, faces",
        ),
        Record(
            "e4e_cars_encode",
            "e4e_cars_encode.pt",
            _DRIVE + "17faPqBce2m1AQeLCLHUVXaDfxMRU2QcV",
            _E4E + "Stanford Cars",
            f"{_NETWORK}: inversion for editing, cars",
        ),
        Record(
            "e4e_horse_encode",
            "e4e_horse_encode.pt",
            _DRIVE + "1TkLLnuX86B_BMo2ocYD0kX9kWh53rUVX",
            _E4E + "LSUN Horse",
            f"{_NETWORK}: inversion for editing, horses",
        ),
        Record(
            "e4e_church_encode",
            "e4e_church_encode.pt",
            _DRIVE + "1-L0ZdnQLwtdy6-A_Ccgq5uNJGTqE7qBa",
            _E4E + "LSUN Church",
            f"{_NETWORK}: inversion for editing, churches",
        ),
        Record(
            "stylegan2_ada_ffhq",
            "stylegan2-ada-ffhq.pkl",
            "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/ffhq.pkl",
            "Nvidia Source Code License-NC; FFHQ is CC BY-NC-SA 4.0",
            "a generator of 1024 px, after psp-weights import",
        ),
    )
}
