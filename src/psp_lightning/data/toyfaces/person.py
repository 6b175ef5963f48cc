"""The numbers that describe a drawn face, drawn at random: who it shows (`Person`) and how it is seen (`Scene`).

Lengths are fractions of the picture's width, angles are in radians. The origin is the centre of the head, with x to the
right, y down and z towards the viewer.
"""

from __future__ import annotations

import colorsys
from dataclasses import dataclass, replace

import numpy as np

Color = tuple[float, float, float]  # RGB in 0..255

SKINS = [
    (255, 224, 196), (244, 205, 170), (232, 184, 146), (214, 160, 120), (186, 128, 90), (150, 98, 66), (108, 70, 48),
]  # fmt: skip
HAIRS = [
    (28, 22, 22), (58, 38, 28), (96, 60, 36), (140, 92, 50), (196, 146, 78), (232, 200, 130), (150, 62, 32),
    (196, 92, 44), (150, 146, 142), (222, 218, 212), (92, 60, 130), (46, 92, 140),  # the last four: grey, white, dyed
]  # fmt: skip
EYES = [(70, 44, 26), (104, 68, 34), (120, 104, 50), (72, 116, 70), (70, 118, 168), (108, 142, 166), (60, 60, 66)]
STYLES = ("bald", "buzz", "part", "quiff", "curly", "afro", "bob", "fringe", "long", "wavy", "bun", "receding")
STYLE_WEIGHTS = np.array([4, 6, 14, 10, 8, 6, 11, 11, 13, 10, 7, 5], float)


@dataclass(frozen=True)
class Person:
    """The features of a person, the same in all pictures."""

    width: float
    top: float
    chin: float
    jaw: float
    square: float
    skin: Color
    hair: Color
    style: str
    side: float
    volume: float
    length: float
    hairline: float
    eye_x: float
    eye_y: float
    eye_w: float
    eye_h: float
    eye_tilt: float
    iris: Color
    lashes: float
    brow_y: float
    brow_w: float
    brow_thick: float
    brow_tilt: float
    nose_w: float
    nose_len: float
    mouth_y: float
    mouth_w: float
    lip_up: float
    lip_down: float
    lip: Color
    ear: float
    blush: float
    freckles: bool
    beard: str
    glasses: str
    glasses_w: float
    glasses_h: float
    glasses_round: float
    frame: Color
    frame_thick: float
    earrings: bool
    jewel: Color
    hat: str
    hat_color: Color


@dataclass(frozen=True)
class Scene:
    """The pose, expression and surroundings, different in each picture."""

    yaw: float
    pitch: float
    roll: float
    dx: float
    dy: float
    scale: float
    light_x: float
    light_y: float
    light: float
    warm: float
    smile: float
    open: float
    lids: float
    brows: float
    gaze_x: float
    gaze_y: float
    cloth: Color
    cloth2: Color
    collar: str
    necklace: bool
    backdrop: str
    back: Color
    back2: Color
    back_angle: float
    blobs: tuple[tuple[float, float, float, float], ...]

    def neutral(self) -> Scene:
        """Return the scene with a frontal pose and even light."""
        return replace(self, yaw=0.0, pitch=0.0, roll=0.0, light_x=0.0, light_y=-0.35, light=0.7, warm=0.0)


def _hsv(hue: float, saturation: float, value: float) -> Color:
    r, g, b = colorsys.hsv_to_rgb(hue % 1.0, saturation, value)
    return (255 * r, 255 * g, 255 * b)


def _vary(rng: np.random.Generator, color: tuple[float, ...], amount: float) -> Color:
    r, g, b = np.clip(np.asarray(color) * (1 + rng.normal(0, amount)) + rng.normal(0, 60 * amount, 3), 0, 255)
    return (float(r), float(g), float(b))


def mix(a: Color, b: Color, share: float) -> Color:
    """Mix two colours with a share of `b`."""
    return tuple(x + (y - x) * share for x, y in zip(a, b, strict=True))  # type: ignore[return-value]


def draw_person(rng: np.random.Generator) -> Person:
    """Draw a person, always taking the same numbers in the same order from `rng`."""

    def near(mean: float, deviation: float) -> float:
        return float(mean + deviation * np.clip(rng.normal(), -2, 2))

    def pick(options: tuple[str, ...], weights: list[float] | np.ndarray) -> str:
        weights = np.asarray(weights, float)
        return options[int(rng.choice(len(options), p=weights / weights.sum()))]

    tone = rng.uniform(0, len(SKINS) - 1.001)
    low = int(tone)
    skin = _vary(rng, mix(SKINS[low], SKINS[low + 1], tone - low), 0.03)
    dark = tone > 3.6
    hair = _vary(rng, HAIRS[int(rng.integers(0, 3 if dark else len(HAIRS)))], 0.06)
    style = pick(STYLES, STYLE_WEIGHTS)
    share = {"bald": 0.05, "buzz": 0.15, "receding": 0.0, "long": 0.9, "wavy": 0.95, "bun": 0.95}.get(style, 0.5)
    feminine = rng.random() < share
    red = (196, 60, 78) if feminine and rng.random() < 0.4 else (190, 96, 92)
    beard = pick(("none", "full", "stubble", "moustache", "goatee"), [5, 2.2, 1.6, 1, 1])
    return Person(
        width=near(0.235, 0.016) * (0.98 if feminine else 1.02),
        top=near(0.335, 0.012),
        chin=near(0.335, 0.018),
        jaw=near(0.3 if feminine else 0.2, 0.07),
        square=near(0.9 if feminine else 0.8, 0.07),
        skin=skin,
        hair=hair,
        style=style,
        side=float(rng.choice([-1.0, 1.0])),
        volume=near(0.055, 0.014),
        length=float(rng.uniform(0, 1)),
        hairline=near(-0.19, 0.018),
        eye_x=near(0.108, 0.007),
        eye_y=near(-0.045, 0.008),
        eye_w=near(0.056, 0.005),
        eye_h=near(0.033 if feminine else 0.028, 0.005),
        eye_tilt=near(0.004, 0.006),
        iris=_vary(rng, EYES[int(rng.integers(0, 2 if dark else len(EYES)))], 0.06),
        lashes=near(0.011 if feminine else 0.0065, 0.0015),
        brow_y=near(0.068, 0.007),
        brow_w=near(0.07, 0.006),
        brow_thick=near(0.012 if feminine else 0.019, 0.003),
        brow_tilt=near(0.0, 0.008),
        nose_w=near(0.047 if feminine else 0.054, 0.007),
        nose_len=near(0.125, 0.012),
        mouth_y=near(0.178, 0.01),
        mouth_w=near(0.088, 0.01),
        lip_up=near(0.018, 0.004),
        lip_down=near(0.024, 0.005),
        lip=mix(skin, _vary(rng, red, 0.04), 0.75 if feminine else 0.42),
        ear=near(0.058, 0.008),
        blush=float(rng.uniform(0.1, 0.45) if feminine else rng.uniform(0, 0.25)),
        freckles=bool(rng.random() < 0.1 and tone < 3),
        beard="none" if feminine else beard,
        glasses=pick(("none", "clear", "sun"), [7, 2.6, 0.7]),
        glasses_w=near(0.087, 0.005),
        glasses_h=near(0.066, 0.008),
        glasses_round=float(rng.choice([2.0, 2.6, 4.0])),
        frame=[(32, 30, 34), (120, 72, 40), (170, 40, 50), (196, 168, 96), (40, 70, 130)][int(rng.integers(5))],
        frame_thick=near(0.0115, 0.003),
        earrings=bool(feminine and rng.random() < 0.4),
        jewel=[(236, 200, 90), (220, 224, 232), (210, 60, 90), (60, 150, 170)][int(rng.integers(4))],
        hat=pick(("none", "beanie", "cap"), [13, 1, 1]),
        hat_color=_hsv(rng.random(), rng.uniform(0.35, 0.8), rng.uniform(0.35, 0.9)),
    )


def draw_scene(rng: np.random.Generator) -> Scene:
    """Draw the pose, light, expression, clothes and backdrop of one picture."""

    def near(deviation: float) -> float:
        return float(deviation * np.clip(rng.normal(), -2.2, 2.2))

    hue = float(rng.random())
    value = float(rng.uniform(0.35, 0.95))
    cloth_hue = float(rng.random())
    angle = float(rng.uniform(-np.pi, 0))
    aside = float(rng.uniform(0.2, 1))
    return Scene(
        yaw=near(0.27),
        pitch=near(0.13),
        roll=near(0.07),
        dx=near(0.006),
        dy=near(0.006),
        scale=1.1 + near(0.025),
        light_x=float(np.cos(angle)) * aside,
        light_y=float(np.sin(angle)) * aside * 0.8,
        light=float(rng.uniform(0.45, 1.1)),
        warm=near(0.05),
        smile=float(rng.uniform(-0.25, 1.0)),
        open=float(max(0.0, rng.uniform(-0.9, 1.0))),
        lids=float(rng.uniform(0.78, 1.08)),
        brows=near(0.008),
        gaze_x=near(0.4),
        gaze_y=near(0.2),
        cloth=_hsv(cloth_hue, rng.uniform(0.1, 0.75), rng.uniform(0.25, 0.95)),
        cloth2=_hsv(cloth_hue + rng.uniform(0.3, 0.7), rng.uniform(0.05, 0.6), rng.uniform(0.3, 0.98)),
        collar=("crew", "vee", "shirt", "stripes")[int(rng.integers(4))],
        necklace=bool(rng.random() < 0.12),
        backdrop=("plain", "gradient", "bokeh", "wall", "stripes", "hills")[int(rng.integers(6))],
        back=_hsv(hue, rng.uniform(0.08, 0.55), value),
        back2=_hsv(
            hue + rng.normal(0, 0.12), rng.uniform(0.08, 0.6), float(np.clip(value + rng.normal(0, 0.22), 0.15, 1))
        ),
        back_angle=float(rng.uniform(0, 2 * np.pi)),
        blobs=tuple(tuple(float(v) for v in rng.random(4)) for _ in range(7)),  # type: ignore[misc]
    )
