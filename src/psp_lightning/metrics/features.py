"""Frechet distances (FID) and kernel distances (KID) between the features of two sets of images.

The features come from Inception or from the domain's own network.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from psp_lightning.checkpoints.read import read
from psp_lightning.loading import load_embedding
from psp_lightning.metrics.frechet import SETS, FrechetDistance
from psp_lightning.metrics.registry import register_metric
from psp_lightning.models.layers import freeze
from psp_lightning.utils.errors import UserError
from psp_lightning.utils.images import to_uint8

BLOCK = 1024  # images whose kernel values with all others are in memory at once


class Statistics(nn.Module):
    """The spatial means of an embedding's stages.

    Args:
        name: file or name of an embedding that has `statistics`, such as `toyfaces/identity`.

    Raises:
        UserError: the file is missing or contains another network.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self.network = freeze(load_embedding(name))
        if not hasattr(self.network, "statistics"):
            raise UserError(f"{name} has no features for distances of sets: it lacks the method `statistics`.")
        self.convention = f"spatial means of the stages of {name}"

    def forward(self, images: Tensor) -> Tensor:
        return self.network.statistics(images)


class Inception(nn.Module):
    """The 2,048 features of FID's Inception-v3, read from a file.

    Raises:
        UserError: no file is given, it does not exist or contains another network, or torch-fidelity is not installed.
    """

    convention = "Inception-v3 of FID (2,048 features), images of 8 bits resized to 299 px as by TensorFlow 1"

    def __init__(self, weights: str | os.PathLike[str] | None) -> None:
        super().__init__()
        from torchmetrics.image.fid import NoTrainInceptionV3

        if weights is None:
            raise UserError(
                "fid and kid need the file of FID's Inception-v3, pt_inception-2015-12-05-6726825d.pth. "
                "Set metric.fid.weights=FILE and metric.kid.weights=FILE. frechet and kernel use the domain's network."
            )
        if not Path(weights).expanduser().is_file():
            raise UserError(f"The weights of Inception do not exist: {weights}.")
        state = read(weights)
        try:
            with tempfile.TemporaryDirectory() as folder:  # torch-fidelity would run code from the user's file
                path = os.path.join(folder, "inception.pth")
                torch.save(state, path)
                self.network = NoTrainInceptionV3("inception-v3-compat", ["2048"], path)
        except ModuleNotFoundError:
            raise UserError("fid and kid need the package torch-fidelity: pip install torch-fidelity") from None
        except (RuntimeError, KeyError, TypeError) as error:
            raise UserError(f"{weights} does not contain FID's Inception-v3: {error}") from error

    def forward(self, images: Tensor) -> Tensor:
        return self.network(to_uint8(images))


class _Frechet(FrechetDistance):
    """A Frechet distance that is updated with pairs, as all metrics are."""

    unit = ""

    def __init__(self, network: nn.Module, **kwargs: Any) -> None:
        with torch.no_grad():
            size = network(torch.zeros(1, 3, 64, 64)).shape[1]
        super().__init__(network, size, **kwargs)
        self.network = network  # registered, so that it moves with the metric
        self.convention = f"{network.convention}; covariances in float64"

    def update(self, y_hat: Tensor, y: Tensor) -> None:  # type: ignore[override]
        """Add outputs (clamped here) and targets in [-1, 1], both (B, 3, H, W) float."""
        super().update(y_hat, real=False)
        super().update(y, real=True)


@register_metric("frechet")
class DomainFrechet(_Frechet):
    """Frechet distance in the features of the domain's own network, which is not FID; lower is better."""

    def __init__(self, network: str = "toyfaces/identity", **kwargs: Any) -> None:
        super().__init__(Statistics(network), **kwargs)


@register_metric("fid")
class FID(_Frechet):
    """Frechet Inception distance; lower is better. Source: Heusel et al. (arXiv:1706.08500)."""

    def __init__(self, weights: str | os.PathLike[str] | None = None, **kwargs: Any) -> None:
        super().__init__(Inception(weights), **kwargs)


class _Kernel(Metric):
    """Unbiased estimate of the squared maximum mean discrepancy of features under the kernel (x y / size + 1)^3.

    It uses all pairs of images and no subsets. The features of all images are kept as float32, 8 KB for each image with
    Inception.

    Source: Binkowski et al., "Demystifying MMD GANs" (arXiv:1801.01401), section 3 and equation 4.
    """

    full_state_update = False
    higher_is_better = False
    is_differentiable = False
    real: list[Tensor]
    fake: list[Tensor]

    def __init__(self, network: nn.Module, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.network = network
        self.convention = f"{network.convention}; kernel (xy/size + 1)^3, unbiased, all pairs of images, no subsets"
        for name in SETS:
            self.add_state(name, [], dist_reduce_fx="cat")

    @torch.no_grad()
    def update(self, y_hat: Tensor, y: Tensor) -> None:
        """Add outputs (clamped here) and targets in [-1, 1], both (B, 3, H, W) float."""
        self.real.append(self.network(y.clamp(-1, 1)))
        self.fake.append(self.network(y_hat.clamp(-1, 1)))

    def compute(self) -> Tensor:
        """Return the distance as a float64 scalar, which may be slightly negative.

        Raises:
            UserError: there are fewer than two images.
        """
        real, fake = (dim_zero_cat(getattr(self, name)) for name in SETS)
        if len(real) < 2:
            raise UserError(f"a kernel distance needs at least two images, got {len(real)}.")
        return _mean(real, real, True) + _mean(fake, fake, True) - 2 * _mean(real, fake, False)


def _mean(a: Tensor, b: Tensor, same: bool) -> Tensor:
    """Return the mean kernel value of all pairs; if both sets are the same, leave out pairs of an image with itself."""
    total = torch.zeros((), dtype=torch.float64, device=a.device)
    for block in a.split(BLOCK):
        total += _kernel(block.double() @ b.double().t(), a.shape[1]).sum()
    if not same:
        return total / (len(a) * len(b))
    return (total - _kernel(a.double().square().sum(1), a.shape[1]).sum()) / (len(a) * (len(a) - 1))


def _kernel(products: Tensor, size: int) -> Tensor:
    return (products / size + 1) ** 3


@register_metric("kernel")
class DomainKernel(_Kernel):
    """Kernel distance in the features of the domain's own network, which is not KID; lower is better."""

    def __init__(self, network: str = "toyfaces/identity", **kwargs: Any) -> None:
        super().__init__(Statistics(network), **kwargs)


@register_metric("kid")
class KID(_Kernel):
    """Kernel Inception distance; lower is better."""

    def __init__(self, weights: str | os.PathLike[str] | None = None, **kwargs: Any) -> None:
        super().__init__(Inception(weights), **kwargs)
