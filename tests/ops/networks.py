"""Values that a generator and a discriminator compute in training, to compare kernels and precisions."""

from __future__ import annotations

import torch
from torch import Tensor

from psp_lightning.models.discriminator import Discriminator
from psp_lightning.models.stylegan2 import Generator
from psp_lightning.ops.check import relative_error

# Largest errors relative to the largest value, of networks of twenty layers. Half precision rounds in each of them: the
# bounds are twice the errors of plain PyTorch on a CPU.
BOUNDS = {None: 1e-3, torch.float16: 0.04, torch.bfloat16: 0.26}


def network_values(device: torch.device, half: torch.dtype | None) -> dict[str, Tensor]:
    """Return images, the gradients of a path-length penalty and those of the discriminator's score, by name."""
    torch.manual_seed(0)
    generator = Generator(64, style_dim=64, n_mapping=2, max_channels=64)
    for name, parameter in generator.named_parameters():
        if name.endswith("noise.weight"):
            torch.nn.init.constant_(parameter, 0.2)
    discriminator = Discriminator(64, 2048, 64)
    for network in (generator, discriminator):
        network.to(device).to(memory_format=torch.channels_last)
        network.use_half(None if half is None else 16, half or torch.bfloat16)
    z = torch.randn(4, 64, generator=torch.Generator().manual_seed(1)).to(device)
    of_generator, of_both = dict(generator.named_parameters()), dict(generator.named_parameters())
    of_both |= {f"discriminator.{name}": parameter for name, parameter in discriminator.named_parameters()}

    w = generator.mapping(z)[:, None].repeat(1, generator.n_styles, 1)
    images = generator.synthesis(w)
    # divided as for path lengths: gradients of a mean would be too small for float16
    length = (images * images.detach().sin()).sum() / images[0].numel() ** 0.5
    (slope,) = torch.autograd.grad(length, w, create_graph=True)
    values = {"images": images, "slope": slope}
    for label, loss, named in (
        ("path", slope.square().sum(), of_generator),
        ("score", discriminator(images).sum(), of_both),
    ):
        grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True, retain_graph=True)
        found = {name: grad for name, grad in zip(named, grads, strict=True) if grad is not None}
        # Sums of du * noise over whole maps cancel, so they are compared with the largest of all layers.
        strengths = [found.pop(name) for name in list(found) if name.endswith("noise.weight")]
        values |= {f"{label} {name}": grad for name, grad in found.items()} | {f"{label} noise": torch.cat(strengths)}
    return values


def assert_networks_agree(found: dict[str, Tensor], expected: dict[str, Tensor], half: torch.dtype | None) -> None:
    """Compare the values of `network_values` in the precision `half` with those in float32."""
    assert found.keys() == expected.keys()
    errors = {name: relative_error(found[name], value) for name, value in expected.items()}
    wrong = [f"{name}: {error:.1e}" for name, error in errors.items() if not error <= BOUNDS[half]]
    assert not wrong, wrong
