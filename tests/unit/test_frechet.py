"""FrechetDistance and projection against closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch

from psp_lightning.inference.projection import project
from psp_lightning.losses.l2 import mse_per_image
from psp_lightning.metrics.frechet import FrechetDistance, frechet
from psp_lightning.models.stylegan2 import Generator
from psp_lightning.utils.errors import UserError


def flat(images: torch.Tensor) -> torch.Tensor:
    return images.flatten(1)


def test_frechet_agrees_with_the_matrix_square_root() -> None:
    rng = np.random.default_rng(0)
    a, b = (m @ m.T for m in rng.standard_normal((2, 6, 6)))
    mean_a, mean_b = rng.standard_normal((2, 6))
    expected = ((mean_a - mean_b) ** 2).sum() + np.trace(a + b - 2 * scipy.linalg.sqrtm(a @ b).real)
    found = frechet(*(torch.from_numpy(x) for x in (mean_a, a, mean_b, b)))
    assert float(found) == pytest.approx(expected, rel=1e-8)


def test_frechet_of_a_set_with_itself_is_zero_for_any_batches() -> None:
    images = torch.rand(40, 3, 2, 2, generator=torch.Generator().manual_seed(0)) * 2 - 1
    whole, parts = FrechetDistance(flat, 12), FrechetDistance(flat, 12)
    for real in (True, False):
        whole.update(images, real)
        for part in images.split(7):
            parts.update(part * (1.0 if real else 0.5), real)
    assert float(whole.compute()) == pytest.approx(0, abs=1e-9)
    mean, covariance = flat(images).double().mean(0), flat(images).double().t().cov()
    expected = (mean / 2).square().sum() + covariance.trace() * 0.25  # tr(C + C/4 - 2 sqrt(C C/4)) = tr(C) / 4
    assert float(parts.compute()) == pytest.approx(float(expected), rel=1e-5)


def test_frechet_of_uneven_ranks() -> None:
    """The states of ranks are summed, so a rank may have no images and their order does not matter."""
    images = torch.rand(9, 3, 2, 2, generator=torch.Generator().manual_seed(0)) * 2 - 1
    whole, ranks = FrechetDistance(flat, 12), [FrechetDistance(flat, 12) for _ in range(3)]
    for real in (True, False):
        whole.update(images * (1.0 if real else 0.5), real)
        ranks[0].update(images[:7] * (1.0 if real else 0.5), real)
        ranks[2].update(images[7:] * (1.0 if real else 0.5), real)
    summed = FrechetDistance(flat, 12)
    for name in summed._defaults:
        setattr(summed, name, sum(getattr(rank, name) for rank in ranks))
    summed._update_count = 1
    assert float(summed.compute()) == pytest.approx(float(whole.compute()), rel=1e-9)
    assert summed.compute().dtype == torch.float64


def test_frechet_does_not_save_its_network() -> None:
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 4))
    metric = FrechetDistance(network, 4)
    metric.persistent(True)
    assert not list(metric.children()) and not [key for key in metric.state_dict() if "weight" in key]


def test_frechet_needs_images() -> None:
    metric = FrechetDistance(flat, 12)
    metric.update(torch.zeros(4, 3, 2, 2), real=True)
    with pytest.raises(UserError, match="two fake images"):
        metric.compute()


def test_projection_finds_codes_of_generated_images() -> None:
    generator = Generator.seeded(0, output_size=8, style_dim=16, n_mapping=2, max_channels=16)
    z = torch.randn(3, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        targets = generator(z)
    average = generator.latent_average(1000)
    before = mse_per_image(generator.synthesis(average.expand(3, -1)), targets).detach()
    codes = project(generator, targets, average, mse_per_image, steps=200)
    after = mse_per_image(generator.synthesis(codes), targets).detach()
    assert codes.shape == (3, generator.n_styles, 16) and not codes.requires_grad
    assert (after < 0.02 * before).all(), (before, after)
    assert all(p.requires_grad and p.grad is None for p in generator.parameters()), "the generator must not change"
