"""The objectives of a generator and its discriminator.

Source: Karras et al., StyleGAN2 (arXiv:1912.04958): non-saturating logistic loss, R1 (Mescheder et al.,
arXiv:1801.04406, equation 9) and path-length regularisation (section 3.2, equation 4).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def generator_loss(fake_scores: Tensor) -> Tensor:
    """Return the mean of -log(sigmoid(score)) over the scores (B,) of generated images."""
    return F.softplus(-fake_scores).mean()


def discriminator_loss(real_scores: Tensor, fake_scores: Tensor) -> Tensor:
    """Return the mean of -log(1 - sigmoid(fake)) plus the mean of -log(sigmoid(real)) over scores (B,)."""
    return F.softplus(fake_scores).mean() + F.softplus(-real_scores).mean()


def r1_penalty(real_scores: Tensor, images: Tensor) -> Tensor:
    """Return the mean squared norm of the gradient of the scores with respect to the real images or codes.

    R1 is this value times gamma / 2. It is differentiable with respect to the weights of the discriminator. The scores
    (B,) are computed from the images (B, C, H, W) or codes (B, style_dim), which must require a gradient.
    """
    (grad,) = torch.autograd.grad(real_scores.sum(), images, create_graph=True)
    return grad.square().sum(tuple(range(1, grad.ndim))).mean()


def path_lengths(images: Tensor, w_plus: Tensor, noise: Tensor) -> Tensor:
    """Return the norm of `J_w^T y`: how far the image moves in a random direction when the style moves.

    Args:
        images: (B, C, H, W), made from `w_plus`.
        w_plus: (B, n_styles, style_dim), must require a gradient.
        noise: standard normal, with the shape of `images`.

    Returns:
        (B,): the root mean square over styles of the norm over style_dim; differentiable.
    """
    noise = noise / math.sqrt(images.shape[2] * images.shape[3])
    (grad,) = torch.autograd.grad((images * noise).sum(), w_plus, create_graph=True)
    return grad.square().sum(2).mean(1).sqrt()
