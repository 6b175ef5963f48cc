"""Paints a `Person` in a `Scene`.

All shapes are polygons, painted once into an image of material numbers at three times the size; picture, label map and
sketch are read off that one image, so they agree to the pixel.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from psp_lightning.data.toyperson import Color, Person, Scene, mix

SUPER = 3  # odd, so that the centre of a pixel is the centre of one sub-pixel
T = np.linspace(0, 2 * np.pi, 40, endpoint=False)
S = np.linspace(-1, 1, 13)
DEPTH = 0.21  # of the face's front above the plane of its outline

BACKGROUND, SKIN, NOSE, GLASSES, L_EYE, R_EYE, L_BROW, R_BROW, L_EAR, R_EAR = range(10)
MOUTH, U_LIP, L_LIP, HAIR, HAT, EARRING, NECKLACE, NECK, CLOTH = range(10, 19)
BLACK: Color = (26.0, 20.0, 22.0)
WHITE: Color = (250.0, 248.0, 244.0)


class Canvas:
    """Materials (colour, label, line group, how much light and blush show on them) and the polygons of them."""

    def __init__(self, person: Person, scene: Scene, size: int) -> None:
        self.size = size
        self.image = Image.new("L", (size * SUPER, size * SUPER))
        self.pen = ImageDraw.Draw(self.image)
        self.colors: list[Color] = [(0.0, 0.0, 0.0)]
        self.labels, self.groups, self.shade, self.flush = [BACKGROUND], [0], [0.0], [0.0]
        self.known: dict[tuple[object, ...], int] = {}
        self.person, self.scene = person, scene
        self.cos_yaw, self.sin_yaw = np.cos(scene.yaw), np.sin(scene.yaw)
        self.cos_pitch, self.sin_pitch = np.cos(scene.pitch), np.sin(scene.pitch)
        self.cos_roll, self.sin_roll = np.cos(scene.roll), np.sin(scene.roll)
        self.center = (0.5 + scene.dx, 0.53 + scene.dy)

    def material(self, color: Color, label: int, group: int, shade: float = 1.0, flush: float = 0.0) -> int:
        key = (color, label, group, shade, flush)
        if key not in self.known:
            self.known[key] = len(self.colors)
            self.colors.append(color)
            self.labels.append(label)
            self.groups.append(group)
            self.shade.append(shade)
            self.flush.append(flush)
        return self.known[key]

    def depth(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """How far the face comes forward at (x, y)."""
        u, v = x / (self.person.width * 1.08), y / 0.38
        return DEPTH * np.sqrt(np.clip(1 - u * u - v * v, 0, 1))

    def feature(self, x: np.ndarray, y: np.ndarray, out: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
        """A point on the face, `out` above it, turned with the head."""
        z = self.depth(x, y) + out
        turned = x * self.cos_yaw + z * self.sin_yaw
        depth = z * self.cos_yaw - x * self.sin_yaw
        return turned, y * self.cos_pitch + depth * self.sin_pitch

    def outline(self, x: np.ndarray, y: np.ndarray, z: float | np.ndarray = 0.0) -> tuple[np.ndarray, np.ndarray]:
        """A point of a silhouette: the head is about as deep as wide, so turning only shifts what is off the axis."""
        return x + z * self.sin_yaw, y + z * self.sin_pitch

    def pixels(self, x: np.ndarray, y: np.ndarray, body: bool = False) -> list[float]:
        cos, sin = (1.0, 0.0) if body else (self.cos_roll, self.sin_roll)
        k = self.size * SUPER
        points = np.empty((len(x), 2))
        points[:, 0] = (self.center[0] + self.scene.scale * (x * cos - y * sin)) * k - 0.5
        points[:, 1] = (self.center[1] + self.scene.scale * (x * sin + y * cos)) * k - 0.5
        return points.ravel().tolist()

    def fill(self, xy: tuple[np.ndarray, np.ndarray], material: int, body: bool = False) -> None:
        self.pen.polygon(self.pixels(*xy, body=body), fill=material)

    def stroke(self, xy: tuple[np.ndarray, np.ndarray], width: float, material: int, body: bool = False) -> None:
        width_px = max(1, round(width * self.size * SUPER * self.scene.scale))
        self.pen.line(self.pixels(*xy, body=body), fill=material, width=width_px, joint="curve")


def _power(t: np.ndarray, exponent: float) -> np.ndarray:
    return np.sign(t) * np.abs(t) ** exponent


def _head(p: Person, grow: float = 0.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Outline of the head as x, y, z, clockwise from the right ear."""
    cos, sin = np.cos(T), np.sin(T)
    low = np.maximum(sin, 0)
    x = (p.width + grow) * _power(cos, p.square) * (1 - p.jaw * low**1.7)
    y = np.where(sin > 0, p.chin + grow, p.top + grow) * sin
    return x, y, 0.1 * low**2


def _body(c: Canvas) -> None:
    p, s = c.person, c.scene
    neck_w = p.width * (0.5 + 0.12 * (1 - p.jaw))
    lean = 0.1 * c.sin_yaw
    neck = c.material(mix(p.skin, (90, 40, 30), 0.12), NECK, 2, 0.6)
    c.fill(
        (
            np.array([-neck_w, neck_w, neck_w * 1.12, -neck_w * 1.12]) + [lean, lean, 0, 0],
            np.array([0.1, 0.1, 0.45, 0.45]),
        ),
        neck,
        body=True,
    )
    shadow = c.material(mix(p.skin, (70, 26, 24), 0.34), NECK, 2, 0.6)
    c.fill(
        (lean + neck_w * np.append(S, [1, -1]), np.append(p.chin + 0.015 + 0.03 * (1 - S * S), [0.1, 0.1])),
        shadow,
        True,
    )
    cloth = c.material(s.cloth, CLOTH, 3, 0.6)
    drop = p.chin + 0.05
    x = np.array([-0.62, -0.5, -0.33, -neck_w * 1.25, -neck_w * 0.5, 0, neck_w * 0.5, neck_w * 1.25, 0.33, 0.5, 0.62])
    deep = {"vee": 0.12, "shirt": 0.07}.get(s.collar, 0.045)
    y = drop + np.array([0.4, 0.09, 0.035, -0.015, 0.6 * deep, deep, 0.6 * deep, -0.015, 0.035, 0.09, 0.4])
    if s.collar in ("crew", "stripes"):
        y[[4, 6]] = drop + 0.85 * deep
    if s.necklace:
        c.stroke(
            (neck_w * 0.95 * S, drop - 0.03 + 0.05 * (1 - S * S)), 0.012, c.material(p.jewel, NECKLACE, 4, 0.3), True
        )
    c.fill((x, y), cloth, body=True)
    trim = c.material(s.cloth2, CLOTH, 5, 0.6)
    if s.collar == "stripes":
        for k in range(3):
            c.stroke((0.5 * S, drop + 0.085 + 0.05 * k - 0.0 * S), 0.018, trim, body=True)
    elif s.collar == "shirt":
        for side in (-1, 1):
            c.fill(
                (side * np.array([neck_w * 1.25, 0.02, 0.1, neck_w * 1.5]), drop + np.array([-0.03, 0.07, 0.13, 0.04])),
                trim,
                body=True,
            )
    else:
        c.stroke((x[3:8], y[3:8]), 0.016, trim, body=True)


def _ears(c: Canvas) -> None:
    p = c.person
    for side, label in ((1, L_EAR), (-1, R_EAR)):
        shift = -0.35 * DEPTH * c.sin_yaw  # behind the axis of the head
        # the ear that turns away disappears behind the cheek
        x0 = side * (p.width * 0.99 - 0.06 * max(0.0, side * c.sin_yaw))
        for scale, color in ((1.0, p.skin), (0.55, mix(p.skin, (120, 40, 40), 0.3))):
            x = x0 + side * 0.01 + 0.62 * p.ear * scale * np.cos(T)
            y = 0.005 + 1.15 * p.ear * scale * np.sin(T)
            ear = c.material(color, label, 6 if scale == 1.0 else 7, 0.8)
            c.fill(c.outline(x + shift * 0.3, y, -0.03), ear)
        if p.earrings:
            c.fill(
                c.outline(x0 + side * 0.014 + 0.016 * np.cos(T), 0.08 + 0.02 * np.sin(T)),
                c.material(p.jewel, EARRING, 8, 0.2),
            )


def _bumps(x: np.ndarray, y: np.ndarray, amount: float, waves: int) -> tuple[np.ndarray, np.ndarray]:
    """Push an outline in and out `waves` times."""
    t = np.linspace(0, 2 * np.pi, len(x), endpoint=False)
    k = 1 + amount * np.abs(np.sin(0.5 * waves * t))
    return x * k, y * k


def _back_hair(c: Canvas) -> None:
    """Hair behind the neck and shoulders."""
    p = c.person
    dark = c.material(mix(p.hair, (0, 0, 0), 0.28), HAIR, 9, 0.5)
    t = np.linspace(0, 2 * np.pi, 120, endpoint=False)
    w, top = p.width + p.volume, p.top + p.volume
    cos, sin = np.cos(t), np.sin(t)
    if p.style in ("bob", "fringe", "long", "wavy"):
        length = {"bob": 0.2 + 0.1 * p.length, "fringe": 0.22 + 0.3 * p.length}.get(p.style, 0.42 + 0.2 * p.length)
        flare = 1 + (0.14 + 0.1 * p.length) * np.maximum(sin, 0)
        x, y = (w + 0.012) * _power(cos, 0.7) * flare, np.where(sin > 0, length * _power(sin, 0.6), (top - 0.01) * sin)
        if p.style == "wavy":
            x = x + 0.018 * np.sin(y * 42) * (np.abs(cos) > 0.2)
        c.fill(c.outline(x, y, -0.1), dark)
    elif p.style == "afro":
        radius = 1.28 + 0.25 * p.length
        x, y = _bumps(p.width * radius * cos, -0.1 + p.top * radius * 0.86 * sin, 0.05, 34)
        c.fill(c.outline(x, y, -0.08), dark)
    elif p.style == "curly":
        x, y = _bumps((w + 0.03) * cos, -0.08 + (top - 0.06) * sin, 0.07, 22)
        c.fill(c.outline(x, y, -0.06), dark)
    if p.style == "bun":
        x, y = 0.1 * cos, -top - 0.03 + 0.085 * sin
        c.fill(c.outline(x, y, -0.1), c.material(p.hair, HAIR, 10, 0.7))
        c.stroke(c.outline(0.07 * S, -top + 0.025 - 0.02 * S * S, -0.1), 0.01, dark)


def _face(c: Canvas) -> None:
    p = c.person
    x, y, z = _head(p)
    skin = c.material(p.skin, SKIN, 11, 1.0, 1.0)
    c.fill(c.outline(x, y, z), skin)
    if p.beard in ("full", "stubble", "goatee"):
        color = mix(p.skin, p.hair, {"full": 0.82, "stubble": 0.28, "goatee": 0.75}[p.beard])
        beard = c.material(color, SKIN, 11 if p.beard == "stubble" else 12, 0.8)
        if p.beard == "goatee":
            c.fill(c.feature(0.085 * _power(np.cos(T), 0.8), p.mouth_y + 0.055 + 0.095 * np.sin(T)), beard)
        else:
            low = np.linspace(0.03 * np.pi, 0.97 * np.pi, 24)
            outer = np.interp(low, T, x), np.interp(low, T, y), np.interp(low, T, z)
            grow = 1.03 if p.beard == "full" else 1.0
            ox, oy = c.outline(outer[0] * grow, outer[1] * grow, outer[2])
            s = np.linspace(-1, 1, 24)
            ix, iy = c.feature(s * p.width * 0.8, p.mouth_y - 0.06 - 0.1 * s**2 + 0.012 * np.cos(9 * s))
            c.fill((np.concatenate([ox, ix]), np.concatenate([oy, iy])), beard)
            clear = c.material(p.skin, SKIN, 11, 1.0, 1.0)
            c.fill(c.feature(0.5 * p.mouth_w * np.cos(T), p.mouth_y + 0.0 + 0.03 * np.sin(T)), clear)
    if p.beard in ("full", "moustache", "goatee"):
        y0 = p.mouth_y - p.lip_up - 0.022
        sx = np.concatenate([S, S[::-1]])
        sy = np.concatenate([y0 + 0.03 * S**2 - 0.006, y0 + 0.024 + 0.02 * S[::-1] ** 2])
        c.fill(c.feature(sx * p.mouth_w * 1.02, sy, 0.01), c.material(mix(p.skin, p.hair, 0.85), SKIN, 12, 0.8))
    if p.freckles:
        dot = c.material(mix(p.skin, (150, 80, 50), 0.4), SKIN, 11, 1.0)
        t = T[::5]
        for k in range(12):
            side = 1 if k % 2 else -1
            fx, fy = side * (0.06 + 0.011 * (k // 2)), 0.055 + 0.022 * ((k * 7) % 5) / 5
            c.fill(c.feature(fx + 0.0055 * np.cos(t), fy + 0.0055 * np.sin(t)), dot)


def _nose(c: Canvas) -> None:
    p, s = c.person, c.scene
    top, tip = p.eye_y + 0.01, p.eye_y + p.nose_len
    y = np.linspace(0, 1, 10)
    half = p.nose_w * (0.36 + 0.64 * np.clip((y - 0.35) / 0.65, 0, 1) ** 1.6) * np.where(y > 0.97, 0.72, 1.0)
    rise = 0.055 * y**1.3
    ys = top + y * (tip - top)
    lx, ly = c.feature(-half, ys, rise * 0.5)  # type: ignore[arg-type]
    rx, ry = c.feature(half, ys, rise * 0.5)  # type: ignore[arg-type]
    mx, my = c.feature(0 * half, ys, rise)  # type: ignore[arg-type]
    nose = c.material(mix(p.skin, WHITE, 0.05), NOSE, 11, 1.0, 0.6)
    c.fill((np.concatenate([lx, rx[::-1]]), np.concatenate([ly, ry[::-1]])), nose)
    # the side away from the light
    side = c.material(mix(p.skin, (110, 40, 30), 0.17), NOSE, 11, 1.0)
    ox, oy = (rx, ry) if s.light_x < 0 else (lx, ly)
    c.fill((np.concatenate([0.45 * mx + 0.55 * ox, ox[::-1]]), np.concatenate([my, oy[::-1]])), side)
    line = c.material(mix(p.skin, (70, 22, 20), 0.5), NOSE, 13, 1.0)
    bx, by = c.feature(p.nose_w * np.linspace(-1, 1, 9), tip + 0.013 * np.cos(np.linspace(-1, 1, 9) * 4.2), 0.04)
    c.stroke((bx, by), 0.0075, line)
    for k in (-1, 1):
        nx, ny = c.feature(k * p.nose_w * 0.48 + 0.011 * np.cos(T[::4]), tip + 0.004 + 0.0065 * np.sin(T[::4]), 0.045)
        c.fill((nx, ny), c.material(mix(p.skin, BLACK, 0.7), NOSE, 13, 1.0))


def _mouth(c: Canvas) -> None:
    p, s = c.person, c.scene
    w = p.mouth_w * (1 + 0.12 * s.smile)
    bend = 0.028 * s.smile
    gap = 0.042 * s.open
    x = w * S
    middle = p.mouth_y - bend * S**2
    arch = np.sqrt(np.clip(1 - S**2, 0, 1))
    upper_low = middle - 0.3 * gap * arch
    lower_high = middle + 0.7 * gap * arch
    bow = p.lip_up * (arch**1.2 - 0.3 * np.exp(-((S / 0.22) ** 2)))
    back = S[::-1]
    if gap > 0.004:
        inside = np.concatenate([upper_low, lower_high[::-1]])
        c.fill(c.feature(np.concatenate([x, w * back]), inside, 0.012), c.material((96, 26, 34), MOUTH, 14, 0.4))
        teeth = np.concatenate([upper_low, (upper_low + 0.45 * (lower_high - upper_low))[::-1]])
        c.fill(c.feature(0.88 * np.concatenate([x, w * back]), teeth, 0.012), c.material(WHITE, MOUTH, 15, 0.4))
    upper = np.concatenate([upper_low - bow, upper_low[::-1]])
    c.fill(c.feature(np.concatenate([x, w * back]), upper, 0.014), c.material(mix(p.lip, BLACK, 0.1), U_LIP, 16, 0.9))
    lower = np.concatenate([lower_high, (lower_high + p.lip_down * arch)[::-1]])
    c.fill(c.feature(np.concatenate([x, w * back]), lower, 0.014), c.material(p.lip, L_LIP, 17, 0.9))
    shine = c.material(mix(p.lip, WHITE, 0.3), L_LIP, 17, 0.9)
    at = int(len(S) // 2)
    c.fill(c.feature(0.03 * np.cos(T[::4]), lower_high[at] + 0.45 * p.lip_down + 0.004 * np.sin(T[::4]), 0.016), shine)
    if gap <= 0.004:
        c.stroke(c.feature(x, upper_low, 0.014), 0.006, c.material(mix(p.lip, BLACK, 0.55), U_LIP, 16, 0.9))


def _eyes(c: Canvas, grow: float) -> None:
    p, s = c.person, c.scene
    for side, label in ((1, L_EYE), (-1, R_EYE)):
        w, h = p.eye_w * grow, p.eye_h * grow * s.lids
        x0, y0 = side * p.eye_x, p.eye_y

        def lid(u: np.ndarray, height: float, side: int = side, y0: float = y0) -> np.ndarray:
            return y0 + height * (1 - np.abs(u) ** 2.2) - side * p.eye_tilt * u

        up, down = lid(S, -h), lid(S, 0.75 * h)
        x = x0 + w * S
        edge = np.concatenate([x, x[::-1]]), np.concatenate([up, down[::-1]])
        socket = c.material(mix(p.skin, (110, 50, 50), 0.14), SKIN, 11, 1.0)
        c.fill(c.feature(x0 + 1.3 * w * np.cos(T), y0 - 0.006 + 1.45 * h * np.sin(T)), socket)
        c.fill(c.feature(*edge), c.material(WHITE, label, 18, 0.45))
        cx, cy = x0 + 0.35 * w * s.gaze_x, y0 - 0.08 * h + 0.3 * h * s.gaze_y
        radius = 0.92 * p.eye_h * grow * (0.85 + 0.15 / max(s.lids, 0.5))
        parts: list[tuple[float, Color, int]] = [
            (1.0, mix(p.iris, BLACK, 0.45), 19),
            (0.82, p.iris, 19),
            (0.45, BLACK, 20),
        ]
        for scale, color, group in parts:
            ix = np.clip(cx + radius * scale * np.cos(T), x0 - 0.97 * w, x0 + 0.97 * w)
            u = (ix - x0) / w
            iy = np.clip(cy + radius * scale * np.sin(T), lid(u, -h), lid(u, 0.75 * h))  # the lids cover it
            c.fill(c.feature(ix, iy), c.material(color, label, group, 0.3))
        glint = 0.3 * radius
        gx, gy = cx - 0.32 * radius + glint * np.cos(T[::3]), cy - 0.3 * radius + glint * np.sin(T[::3])
        c.fill(c.feature(gx, np.maximum(gy, lid((gx - x0) / w, -h))), c.material((255, 255, 255), label, 20, 0.0))
        lash = np.concatenate([up - p.lashes * grow * (1 - 0.5 * np.abs(S)), up[::-1] + 0.002])
        c.fill(c.feature(np.concatenate([x0 + 1.06 * w * S, x[::-1]]), lash), c.material(BLACK, label, 20, 0.3))
        brow_label = L_BROW if side > 0 else R_BROW
        arch = p.eye_y - p.brow_y - (grow - 1) * 0.03 - s.brows - 0.013 * (1 - S**2)
        arch = arch + side * (p.brow_tilt - 0.006) * -S
        thick = p.brow_thick * (0.75 - 0.35 * side * S)
        bx = x0 + side * 0.006 + p.brow_w * S
        brow = mix(mix(p.hair, BLACK, 0.25), p.skin, 0.12)
        c.fill(
            c.feature(
                np.concatenate([bx, bx[::-1]]), np.concatenate([arch - thick / 2, (arch + thick / 2)[::-1]]), 0.01
            ),
            c.material(brow, brow_label, 21, 0.5),
        )


def _lens(p: Person, side: int) -> tuple[np.ndarray, np.ndarray]:
    k = 2 / p.glasses_round
    return (
        side * (p.eye_x + 0.004) + p.glasses_w * _power(np.cos(T), k),
        p.eye_y + 0.012 + p.glasses_h * _power(np.sin(T), k),
    )


def _glasses(c: Canvas, before_eyes: bool) -> None:
    """Clear lenses lie under the eyes, so that the eyes keep their label; dark lenses and the frame on top."""
    p = c.person
    if p.glasses == "none":
        return
    if before_eyes:
        if p.glasses == "clear":
            for side in (-1, 1):
                c.fill(
                    c.feature(*_lens(p, side), 0.02), c.material(mix(p.skin, (226, 240, 255), 0.3), GLASSES, 22, 0.8)
                )
        return
    frame = c.material(p.frame, GLASSES, 23, 0.3)
    for side in (-1, 1):
        x, y = c.feature(*_lens(p, side), 0.03)
        if p.glasses == "sun":
            c.fill((x, y), c.material(mix(p.frame, (24, 26, 34), 0.8), GLASSES, 22, 0.2))
            glare = c.material((120, 132, 150), GLASSES, 22, 0.2)
            gx = side * p.eye_x + p.glasses_w * np.array([-0.55, -0.25, -0.5, -0.75])
            c.fill(c.feature(gx, p.eye_y + p.glasses_h * np.array([-0.45, -0.45, 0.4, 0.3]), 0.03), glare)
        c.stroke((np.append(x, x[:2]), np.append(y, y[:2])), p.frame_thick, frame)
        ex, ey = c.outline(np.array([side * p.width]), np.array([p.eye_y + 0.005]))
        outer = int(np.argmax(side * x))
        if side * (ex[0] - x[outer]) > 0:
            c.stroke(
                (np.array([x[outer], ex[0]]), np.array([y[outer] - 0.4 * p.glasses_h, ey[0]])), p.frame_thick, frame
            )
    inner = p.eye_x + 0.004 - p.glasses_w
    c.stroke(
        c.feature(np.linspace(-inner, inner, 5) * 1.1, p.eye_y - 0.01 - 0.008 * np.array([0, 1, 1.3, 1, 0.0]), 0.045),
        p.frame_thick,
        frame,
    )


def _hairline(p: Person, s: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lower edge of the front hair from the left to the right temple, s in [-1, 1]: x, y on the face."""
    y = p.hairline + 0.09 * s**2
    side = p.side * s
    if p.style in ("part", "bob", "long", "wavy", "bun"):
        part = 0.35
        away = np.abs(side - part)
        y = p.hairline - 0.045 + 0.2 * np.where(side < part, (away / 1.35) ** 1.25, (away / 0.65) ** 1.7 * 0.8)
    elif p.style == "fringe":
        y = -0.128 + 0.03 * s**2 + 0.014 * np.abs(np.sin(6.5 * s + 1.0)) - 0.012
    elif p.style == "quiff":
        y = p.hairline - 0.01 + 0.11 * s**4 + 0.012 * side
    elif p.style in ("curly", "afro"):
        y = p.hairline + 0.1 * s**4 + 0.016 * np.abs(np.sin(9 * s))
    elif p.style == "receding":
        y = p.hairline - 0.055 - 0.05 * np.exp(-((np.abs(s) - 0.55) ** 2) / 0.04) + 0.17 * s**6
    return s * p.width * 0.93, y


def _front_hair(c: Canvas) -> None:
    p = c.person
    if p.style == "bald":
        return
    hair = c.material(p.hair, HAIR, 10, 0.7)
    thick = {"buzz": 0.012, "receding": 0.012, "quiff": 0.05, "part": 0.045}.get(p.style, p.volume)
    burn = {"buzz": -0.03, "receding": 0.0, "part": 0.02, "quiff": -0.01, "bun": -0.02, "curly": 0.0, "afro": 0.02}.get(
        p.style, 0.12
    )
    t = np.linspace(0, np.pi, 60)
    w, top = p.width + 0.55 * thick, p.top + thick
    ox, oy = -w * _power(np.cos(t), 0.92), -top * np.sin(t)
    oy = oy + burn * np.abs(np.cos(t)) ** 6
    if p.style in ("curly", "afro"):
        ox, oy = _bumps(ox, oy, 0.07, 30)
    if p.style == "quiff":
        lift = np.exp(-((ox / p.width - 0.25 * p.side) ** 2) / 0.25) * (oy < -0.2)
        oy = oy - (0.03 + 0.05 * p.length) * lift * (1 + 0.25 * np.sin(ox * 70))
    if p.style == "part":
        oy = oy - 0.02 * np.exp(-((ox / p.width + 0.3 * p.side) ** 2) / 0.2) * (oy < -0.2)
    s = np.linspace(1, -1, 41)
    hx, hy = _hairline(p, s)
    fx, fy = c.feature(hx, hy, 0.01)
    # the temples: from the hairline's end down beside the cheek, inside of the outline
    ends = p.width * 0.9
    rx, ry = c.outline(np.array([w, ends]), np.array([burn, burn]))
    lx, ly = c.outline(np.array([-ends, -w]), np.array([burn, burn]))
    sx, sy = c.outline(ox, oy)
    c.fill((np.concatenate([sx, rx, fx, lx]), np.concatenate([sy, ry, fy, ly])), hair)
    if p.style in ("buzz", "receding"):
        return
    light = c.material(mix(p.hair, (255, 236, 200), 0.2), HAIR, 24, 0.7)
    deep = c.material(mix(p.hair, (0, 0, 0), 0.25), HAIR, 25, 0.7)
    part = 0.35 * p.side
    for k, start in enumerate(np.linspace(-0.86, 0.86, 9)):
        if p.style in ("curly", "afro"):
            cx, cy = start * p.width, -p.top * np.sqrt(max(0.0, 1 - start * start)) * 0.86 - 0.03
            arc = np.linspace(0.3, 3.6, 9) + k
            c.stroke(
                c.outline(cx + 0.028 * np.cos(arc), cy + 0.024 * np.sin(arc), 0.08), 0.008, light if k % 2 else deep
            )
            continue
        v = np.linspace(0.1, 0.92, 9)
        ex, ey = _hairline(p, np.array([start]))
        root = part if p.style != "fringe" else 0.15 * start
        bx = (root + (start - root) * v**0.7) * p.width * 0.95
        by = -(p.top + 0.6 * thick) + (ey[0] + p.top + 0.6 * thick) * v**1.5
        c.stroke(c.feature(bx, by, 0.01), 0.009 if k % 2 else 0.006, light if k % 3 else deep)
    if p.style in ("long", "wavy", "bob", "fringe"):
        length = {"bob": 0.18 + 0.1 * p.length, "fringe": 0.2 + 0.28 * p.length}.get(p.style, 0.36 + 0.14 * p.length)
        v = np.linspace(0, 1, 24)
        wave = 0.016 * np.sin(v * 15) if p.style == "wavy" else 0 * v
        for side in (-1, 1):
            inner = p.width * (0.93 + 0.03 * np.sin(v * 3)) + wave * 0.6
            y0, y1 = -0.17, length
            y = y0 + v * (y1 - y0)
            # above the ears it stays inside the cap of hair
            outer = (w + 0.008 * (y > 0)) * (1 - np.minimum(y / top, 0) ** 2) ** 0.46 * (
                1 + 0.12 * np.maximum(y, 0)
            ) + wave
            inner = np.minimum(inner, outer)
            lock = np.concatenate([inner, outer[::-1]]), np.concatenate([y, (y - 0.02 * v)[::-1]])
            c.fill(c.outline(side * lock[0], lock[1], 0.03), hair)
            c.stroke(c.outline(side * (0.45 * inner + 0.55 * outer)[2:], y[2:], 0.03), 0.007, light)


def _hat(c: Canvas) -> None:
    p = c.person
    if p.hat == "none" or p.style in ("afro", "bun"):
        return
    color = c.material(p.hat_color, HAT, 26, 0.8)
    band = c.material(mix(p.hat_color, (20, 20, 30), 0.3), HAT, 27, 0.8)
    t = np.linspace(0, np.pi, 40)
    w, top = p.width + p.volume * 0.6 + 0.012, p.top + p.volume + 0.03
    rim = -0.165
    x, y = -w * _power(np.cos(t), 0.75), rim - 0.02 - (top + rim) * np.sin(t)
    s = np.linspace(1, -1, 25)
    bx, by = c.feature(s * w * 0.98, rim + 0.015 - 0.03 * (1 - s**2), 0.03)
    ends = c.outline(x, y)
    c.fill((np.concatenate([ends[0], bx]), np.concatenate([ends[1], by])), color)
    ux, uy = c.feature(s * w * 0.98, rim - 0.055 - 0.03 * (1 - s**2), 0.03)
    if p.hat == "beanie":
        bx[[0, -1]], ux[[0, -1]] = [w, -w], [w, -w]
        c.fill((np.concatenate([ux, bx[::-1]]), np.concatenate([uy, by[::-1]])), band)
        c.fill(c.outline(0.05 * np.cos(T), -top - 0.02 + 0.045 * np.sin(T)), band)
    else:
        vx, vy = c.feature(s * w * 0.86, rim + 0.05 - 0.04 * (1 - s**2), 0.13)
        c.fill((np.concatenate([bx[2:-2], vx[::-1]]), np.concatenate([by[2:-2] - 0.03, vy[::-1]])), band)


@functools.lru_cache(maxsize=4)
def _grid(size: int) -> tuple[np.ndarray, np.ndarray]:
    """x and y of the pixel centres as fractions of the picture, float32 (size, size)."""
    centres = (np.arange(size, dtype=np.float32) + 0.5) / size
    return np.broadcast_to(centres, (size, size)), np.broadcast_to(centres[:, None], (size, size))


def _backdrop(s: Scene, size: int) -> np.ndarray:
    """float32 (size, size, 3) in 0..255."""
    x, y = _grid(size)
    a, b = np.array(s.back, np.float32), np.array(s.back2, np.float32)
    along = np.clip(
        0.5 + (x - 0.5) * np.float32(np.cos(s.back_angle)) + (y - 0.5) * np.float32(np.sin(s.back_angle)), 0, 1
    )
    if s.backdrop == "plain":
        along = 0.35 * along
    elif s.backdrop == "wall":
        along = np.clip((along - 0.5) * size * 0.5 + 0.5, 0, 1)
    elif s.backdrop == "stripes":
        along = np.clip(np.sin(along * 26) * size * 0.05 + 0.5, 0, 1) * 0.45
    elif s.backdrop == "hills":
        ridge = 0.45 + 0.1 * np.sin(7 * x + 6 * s.blobs[0][0]) + 0.05 * np.sin(15 * x + 6 * s.blobs[1][0])
        along = np.clip((y - ridge) * size * 0.4, 0, 1) * 0.8 + 0.2 * y
    elif s.backdrop == "bokeh":
        along = 0.5 * along
        for bx, by, radius, strength in s.blobs:
            distance = np.hypot(x - np.float32(bx), y - np.float32(by))
            spot = np.clip((0.05 + 0.12 * radius - distance) * 16 + 0.5, 0, 1)
            along = along + spot * (0.15 + 0.4 * strength)
        along = np.clip(along, 0, 1.3)
    return a + along[..., None].astype(np.float32) * (b - a)


def _light(c: Canvas) -> tuple[np.ndarray, np.ndarray]:
    """Brightness of a head lit from (light_x, light_y), and the flush of the cheeks; both float32 (size, size)."""
    p, s = c.person, c.scene
    x, y = _grid(c.size)
    x, y = (x - np.float32(c.center[0])) / s.scale, (y - np.float32(c.center[1])) / s.scale
    x, y = x * c.cos_roll + y * c.sin_roll, y * c.cos_roll - x * c.sin_roll
    u, v = x / np.float32(p.width * 1.15), y / np.float32(p.chin * 1.12)
    r2 = np.minimum(u * u + v * v, 0.98)
    scale = np.sqrt(r2 / np.maximum(u * u + v * v, 1e-6))
    direction = np.array([s.light_x, s.light_y, 0.9])
    lx, ly, lz = direction / np.linalg.norm(direction)
    glow = np.maximum(u * scale * lx + v * scale * ly + np.sqrt(1 - r2) * lz, 0)
    brightness = 1.0 + s.light * 0.62 * (glow - 0.74)
    flush = np.zeros_like(brightness)
    for side in (-1, 1):
        cx, cy = c.feature(np.array([side * 0.125]), np.array([0.085]))
        flush = flush + np.exp(-(((x - cx[0]) / 0.055) ** 2 + ((y - cy[0]) / 0.042) ** 2))
    return brightness.astype(np.float32), (p.blush * flush).astype(np.float32)


def _lines(groups: np.ndarray, width: int) -> np.ndarray:
    """uint8: 255 where two line groups meet, `width` sub-pixels thick."""
    edge = np.zeros(groups.shape, bool)
    down, right = groups[1:] != groups[:-1], groups[:, 1:] != groups[:, :-1]
    edge[1:] |= down
    edge[:-1] |= down
    edge[:, 1:] |= right
    edge[:, :-1] |= right
    image = Image.fromarray(edge.astype(np.uint8) * 255)
    extra = (width - 2) | 1
    return np.asarray(image.filter(ImageFilter.MaxFilter(extra)) if extra >= 3 else image)


LAYERS: tuple[Callable[[Canvas], None], ...] = (_back_hair, _body, _ears, _face)


def paint(person: Person, scene: Scene, size: int, toon: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw one face.

    Returns:
        image uint8 (size, size, 3), labels uint8 (size, size) with the class at each pixel's centre, and sketch uint8
        (size, size), dark lines on white.
    """
    c = Canvas(person, scene, size)
    for layer in LAYERS:
        layer(c)
    _nose(c)
    _mouth(c)
    _glasses(c, before_eyes=True)
    _eyes(c, 1.3 if toon else 1.0)
    _glasses(c, before_eyes=False)
    _front_hair(c)
    _hat(c)

    index = np.asarray(c.image)
    labels = np.array(c.labels, np.uint8)[index[1::SUPER, 1::SUPER]]
    lines = _lines(np.array(c.groups, np.uint8)[index], round(size * SUPER / 130))
    lines = np.asarray(Image.fromarray(lines).reduce(SUPER))
    sketch = 255 - (lines.astype(np.uint16) * 225 // 255).astype(np.uint8)

    colors = np.clip(np.array(c.colors), 0, 255).round().astype(np.uint8)
    c.image.putpalette(np.concatenate([colors, np.zeros((256 - len(colors), 3), np.uint8)]).ravel().tolist())
    painted = np.asarray(c.image.convert("RGB").reduce(SUPER)).astype(np.float32)

    def share(weights: list[float]) -> np.ndarray:
        table = np.clip(np.array(weights) * 255, 0, 255).round().astype(np.uint8)
        return np.asarray(Image.fromarray(table[index]).reduce(SUPER)).astype(np.float32) / 255

    brightness, flush = _light(c)
    if toon:
        brightness = 1 + 0.22 * np.round((brightness - 1) / 0.22)
    shade = 1 + share(c.shade) * (brightness - 1)
    tint = share(c.flush) * flush
    painted *= shade[..., None]
    painted -= tint[..., None] * np.array([4, 70, 62], np.float32) * (painted / 255)
    painted *= np.array([1 + scene.warm, 1, 1 - scene.warm], np.float32)
    cover = share([0.0] + [1.0] * (len(colors) - 1))
    image = painted + (1 - cover)[..., None] * _backdrop(scene, size)
    if toon:
        grey = image.mean(-1, keepdims=True)
        image = (grey + 1.35 * (image - grey)) * (1 - lines.astype(np.float32)[..., None] / 255 * 0.9)
    return np.clip(image, 0, 255).round().astype(np.uint8), labels, sketch
