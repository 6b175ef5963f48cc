"""Discriminator: shapes, minibatch standard deviation, the filtered shortcut, half precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from psp_lightning.models.discriminator import Discriminator, EqualisedConv, minibatch_std
from psp_lightning.models.layers import HalfPrecision
from psp_lightning.models.stylegan2 import Generator
from psp_lightning.ops import fir_filter, upfirdn2d
from psp_lightning.utils.errors import UserError


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("size", [8, 16, 32, 64, 128, 256])
def test_shapes(size: int) -> None:
    network = Discriminator(size, channel_base=64, max_channels=8)
    x = torch.randn(2, 3, size, size, requires_grad=True)
    scores = network(x)
    assert scores.shape == (2,) and scores.dtype == torch.float32
    (grad,) = torch.autograd.grad(scores.sum(), x)
    assert grad.abs().amax((1, 2, 3)).gt(0).all(), "the score does not depend on every image"
    assert len(network.blocks) == size.bit_length() - 3


def test_published_widths() -> None:
    """StyleGAN2's table for 1024 px: 32 channels at 1024, 64 at 512, ..., 512 from 64 on."""
    with torch.device("meta"):
        network = Discriminator(1024)
    widths = [block.conv1.weight.shape[0] for block in network.blocks]
    assert widths == [32, 64, 128, 256, 512, 512, 512, 512]
    assert network.conv.weight.shape == (512, 513, 3, 3)
    assert sum(p.numel() for p in network.parameters()) == 29_012_513


@pytest.mark.parametrize(("batch", "group"), [(8, 4), (4, 4), (2, 4), (6, 4), (5, 4), (1, 4), (6, 2)])
def test_minibatch_std(batch: int, group: int) -> None:
    x = torch.randn(batch, 3, 4, 4)
    out = minibatch_std(x, group)
    assert torch.equal(out[:, :3], x)
    size = max(n for n in range(1, min(group, batch) + 1) if batch % n == 0)
    groups = batch // size
    for i in range(batch):
        members = [x[j] for j in range(batch) if j % groups == i % groups]
        assert len(members) == size
        stacked = torch.stack(members)
        expected = ((stacked - stacked.mean(0)).square().mean(0) + 1e-8).sqrt().mean()
        torch.testing.assert_close(out[i, 3], expected.expand(4, 4))


def test_ranks_form_the_groups_of_one_process() -> None:
    """Rank r has every second image. If the group size divides its batch, the groups are the same."""
    x = torch.randn(16, 2, 4, 4)
    whole = minibatch_std(x, 4)
    for rank in (0, 1):
        torch.testing.assert_close(minibatch_std(x[rank::2], 4), whole[rank::2])


def test_downsampling_shortcut_equals_filter_and_strided_convolution() -> None:
    layer = EqualisedConv(3, 5, 1, down=True, activation=False)
    x = torch.randn(2, 3, 8, 8)
    blurred = upfirdn2d(x, fir_filter(), padding=(1, 1))
    expected = F.conv2d(blurred, layer.weight / 3**0.5, stride=2)
    torch.testing.assert_close(layer(x), expected)


def test_downsampling_keeps_a_constant_image_and_halves_it() -> None:
    layer = EqualisedConv(1, 1, 1, down=True, activation=False)
    with torch.no_grad():
        layer.weight.fill_(1)
    out = layer(torch.full((1, 1, 16, 16), 0.5))
    assert out.shape == (1, 1, 8, 8)
    torch.testing.assert_close(out[..., 1:-1, 1:-1], torch.full((1, 1, 6, 6), 0.5))


def test_activations_stay_of_order_one() -> None:
    """Equalised learning rates and the factor of the residual sum ensure this. The low-pass reduces white noise."""
    network = Discriminator(32, channel_base=2048, max_channels=64)
    x = network.from_rgb(torch.randn(8, 3, 32, 32))
    for block in network.blocks:
        x = block(x)
        assert 0.1 < x.square().mean() < 2, x.square().mean()


class Rounded(TorchDispatchMode):
    """A mode that computes each sum of products of half-precision tensors in float32 and rounds the result. This is the
    best that a processor may do. PyTorch computes all other operations in this way by itself."""

    SUMS = {
        getattr(torch.ops.aten, name).default for name in ("convolution", "convolution_backward", "mm", "addmm", "bmm")
    }

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        dtypes = {leaf.dtype for leaf in tree_leaves(args) if isinstance(leaf, Tensor)}
        if func not in self.SUMS or not dtypes & {torch.bfloat16, torch.float16}:
            return func(*args, **(kwargs or {}))
        (dtype,) = dtypes
        wide = tree_map(lambda leaf: leaf.float() if isinstance(leaf, Tensor) else leaf, args)
        return tree_map(
            lambda leaf: leaf.to(dtype) if isinstance(leaf, Tensor) else leaf, func(*wide, **(kwargs or {}))
        )


def discriminator_values(device: str) -> tuple[HalfPrecision, Callable[[], list[Tensor]]]:
    """Return a discriminator and a function for its scores, their gradients and, on a GPU, the gradients of R1."""
    network = Discriminator(32, channel_base=256, max_channels=16).to(device)
    x, weight = torch.randn(4, 3, 32, 32).to(device), network.blocks[0].conv1.weight

    def run() -> list[Tensor]:
        images = x.clone().requires_grad_()
        scores = network(images)
        grads = torch.autograd.grad(scores.sum(), [images, weight], create_graph=device == "cuda")
        second = torch.autograd.grad(grads[0].square().sum(), weight) if device == "cuda" else ()
        return [scores, *grads, *second]

    return network, run


def generator_values(device: str) -> tuple[HalfPrecision, Callable[[], list[Tensor]]]:
    """Return a generator and a function for images, gradients and, on a GPU, those of the path-length penalty."""
    network = Generator(32, style_dim=16, n_mapping=2, channel_multiplier=1, channel_base=256, max_channels=16)
    w_plus = network.mapping(torch.randn(4, 16))[:, None].expand(-1, network.n_styles, -1).detach().to(device)
    noise, weight = torch.randn(4, 3, 32, 32).to(device) / 32, network.to(device).convs[-1].conv.weight

    def run() -> list[Tensor]:
        codes = w_plus.clone().requires_grad_()
        images = network.synthesis(codes)
        grads = torch.autograd.grad((images * noise).sum(), [codes, weight], create_graph=device == "cuda")
        second = torch.autograd.grad(grads[0].square().sum(), weight) if device == "cuda" else ()
        return [images, *grads, *second]

    return network, run


@pytest.mark.usefixtures("full_float32")
@pytest.mark.parametrize("values", [discriminator_values, generator_values], ids=["discriminator", "generator"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "device",
    [
        "cpu",  # LitGenerator never differentiates twice in half precision on a CPU
        pytest.param(
            "cuda",
            marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
        ),
    ],
)
def test_half_precision_is_as_close_as_rounding_allows(values: Any, dtype: torch.dtype, device: str) -> None:
    """Compare means over draws: in a single draw, leaky ReLUs whose sign depends on rounding can double the error."""
    found, allowed = [], []
    for draw in range(6):
        torch.manual_seed(draw)
        network, run = values(device)
        exact = run()
        network.use_half(16, dtype)
        half = run()
        with Rounded():
            rounded = run()
        assert {t.dtype for t in half} == {torch.float32}
        for errors, results in ((found, half), (allowed, rounded)):
            errors.append([((a - b).norm() / b.norm()).item() for a, b in zip(results, exact, strict=True)])
    names = ("values", "gradient of the input", "gradient of a weight", "second derivative")
    means = torch.tensor([found, allowed]).mean(1).T.tolist()
    medians = torch.tensor(allowed).quantile(0.5, 0).tolist()  # one changed sign can triple the error of its draw
    for name, (error, least), typical in zip(names, means, medians, strict=False):  # a CPU has no second derivative
        # bfloat16 has 8 bits of mantissa, float16 11; two blocks of convolutions, passed again for each derivative
        assert 0 < typical < (0.15 if dtype == torch.bfloat16 else 0.03), f"{name}, rounded: {typical:.4f}"
        assert 0 < error < 2 * least, f"{name}: {error:.4f}, rounding gives {least:.4f}"


def test_half_precision_changes_no_state_dict() -> None:
    network = Discriminator(16, 64, 8)
    before = {key: value.dtype for key, value in network.state_dict().items()}
    network.use_half(8)
    assert {key: value.dtype for key, value in network.state_dict().items()} == before
    assert set(before.values()) == {torch.float32}


@pytest.mark.parametrize("size", [0, 4, 12, 48, 100])
def test_sizes_that_are_not_a_power_of_two(size: int) -> None:
    with pytest.raises(UserError, match=f"input_size={size}.*power of two"):
        Discriminator(size)


@pytest.mark.parametrize("name", ["channel_base", "max_channels", "image_channels", "group"])
def test_counts_below_one(name: str) -> None:
    with pytest.raises(UserError, match=f"{name}=0"):
        Discriminator(8, **{name: 0})


@pytest.mark.parametrize("shape", [(2, 3, 32, 32), (2, 3, 16, 8), (2, 1, 16, 16), (3, 16, 16)])
def test_images_of_another_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match=r"takes images \(B, 3, 16, 16\)"):
        Discriminator(16, 64, 8)(torch.zeros(shape))
