"""Painting a `Person` in a `Scene`.

All shapes are polygons, painted once into an image of material numbers at three times the size. Picture, label map and
sketch are all derived from that image, so they agree to the pixel.
"""

from __future__ import annotations

import functools

import numpy as np
from PIL import Image

from psp_lightning.data.toyfaces.canvas import (
    BLACK,
    DEPTH,
    SPAN,
    SUPERSAMPLING,
    TURN,
    WHITE,
    Canvas,
    Label,
    band,
    ellipse,
    power,
)
from psp_lightning.data.toyfaces.person import Person, Scene, mix
from psp_lightning.data.toyfaces.wear import back_hair, front_hair, glasses, hat


def _body(c: Canvas) -> None:
    p, s = c.person, c.scene
    neck_w = p.width * (0.5 + 0.12 * (1 - p.jaw))
    lean = 0.1 * c.sin_yaw
    neck = c.material(mix(p.skin, (90, 40, 30), 0.12), Label.NECK, 2, 0.6)
    x = np.array([-neck_w, neck_w, neck_w * 1.12, -neck_w * 1.12]) + [lean, lean, 0, 0]
    c.fill((x, np.array([0.1, 0.1, 0.45, 0.45])), neck, body=True)
    shadow = c.material(mix(p.skin, (70, 26, 24), 0.34), Label.NECK, 2, 0.6)
    y = np.append(p.chin + 0.015 + 0.03 * (1 - SPAN * SPAN), [0.1, 0.1])
    c.fill((lean + neck_w * np.append(SPAN, [1, -1]), y), shadow, body=True)
    cloth = c.material(s.cloth, Label.CLOTH, 3, 0.6)
    drop = p.chin + 0.05
    x = np.array([-0.62, -0.5, -0.33, -neck_w * 1.25, -neck_w * 0.5, 0, neck_w * 0.5, neck_w * 1.25, 0.33, 0.5, 0.62])
    deep = {"vee": 0.12, "shirt": 0.07}.get(s.collar, 0.045)
    y = drop + np.array([0.4, 0.09, 0.035, -0.015, 0.6 * deep, deep, 0.6 * deep, -0.015, 0.035, 0.09, 0.4])
    if s.collar in ("crew", "stripes"):
        y[[4, 6]] = drop + 0.85 * deep
    if s.necklace:
        chain = neck_w * 0.95 * SPAN, drop - 0.03 + 0.05 * (1 - SPAN * SPAN)
        c.stroke(chain, 0.012, c.material(p.jewel, Label.NECKLACE, 4, 0.3), body=True)
    c.fill((x, y), cloth, body=True)
    trim = c.material(s.cloth2, Label.CLOTH, 5, 0.6)
    if s.collar == "stripes":
        for k in range(3):
            c.stroke((0.5 * SPAN, drop + 0.085 + 0.05 * k - 0.0 * SPAN), 0.018, trim, body=True)
    elif s.collar == "shirt":
        for side in (-1, 1):
            x = side * np.array([neck_w * 1.25, 0.02, 0.1, neck_w * 1.5])
            c.fill((x, drop + np.array([-0.03, 0.07, 0.13, 0.04])), trim, body=True)
    else:
        c.stroke((x[3:8], y[3:8]), 0.016, trim, body=True)


def _ears(c: Canvas) -> None:
    p = c.person
    for side, label in ((1, Label.L_EAR), (-1, Label.R_EAR)):
        shift = -0.35 * DEPTH * c.sin_yaw  # behind the axis of the head
        # the ear on the far side disappears behind the cheek
        x0 = side * (p.width * 0.99 - 0.06 * max(0.0, side * c.sin_yaw))
        for scale, color in ((1.0, p.skin), (0.55, mix(p.skin, (120, 40, 40), 0.3))):
            x, y = ellipse(x0 + side * 0.01, 0.005, 0.62 * p.ear * scale, 1.15 * p.ear * scale)
            ear = c.material(color, label, 6 if scale == 1.0 else 7, 0.8)
            c.fill(c.outline(x + shift * 0.3, y, -0.03), ear)
        if p.earrings:
            ring = ellipse(x0 + side * 0.014, 0.08, 0.016, 0.02)
            c.fill(c.outline(*ring), c.material(p.jewel, Label.EARRING, 8, 0.2))


def _face(c: Canvas) -> None:
    p = c.person
    # the outline of the head, clockwise from the right ear
    cos, sin = np.cos(TURN), np.sin(TURN)
    low = np.maximum(sin, 0)
    x = p.width * power(cos, p.square) * (1 - p.jaw * low**1.7)
    y, z = np.where(sin > 0, p.chin, p.top) * sin, 0.1 * low**2
    skin = c.material(p.skin, Label.SKIN, 11, 1.0, 1.0)
    c.fill(c.outline(x, y, z), skin)
    if p.beard in ("full", "stubble", "goatee"):
        color = mix(p.skin, p.hair, {"full": 0.82, "stubble": 0.28, "goatee": 0.75}[p.beard])
        beard = c.material(color, Label.SKIN, 11 if p.beard == "stubble" else 12, 0.8)
        if p.beard == "goatee":
            c.fill(c.feature(0.085 * power(cos, 0.8), p.mouth_y + 0.055 + 0.095 * sin), beard)
        else:
            jaw = np.linspace(0.03 * np.pi, 0.97 * np.pi, 24)
            grow = 1.03 if p.beard == "full" else 1.0
            jx, jy, jz = (np.interp(jaw, TURN, values) for values in (x, y, z))
            ox, oy = c.outline(jx * grow, jy * grow, jz)
            s = np.linspace(-1, 1, 24)
            ix, iy = c.feature(s * p.width * 0.8, p.mouth_y - 0.06 - 0.1 * s**2 + 0.012 * np.cos(9 * s))
            c.fill((np.concatenate([ox, ix]), np.concatenate([oy, iy])), beard)
            c.fill(c.feature(*ellipse(0, p.mouth_y, 0.5 * p.mouth_w, 0.03)), skin)
    if p.beard in ("full", "moustache", "goatee"):
        y0 = p.mouth_y - p.lip_up - 0.022
        moustache = band(SPAN * p.mouth_w * 1.02, y0 + 0.03 * SPAN**2 - 0.006, y0 + 0.024 + 0.02 * SPAN**2)
        c.fill(c.feature(*moustache, 0.01), c.material(mix(p.skin, p.hair, 0.85), Label.SKIN, 12, 0.8))
    if p.freckles:
        dot = c.material(mix(p.skin, (150, 80, 50), 0.4), Label.SKIN, 11, 1.0)
        for k in range(12):
            side = 1 if k % 2 else -1
            fx, fy = side * (0.06 + 0.011 * (k // 2)), 0.055 + 0.022 * ((k * 7) % 5) / 5
            c.fill(c.feature(*ellipse(fx, fy, 0.0055, 0.0055, 5)), dot)


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
    nose = c.material(mix(p.skin, WHITE, 0.05), Label.NOSE, 11, 1.0, 0.6)
    c.fill((np.concatenate([lx, rx[::-1]]), np.concatenate([ly, ry[::-1]])), nose)
    # the side away from the light
    side = c.material(mix(p.skin, (110, 40, 30), 0.17), Label.NOSE, 11, 1.0)
    ox, oy = (rx, ry) if s.light_x < 0 else (lx, ly)
    c.fill((np.concatenate([0.45 * mx + 0.55 * ox, ox[::-1]]), np.concatenate([my, oy[::-1]])), side)
    line = c.material(mix(p.skin, (70, 22, 20), 0.5), Label.NOSE, 13, 1.0)
    bx, by = c.feature(p.nose_w * np.linspace(-1, 1, 9), tip + 0.013 * np.cos(np.linspace(-1, 1, 9) * 4.2), 0.04)
    c.stroke((bx, by), 0.0075, line)
    for k in (-1, 1):
        nostril = ellipse(k * p.nose_w * 0.48, tip + 0.004, 0.011, 0.0065, 4)
        c.fill(c.feature(*nostril, 0.045), c.material(mix(p.skin, BLACK, 0.7), Label.NOSE, 13, 1.0))


def _mouth(c: Canvas) -> None:
    p, s = c.person, c.scene
    w = p.mouth_w * (1 + 0.12 * s.smile)
    bend = 0.028 * s.smile
    gap = 0.042 * s.open
    x = w * SPAN
    middle = p.mouth_y - bend * SPAN**2
    arch = np.sqrt(np.clip(1 - SPAN**2, 0, 1))
    upper_low = middle - 0.3 * gap * arch
    lower_high = middle + 0.7 * gap * arch
    bow = p.lip_up * (arch**1.2 - 0.3 * np.exp(-((SPAN / 0.22) ** 2)))
    if gap > 0.004:
        inside, teeth = band(x, upper_low, lower_high), upper_low + 0.45 * (lower_high - upper_low)
        c.fill(c.feature(*inside, 0.012), c.material((96, 26, 34), Label.MOUTH, 14, 0.4))
        c.fill(c.feature(*band(0.88 * x, upper_low, teeth), 0.012), c.material(WHITE, Label.MOUTH, 15, 0.4))
    upper, lower = band(x, upper_low - bow, upper_low), band(x, lower_high, lower_high + p.lip_down * arch)
    c.fill(c.feature(*upper, 0.014), c.material(mix(p.lip, BLACK, 0.1), Label.U_LIP, 16, 0.9))
    c.fill(c.feature(*lower, 0.014), c.material(p.lip, Label.L_LIP, 17, 0.9))
    shine = c.material(mix(p.lip, WHITE, 0.3), Label.L_LIP, 17, 0.9)
    middle_low = lower_high[len(SPAN) // 2]
    c.fill(c.feature(*ellipse(0, middle_low + 0.45 * p.lip_down, 0.03, 0.004, 4), 0.016), shine)
    if gap <= 0.004:
        c.stroke(c.feature(x, upper_low, 0.014), 0.006, c.material(mix(p.lip, BLACK, 0.55), Label.U_LIP, 16, 0.9))


def _eyes(c: Canvas, grow: float) -> None:
    p, s = c.person, c.scene
    for side, label in ((1, Label.L_EYE), (-1, Label.R_EYE)):
        w, h = p.eye_w * grow, p.eye_h * grow * s.lids
        x0, y0 = side * p.eye_x, p.eye_y

        def lid(u: np.ndarray, height: float, side: int = side, y0: float = y0) -> np.ndarray:
            return y0 + height * (1 - np.abs(u) ** 2.2) - side * p.eye_tilt * u

        up, down = lid(SPAN, -h), lid(SPAN, 0.75 * h)
        x = x0 + w * SPAN
        socket = c.material(mix(p.skin, (110, 50, 50), 0.14), Label.SKIN, 11, 1.0)
        c.fill(c.feature(*ellipse(x0, y0 - 0.006, 1.3 * w, 1.45 * h)), socket)
        c.fill(c.feature(*band(x, up, down)), c.material(WHITE, label, 18, 0.45))
        cx, cy = x0 + 0.35 * w * s.gaze_x, y0 - 0.08 * h + 0.3 * h * s.gaze_y
        radius = 0.92 * p.eye_h * grow * (0.85 + 0.15 / max(s.lids, 0.5))
        for scale, color, group in ((1.0, mix(p.iris, BLACK, 0.45), 19), (0.82, p.iris, 19), (0.45, BLACK, 20)):
            ix, iy = ellipse(cx, cy, radius * scale, radius * scale)
            ix = np.clip(ix, x0 - 0.97 * w, x0 + 0.97 * w)
            u = (ix - x0) / w
            iy = np.clip(iy, lid(u, -h), lid(u, 0.75 * h))  # covered by the lids
            c.fill(c.feature(ix, iy), c.material(color, label, group, 0.3))
        glint = 0.3 * radius
        gx, gy = ellipse(cx - 0.32 * radius, cy - 0.3 * radius, glint, glint, 3)
        c.fill(c.feature(gx, np.maximum(gy, lid((gx - x0) / w, -h))), c.material((255, 255, 255), label, 20, 0.0))
        lash = np.concatenate([up - p.lashes * grow * (1 - 0.5 * np.abs(SPAN)), up[::-1] + 0.002])
        c.fill(c.feature(np.concatenate([x0 + 1.06 * w * SPAN, x[::-1]]), lash), c.material(BLACK, label, 20, 0.3))
        brow_label = Label.L_BROW if side > 0 else Label.R_BROW
        arch = p.eye_y - p.brow_y - (grow - 1) * 0.03 - s.brows - 0.013 * (1 - SPAN**2)
        arch = arch + side * (p.brow_tilt - 0.006) * -SPAN
        thick = p.brow_thick * (0.75 - 0.35 * side * SPAN)
        bx = x0 + side * 0.006 + p.brow_w * SPAN
        brow = mix(mix(p.hair, BLACK, 0.25), p.skin, 0.12)
        stroke = band(bx, arch - thick / 2, arch + thick / 2)
        c.fill(c.feature(*stroke, 0.01), c.material(brow, brow_label, 21, 0.5))


@functools.lru_cache(maxsize=4)
def _grid(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return x and y of the pixel centres as fractions of the picture's size, float32 (size, size)."""
    centres = (np.arange(size, dtype=np.float32) + 0.5) / size
    return np.broadcast_to(centres, (size, size)), np.broadcast_to(centres[:, None], (size, size))


def _backdrop(s: Scene, size: int) -> np.ndarray:
    """Return the backdrop, float32 (size, size, 3) in 0..255."""
    x, y = _grid(size)
    a, b = np.array(s.back, np.float32), np.array(s.back2, np.float32)
    along = 0.5 + (x - 0.5) * np.float32(np.cos(s.back_angle)) + (y - 0.5) * np.float32(np.sin(s.back_angle))
    along = np.clip(along, 0, 1)
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
    """Return the light on the head from (light_x, light_y) and the blush of the cheeks, both float32 (size, size)."""
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
    """Return uint8: 255 on the borders between line groups, `width` sub-pixels thick."""
    edge = np.zeros(groups.shape, bool)
    for lines, across in ((edge, groups), (edge.T, groups.T)):
        differs = across[1:] != across[:-1]
        lines[1:] |= differs
        lines[:-1] |= differs
    for _ in range((width - 1) // 2):  # grow by one sub-pixel on each side
        for lines in (edge, edge.T):
            before = np.copy(lines)
            lines[1:] |= before[:-1]
            lines[:-1] |= before[1:]
    return edge.astype(np.uint8) * 255


def paint(person: Person, scene: Scene, size: int, toon: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Paint a face.

    Returns:
        The image, uint8 (size, size, 3); the labels, uint8 (size, size), the class at each pixel's centre; and the
        sketch, uint8 (size, size), dark lines on white.
    """
    c = Canvas(person, scene, size)
    for layer in (back_hair, _body, _ears, _face, _nose, _mouth):
        layer(c)
    glasses(c, before_eyes=True)
    _eyes(c, 1.3 if toon else 1.0)
    glasses(c, before_eyes=False)
    front_hair(c)
    hat(c)

    index = np.asarray(c.image)
    colors, labels, groups, shade, flush = (np.array(values) for values in zip(*c.materials, strict=True))
    labels = labels.astype(np.uint8)[index[1::SUPERSAMPLING, 1::SUPERSAMPLING]]
    lines = _lines(groups.astype(np.uint8)[index], round(size * SUPERSAMPLING / 150))
    lines = np.asarray(Image.fromarray(lines).reduce(SUPERSAMPLING))
    sketch = 255 - (lines.astype(np.uint16) * 225 // 255).astype(np.uint8)

    colors = np.clip(colors, 0, 255).round().astype(np.uint8)
    c.image.putpalette(np.concatenate([colors, np.zeros((256 - len(colors), 3), np.uint8)]).ravel().tolist())
    painted = np.asarray(c.image.convert("RGB").reduce(SUPERSAMPLING)).astype(np.float32)

    def share(weights: np.ndarray) -> np.ndarray:
        """Return the average weight of the materials in each pixel."""
        table = np.clip(weights * 255, 0, 255).round().astype(np.uint8)
        return np.asarray(Image.fromarray(table[index]).reduce(SUPERSAMPLING)).astype(np.float32) / 255

    brightness, blush = _light(c)
    if toon:
        brightness = 1 + 0.22 * np.round((brightness - 1) / 0.22)
    painted *= (1 + share(shade) * (brightness - 1))[..., None]
    painted -= (share(flush) * blush)[..., None] * np.array([4, 70, 62], np.float32) * (painted / 255)
    painted *= np.array([1 + scene.warm, 1, 1 - scene.warm], np.float32)
    cover = share(np.arange(len(colors)) > 0)
    image = painted + (1 - cover)[..., None] * _backdrop(scene, size)
    if toon:
        grey = image.mean(-1, keepdims=True)
        image = (grey + 1.35 * (image - grey)) * (1 - lines.astype(np.float32)[..., None] / 255 * 0.9)
    return np.clip(image, 0, 255).round().astype(np.uint8), labels, sketch
