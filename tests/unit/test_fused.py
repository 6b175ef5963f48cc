"""Networks for inference give the codes and images of the plain ones, and their layers are fused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from psp_lightning.inference.fused import Affine, FoldedConv, FusedEncoder
from psp_lightning.models.encoders import (
    Encoder4Editing,
    EncoderIntoW,
    EncoderIntoWPlus,
    GradualStyleEncoder,
    ReStyleEncoder,
    ReStyleEncoder4Editing,
)
from psp_lightning.models.irse import PReLU
from psp_lightning.models.psp import PSP
from psp_lightning.models.registry import ENCODERS
from psp_lightning.models.stylegan2 import Generator
from psp_lightning.utils.errors import UserError

SMALL = dict(style_dim=32, in_channels=4, input_size=32, blocks=(1, 2, 1, 1), width=8)
RESTYLE = [ReStyleEncoder, ReStyleEncoder4Editing]
CLASSES = [GradualStyleEncoder, Encoder4Editing, EncoderIntoW, EncoderIntoWPlus, *RESTYLE]


def build(cls, **kwargs):
    torch.manual_seed(0)
    styles = {} if cls is EncoderIntoW else {"n_styles": 8}
    net = cls(**{**SMALL, **styles, **kwargs})
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):  # as after training
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            nn.init.normal_(module.weight, 1, 0.2)
            nn.init.normal_(module.bias, 0, 0.2)
    return net.eval()


def source(batch=3, channels=4, side=32):
    return torch.randn(batch, channels, side, side, generator=torch.Generator().manual_seed(1))


def network(**kwargs):
    return PSP(build(GradualStyleEncoder, **kwargs), Generator.seeded(0, output_size=32, style_dim=32, n_mapping=2,
               max_channels=16), torch.linspace(-1, 1, 32)).eval()  # fmt: skip


def relative(actual, expected):
    return float((actual - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("mode", ["ir", "ir_se"])
@torch.no_grad()
def test_fused_encoder_equals_the_plain_one(cls, mode, pack):
    net, x = build(cls, mode=mode), source()
    image = [source(1, 3, 64)] if cls in RESTYLE else []
    expected = net(x, *image)
    fused = FusedEncoder(net, pack=pack)
    for batch in (3, 1, 2):  # the first batch reorders the weights
        assert relative(fused(x[:batch], *image), expected[:batch]) < 1e-4
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in fused.modules())
    assert torch.equal(net(x, *image), expected), "the plain network must not change"


def test_every_registered_encoder_is_tested():
    ours = {name for name, cls in ENCODERS.items() if cls.__module__.startswith("psp_lightning.")}
    assert ours == {cls.__name__ for cls in CLASSES}


@torch.no_grad()
def test_fused_encoder_in_bfloat16():
    net, x = build(GradualStyleEncoder), source()
    codes = FusedEncoder(net, torch.bfloat16)(x)
    assert codes.dtype == torch.float32 and relative(codes, net(x)) < 0.05


@torch.no_grad()
def test_layers_of_a_fused_encoder():
    fused = FusedEncoder(build(GradualStyleEncoder))
    unit = fused.network.body[0].res_layer
    assert isinstance(unit[0], Affine), "zero padding comes between this BatchNorm and its convolution"
    assert isinstance(unit[1], FoldedConv) and unit[1].bias is None
    assert isinstance(unit[3], FoldedConv) and unit[3].bias is not None and isinstance(unit[4], nn.Identity)
    assert fused.n_styles == 8 and fused.in_channels == 4
    fused.train()(source())  # no part of it can be trained
    assert not [p for p in fused.parameters() if p.requires_grad and p.shape == (8,)]


def test_a_fused_network_rejects_unsupported_calls():
    net = network().for_inference()
    for wrong, message in ((lambda: net.describe(), "not saved"), (lambda: net.double(), "not moved or cast")):
        with pytest.raises(UserError, match=message):
            wrong()
    with pytest.raises(UserError, match="bfloat16"):
        network().for_inference(torch.float16)
    with pytest.raises(UserError, match="32x32 sources"):
        net.encode(source(side=64))


def test_custom_layers_are_not_changed():
    class Doubled(nn.Conv2d):
        def forward(self, x):
            return 2 * super().forward(x)

    torch.manual_seed(0)
    net = nn.Sequential(Doubled(4, 6, 3), nn.BatchNorm2d(6), nn.Dropout(), nn.Flatten(), nn.LazyLinear(5)).eval()
    x = source()
    with torch.no_grad():
        assert relative(FusedEncoder(net)(x), net(x)) < 1e-4
        assert relative(FusedEncoder(net, torch.bfloat16)(x), net(x)) < 0.05


@torch.no_grad()
def test_network_for_inference():
    net, x = network(), source()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    codes, image = net.encode(x), net(x)
    fast = net.for_inference()
    assert relative(fast.encode(x), codes) < 1e-4 and relative(fast(x), image) < 1e-4
    assert relative(fast.for_inference()(x), image) < 1e-4
    half = net.for_inference(torch.bfloat16)
    result = half(x)
    assert result.dtype == torch.float32 and half.encode(x).dtype == torch.float32
    error = (result - image).abs() * 127.5 / image.abs().max()
    assert error.mean() < 2 and error.max() < 20, (float(error.mean()), float(error.max()))
    assert net.generator.half_from is None
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_a_users_own_activation_is_kept():
    class Shifted(PReLU):
        def forward(self, x):
            return super().forward(x) + 1

    layer, x = nn.Sequential(Shifted(3), PReLU(3)), source()[:, :3]
    fused = FusedEncoder(layer)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), layer(x))
