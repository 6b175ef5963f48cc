"""Augmentation of a discriminator's images: the filter, the warp, each transformation, averages, random numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from psp_lightning.data import augment as module
from psp_lightning.data.augment import SYM6, augment, warp
from psp_lightning.lit.rng import StepRNG

INSIDE = (..., slice(8, -8), slice(8, -8))


def smooth(side: int = 32) -> Tensor:
    """Return an image without symmetry, float64 (1, 3, side, side)."""
    steps = torch.linspace(-1, 1, side, dtype=torch.float64)
    y, x = torch.meshgrid(steps, steps, indexing="ij")
    return torch.stack([(3 * x + 1).sin() * (2 * y).cos(), 0.7 * x + 0.2 * y, (-4 * (x - 0.2) ** 2 - 4 * y**2).exp()])[
        None
    ]


def matrix(*rows: tuple[float, float, float]) -> Tensor:
    return torch.tensor([[*rows, (0, 0, 1)]], dtype=torch.float64)


IDENTITY = matrix((1, 0, 0), (0, 1, 0))


# --- the wavelet


def test_sym6_is_an_orthonormal_low_pass() -> None:
    taps = np.array(SYM6)
    assert taps.sum() == pytest.approx(math.sqrt(2), abs=1e-9)
    for shift in range(0, len(taps), 2):
        product = (taps[shift:] * taps[: len(taps) - shift]).sum()
        assert product == pytest.approx(1.0 if shift == 0 else 0.0, abs=1e-9), f"shift {shift}"


def test_sym6_has_six_vanishing_moments() -> None:
    high = np.array(SYM6)[::-1] * (-1.0) ** np.arange(len(SYM6))
    positions = (np.arange(len(SYM6)) - 5.5) / 5.5
    for power in range(6):
        assert (high * positions**power).sum() == pytest.approx(0, abs=1e-8), f"moment {power}"
    assert abs((high * positions**6).sum()) > 1e-3


# --- the warp


@pytest.mark.parametrize("side", [8, 16, 32, 64])
def test_identity_gives_the_image_back(side: int) -> None:
    image = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0)).double()
    out = warp(image, IDENTITY.expand(2, 3, 3))
    assert out.shape == image.shape
    inner = (..., slice(3, -3), slice(3, -3))
    torch.testing.assert_close(out[inner], image[inner], atol=1e-9, rtol=0)
    assert (out - image).abs().max() < 0.5, "noise at the border"
    assert (warp(smooth(), IDENTITY) - smooth()).abs().max() < 0.02


@pytest.mark.parametrize(
    ("map_", "expected"),
    [
        (matrix((-1, 0, 0), (0, 1, 0)), smooth().flip(-1)),
        (matrix((1, 0, 0), (0, -1, 0)), smooth().flip(-2)),
        (matrix((-1, 0, 0), (0, -1, 0)), smooth().flip(-1, -2)),
        (matrix((0, 1, 0), (1, 0, 0)), smooth().transpose(-1, -2)),
        (matrix((0, -1, 0), (1, 0, 0)), smooth().rot90(1, (-2, -1))),
    ],
    ids=["mirror", "upside down", "half turn", "transposed", "quarter turn"],
)
def test_symmetries_of_the_square_cause_no_shift(map_: Tensor, expected: Tensor) -> None:
    assert (warp(smooth(), map_) - expected)[INSIDE].abs().max() < 2e-3
    assert (warp(smooth(), map_) - expected).abs().max() < 0.03


@pytest.mark.parametrize("shift", [(3, 0), (0, -2), (5, 4)])
def test_whole_pixels_are_shifted_exactly(shift: tuple[int, int]) -> None:
    x, y = shift
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)).double()
    out = warp(image, matrix((1, 0, 2 * x / 32), (0, 1, 2 * y / 32)))
    torch.testing.assert_close(out[INSIDE], image.roll((-y, -x), (-2, -1))[INSIDE], atol=1e-9, rtol=0)


def test_half_a_pixel_of_a_ramp() -> None:
    ramp = torch.arange(32, dtype=torch.float64).expand(1, 1, 32, 32) / 32
    out = warp(ramp, matrix((1, 0, 1 / 32), (0, 1, 0)))
    torch.testing.assert_close(out[INSIDE], ramp[INSIDE] + 0.5 / 32, atol=1e-6, rtol=0)


def test_beyond_the_border_the_image_is_mirrored() -> None:
    image = smooth()
    out = warp(image, matrix((1, 0, 2 * 10 / 32), (0, 1, 0)))  # the pixel 10 pixels to the right
    mirrored = torch.cat([image, image.flip(-1)[..., 1:]], -1)[..., 10:42]
    assert (out - mirrored)[..., 8:-8, :].abs().max() < 0.03
    far = warp(image, matrix((1, 0, 2 * 62 / 32), (0, 1, 0)))  # a full period of the mirrored image
    assert (far - image)[INSIDE].abs().max() < 1e-9


def test_shrinking_averages() -> None:
    """A fine checkerboard shrunk by two becomes grey instead of aliasing."""
    board = ((torch.arange(32)[:, None] + torch.arange(32)) % 2).double()[None, None]
    out = warp(board, matrix((2, 0, 0), (0, 2, 0)))
    assert (out[INSIDE] - 0.5).abs().max() < 0.12


# --- the transformations, one at a time


def geometry(monkeypatch: pytest.MonkeyPatch, which: int, value: float, side: int = 32) -> Tensor:
    """Return the (3, 3) matrix if only transformation `which` is applied, with the drawn number `value`."""
    return _only(monkeypatch, which, lambda source: module._geometry(1, side, 0.5, source), value)[0].double()


def colours(monkeypatch: pytest.MonkeyPatch, which: int, value: float) -> Tensor:
    return _only(monkeypatch, which, lambda source: module._colours(1, 0.5, source), value)[0].double()


def _only(monkeypatch: pytest.MonkeyPatch, which: int, make: Callable[[Any], Tensor], value: float) -> Tensor:
    asked = 0

    def when(n: int, p: float, draws, values: Tensor, neutral: float) -> Tensor:
        nonlocal asked
        asked += 1
        return values if asked == which else torch.full_like(values, neutral)

    class Constant:
        def normal(self, n: int, *shape: int) -> Tensor:
            return torch.full((n, *shape), value)

        uniform = normal

    monkeypatch.setattr(module, "_when", when)
    return make(Constant())


def rows(*numbers: tuple[float, ...]) -> Tensor:
    size = len(numbers) + 1
    return torch.tensor([*numbers, (0.0,) * (size - 1) + (1.0,)], dtype=torch.float64)


LN2 = math.log(2)


@pytest.mark.parametrize(
    ("which", "value", "expected"),
    [
        (0, 0.7, rows((1, 0, 0), (0, 1, 0))),  # nothing is applied
        (1, 0.7, rows((-1, 0, 0), (0, 1, 0))),
        (1, 0.3, rows((1, 0, 0), (0, 1, 0))),  # half of the mirror operations change nothing
        (2, 0.3, rows((0, -1, 0), (1, 0, 0))),
        (2, 0.6, rows((-1, 0, 0), (0, -1, 0))),
        (3, 1.0, rows((1, 0, 0.25), (0, 1, 0.25))),  # an eighth of the side: 4 of 32 pixels, in units of half a side
        (3, 0.55, rows((1, 0, 0), (0, 1, 0))),  # 0.4 pixels are rounded
        (4, 1.0, rows((2**-0.2, 0, 0), (0, 2**-0.2, 0))),
        (5, 0.75, rows((0, -1, 0), (1, 0, 0))),
        (6, 1.0, rows((2**-0.2, 0, 0), (0, 2**0.2, 0))),
        (7, 0.75, rows((0, -1, 0), (1, 0, 0))),
        (8, 1.0, rows((1, 0, 0.25), (0, 1, 0.25))),
    ],
)
def test_geometry(which: int, value: float, expected: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.testing.assert_close(geometry(monkeypatch, which, value), expected, atol=1e-6, rtol=0)


def test_brightness(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = rows((1, 0, 0, 0.2), (0, 1, 0, 0.2), (0, 0, 1, 0.2))
    torch.testing.assert_close(colours(monkeypatch, 1, 1.0), expected, atol=1e-6, rtol=0)


def test_contrast(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = torch.diag(torch.tensor([2**0.5, 2**0.5, 2**0.5, 1], dtype=torch.float64))
    torch.testing.assert_close(colours(monkeypatch, 2, 1.0), expected, atol=1e-6, rtol=0)


def test_luma_flip_negates_grey_and_keeps_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    change = colours(monkeypatch, 3, 0.7)
    grey, colour = torch.tensor([1.0, 1, 1, 1]).double(), torch.tensor([1.0, -0.5, -0.5, 1]).double()
    torch.testing.assert_close(change @ grey, torch.tensor([-1.0, -1, -1, 1]).double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(change @ colour, colour, atol=1e-6, rtol=0)


def test_a_third_of_a_hue_circle_permutes_the_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    change = colours(monkeypatch, 4, 0.5 + 1 / 3)
    red = torch.tensor([1.0, 0, 0, 1]).double()
    torch.testing.assert_close(change @ red, torch.tensor([0.0, 1, 0, 1]).double(), atol=1e-6, rtol=0)


def test_saturation(monkeypatch: pytest.MonkeyPatch) -> None:
    change = colours(monkeypatch, 5, 1.0)
    grey, colour = torch.tensor([1.0, 1, 1, 1]).double(), torch.tensor([1.0, -0.5, -0.5, 1]).double()
    torch.testing.assert_close(change @ grey, grey, atol=1e-6, rtol=0)
    torch.testing.assert_close(change @ colour, colour * torch.tensor([2, 2, 2, 1]), atol=1e-6, rtol=0)


def test_recolouring_a_grey_image_is_brightness_and_contrast() -> None:
    change = torch.eye(4)[None].clone()
    change[:, :3, :3] *= 1.5
    change[:, :3, 3] = 0.1
    image = torch.rand(1, 1, 4, 4)
    torch.testing.assert_close(module._recolour(image, change), image * 1.5 + 0.1)
    image = torch.rand(1, 3, 4, 4)
    torch.testing.assert_close(module._recolour(image, change), image * 1.5 + 0.1)


# --- all of them


def draws(step: int = 0, **kwargs: int) -> StepRNG:
    return StepRNG(0, step, 1, **kwargs)


def test_probability_zero_is_the_same_object() -> None:
    image = torch.zeros(2, 3, 8, 8)
    assert augment(image, 0.0, draws()) is image


@pytest.mark.parametrize("p", [0.1, 0.5, 1.0])
def test_probabilities(p: float) -> None:
    """Check the share of images that no transformation changes."""
    n = 4000
    change = module._geometry(n, 32, p, draws())
    eye = torch.eye(3)
    untouched = (change - eye).abs().amax((1, 2)).lt(1e-6).float().mean().item()
    # A mirror changes nothing in half of the cases, quarter turns in one of four. The two rotations together have
    # probability p. Combinations that cancel (mirror and half a turn, two quarter turns) are not counted here.
    once = (1 - p / 2) * (1 - 3 * p / 4) * (1 - p) ** 5
    assert untouched == pytest.approx(once, abs=0.02 + 0.02 * p)


def test_the_average_is_unbiased() -> None:
    """All directions are equal: over many draws, mirrors, turns and shifts cancel, and sizes keep their median."""
    change = module._geometry(20_000, 64, 1.0, draws()).double()
    error = 4 / math.sqrt(20_000)  # four standard deviations of entries of order one
    assert change[:, :2].mean(0).abs().max() < error
    area = change[:, :2, :2].det().abs()
    assert area.log().median().abs() < 4 * 1.25 * 0.4 * LN2 / math.sqrt(20_000)
    assert area.log().std() == pytest.approx(2 * 0.2 * LN2, rel=0.03)
    moved = change[:, :2, 2].std(0)
    assert moved[0] == pytest.approx(moved[1].item(), rel=0.05)


def test_colours_are_unbiased() -> None:
    change = module._colours(20_000, 1.0, draws()).double()
    assert change[:, :3, 3].mean(0).abs().max() < 4 * 0.35 / math.sqrt(20_000)
    assert torch.equal(change[:, 3], torch.tensor([0.0, 0, 0, 1]).double().expand(20_000, 4))
    grey = change[:, :3, :3] @ torch.ones(3).double() / 3**0.5
    scale = grey.norm(dim=1)
    assert scale.log().mean().abs() < 4 * 0.5 * LN2 / math.sqrt(20_000)
    assert scale.log().std() == pytest.approx(0.5 * LN2, rel=0.03)


def test_images_are_treated_independently() -> None:
    image = smooth().float().repeat(16, 1, 1, 1)
    out = augment(image, 1.0, draws())
    assert out.shape == image.shape and out.dtype == torch.float32 and out.isfinite().all()
    different = [(out[i] - out[j]).abs().max() > 1e-3 for i in range(16) for j in range(i)]
    assert all(different)


def test_channels_last_changes_no_number() -> None:
    image = torch.rand(4, 3, 32, 32)
    plain = augment(image, 1.0, draws())
    other = augment(image.to(memory_format=torch.channels_last), 1.0, draws())
    torch.testing.assert_close(plain, other, atol=1e-5, rtol=0)


# --- random numbers


@pytest.mark.parametrize("world", [1, 2, 4])
def test_several_ranks_draw_the_numbers_of_one(world: int) -> None:
    whole = StepRNG(3, 5, 0)
    expected = whole.normal(8, 2), whole.uniform(8), whole.normal(8, 1, 4, 4)
    parts = [StepRNG(3, 5, 0, rank, world) for rank in range(world)]
    for reference, shape, kind in zip(expected, ((2,), (), (1, 4, 4)), ("normal", "uniform", "normal"), strict=True):
        together = torch.empty_like(reference)
        for rank, part in enumerate(parts):
            together[rank::world] = getattr(part, kind)(8 // world, *shape)
        assert torch.equal(together, reference)


def test_draws_depend_on_nothing_else() -> None:
    first = StepRNG(1, 2, 3).normal(4)
    state = torch.get_rng_state()
    torch.rand(7)
    np.random.rand(3)
    assert torch.equal(StepRNG(1, 2, 3).normal(4), first)
    torch.set_rng_state(state)
    StepRNG(1, 2, 3).normal(4)
    assert torch.equal(torch.get_rng_state(), state), "the global stream was used"


def test_draws_differ_by_seed_step_and_purpose() -> None:
    seen = {tuple(StepRNG(*key).normal(2).tolist()) for key in np.ndindex(4, 4, 4)}
    assert len(seen) == 64
    many = StepRNG(0, 0, 0).normal(50_000)
    assert abs(many.mean()) < 0.02 and abs(many.std() - 1) < 0.02
    other = StepRNG(0, 1, 0).normal(50_000)
    assert abs((many * other).mean()) < 0.02
