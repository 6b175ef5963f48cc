"""The list of public weights: what they are, where they are published, and under which terms.

Origins, licences and digests are as the publishers state them. None of the files is redistributed here.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Record:
    """A file of public weights.

    Attributes:
        name: key in `RECORDS`.
        filename: name in `weights_dir()`.
        url: where it is published.
        licence: terms as the publisher states them; read them before use.
        used_by: what needs it.
        sha256: the digest, or as many first digits as the publisher gives.
        size: the size, as the publisher states it.
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
        """The file's id on Google Drive, if it is hosted there."""
        return self.url.rsplit("=", 1)[-1] if "drive.google.com" in self.url else None

    def command(self, folder: Path) -> str:
        """Return the shell command that downloads the file into `folder`."""
        target = shlex.quote(str(folder / self.filename))
        make = f"mkdir -p {shlex.quote(str(folder))} && "
        if self.drive_id is not None:
            return f"{make}pip install gdown && gdown {self.drive_id} -O {target}"
        return f"{make}curl -L -o {target} {self.url}"


_DRIVE = "https://drive.google.com/uc?id="
_TORCHVISION = "BSD-3-Clause code; trained on ImageNet (non-commercial research terms)"
_STYLEGAN2 = "over NVIDIA's non-commercial StyleGAN2"
_PSP = f"MIT code (eladrich/pixel2style2pixel), {_STYLEGAN2}; "
_E4E = f"MIT code (omertov/encoder4editing), {_STYLEGAN2}; "
_FFHQ, _CELEBA = "FFHQ is CC BY-NC-SA 4.0", "CelebA-HQ is for non-commercial research"

_OTHERS = (
    Record(
        "ir_se50", "model_ir_se50.pth", _DRIVE + "1KW7bjndL3QG3sxBbZxreGHigcCCpsDgn",
        "MIT code (InsightFace_Pytorch); trained on MS-Celeb-1M, research use",
        "the identity loss and the encoder's first weights",
    ),
    Record(
        "curricularface_ir101", "CurricularFace_Backbone.pth", _DRIVE + "1f4IwVa2-Bn9vWLwB-bUwm53U_MlvinAj",
        "MIT code (CurricularFace); research use", "identity similarity as a metric",
    ),
    Record(
        "moco_v2", "moco_v2_800ep_pretrain.pth.tar",
        "https://dl.fbaipublicfiles.com/moco/moco_checkpoints/moco_v2_800ep/moco_v2_800ep_pretrain.pth.tar",
        "CC BY-NC 4.0 (facebookresearch/moco)", "the moco loss",
    ),
    Record(
        "inception_resnet_v1", "20180402-114759-vggface2.pt",
        "https://github.com/timesler/facenet-pytorch/releases/download/v2.2.9/20180402-114759-vggface2.pt",
        "MIT code (facenet-pytorch); trained on VGGFace2, research use", "the identity loss with backbone=facenet",
    ),
    Record(
        "stylegan2_ffhq", "stylegan2-ffhq-config-f.pt", _DRIVE + "1EM87UquaoQmk17Q8d5kYIAHqu0dkYqdT",
        f"Nvidia Source Code License-NC (converted by rosinality); {_FFHQ}", "the generator of domain=ffhq",
    ),
    Record(
        "stylegan2_ada_ffhq", "stylegan2-ada-ffhq.pkl",
        "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/ffhq.pkl",
        f"Nvidia Source Code License-NC; {_FFHQ}", "a generator of 1024 px, after psp-weights import",
    ),
)  # fmt: skip
_BACKBONES = (  # name, file on torchvision's server, net of the lpips loss, digits of the digest, size
    ("alexnet", "alexnet-owt-7be5be79.pth", "alex", "7be5be79", "233 MB"),
    ("vgg16", "vgg16-397923af.pth", "vgg", "397923af", "528 MB"),
    ("squeezenet", "squeezenet1_1-b8a52dc0.pth", "squeeze", "b8a52dc0", "5 MB"),
)
_NETWORKS = (  # name and stem of the file, id on Google Drive, licence, what it does
    ("psp_ffhq_encode", "1bMTNWkh5LArlaWSc_wa8VKyq2V42T2z0", _PSP + _FFHQ, "StyleGAN inversion"),
    ("psp_ffhq_frontalization", "1_S4THAzXb-97DbpXmanjHtXRyKxqjARv", _PSP + _FFHQ, "face frontalisation"),
    ("psp_celebs_sketch_to_face", "1lB7wk7MwtdxL-LL4Z_T76DuCfk00aSXA", _PSP + _CELEBA, "sketch to face"),
    ("psp_celebs_seg_to_face", "1VpEKc6E6yG3xhYuZ0cq8D2_1CbT0Dstz", _PSP + _CELEBA, "label map to face"),
    ("psp_celebs_super_resolution", "1ZpmSXBpJ9pFEov6-jjQstAlfYbkebECu", _PSP + _CELEBA, "super-resolution"),
    ("psp_ffhq_toonify", "1YKoiVuFaqdvzDP5CZaqa3k5phL-VDmyz", _PSP + _FFHQ, "toonify"),
    ("e4e_ffhq_encode", "1cUv_reLE6k3604or78EranS7XzuVMWeO", _E4E + _FFHQ, "inversion for editing, faces"),
    ("e4e_cars_encode", "17faPqBce2m1AQeLCLHUVXaDfxMRU2QcV", _E4E + "Stanford Cars", "inversion for editing, cars"),
    ("e4e_horse_encode", "1TkLLnuX86B_BMo2ocYD0kX9kWh53rUVX", _E4E + "LSUN Horse", "inversion for editing, horses"),
    ("e4e_church_encode", "1-L0ZdnQLwtdy6-A_Ccgq5uNJGTqE7qBa", _E4E + "LSUN Church", "inversion for editing, churches"),
)
RECORDS: dict[str, Record] = {record.name: record for record in _OTHERS}
for _name, _file, _net, _sha256, _size in _BACKBONES:
    _url = f"https://download.pytorch.org/models/{_file}"
    RECORDS[_name] = Record(_name, _file, _url, _TORCHVISION, f"the lpips loss, net {_net}", _sha256, _size)
for _name, _id, _licence, _use in _NETWORKS:
    RECORDS[_name] = Record(_name, f"{_name}.pt", _DRIVE + _id, _licence, f"psp-predict ckpt=FILE: {_use}")
