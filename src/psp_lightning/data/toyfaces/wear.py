"""The hair, glasses and hat of a drawn person."""

from __future__ import annotations

import numpy as np

from psp_lightning.data.toyfaces.canvas import SPAN, TURN, Canvas, Curve, Label, ellipse, power
from psp_lightning.data.toyfaces.person import Person, mix


def bumps(x: np.ndarray, y: np.ndarray, amount: float, waves: int) -> Curve:
    """Add `waves` bumps to an outline."""
    t = np.linspace(0, 2 * np.pi, len(x), endpoint=False)
    k = 1 + amount * np.abs(np.sin(0.5 * waves * t))
    return x * k, y * k


def back_hair(c: Canvas) -> None:
    """Draw the hair behind the neck and shoulders."""
    p = c.person
    dark = c.material(mix(p.hair, (0, 0, 0), 0.28), Label.HAIR, 9, 0.5)
    t = np.linspace(0, 2 * np.pi, 120, endpoint=False)
    w, top = p.width + p.volume, p.top + p.volume
    cos, sin = np.cos(t), np.sin(t)
    if p.style in ("bob", "fringe", "long", "wavy"):
        length = {"bob": 0.2 + 0.1 * p.length, "fringe": 0.22 + 0.3 * p.length}.get(p.style, 0.42 + 0.2 * p.length)
        flare = 1 + (0.14 + 0.1 * p.length) * np.maximum(sin, 0)
        x, y = (w + 0.012) * power(cos, 0.7) * flare, np.where(sin > 0, length * power(sin, 0.6), (top - 0.01) * sin)
        if p.style == "wavy":
            x = x + 0.018 * np.sin(y * 42) * (np.abs(cos) > 0.2)
        c.fill(c.outline(x, y, -0.1), dark)
    elif p.style == "afro":
        radius = 1.28 + 0.25 * p.length
        x, y = bumps(p.width * radius * cos, -0.1 + p.top * radius * 0.86 * sin, 0.05, 34)
        c.fill(c.outline(x, y, -0.08), dark)
    elif p.style == "curly":
        x, y = bumps((w + 0.03) * cos, -0.08 + (top - 0.06) * sin, 0.07, 22)
        c.fill(c.outline(x, y, -0.06), dark)
    if p.style == "bun":
        x, y = 0.1 * cos, -top - 0.03 + 0.085 * sin
        c.fill(c.outline(x, y, -0.1), c.material(p.hair, Label.HAIR, 10, 0.7))
        c.stroke(c.outline(0.07 * SPAN, -top + 0.025 - 0.02 * SPAN * SPAN, -0.1), 0.01, dark)


def _lens(p: Person, side: int) -> Curve:
    k = 2 / p.glasses_round
    return (
        side * (p.eye_x + 0.004) + p.glasses_w * power(np.cos(TURN), k),
        p.eye_y + 0.012 + p.glasses_h * power(np.sin(TURN), k),
    )


def glasses(c: Canvas, before_eyes: bool) -> None:
    """Draw clear lenses if `before_eyes`, so that the eyes keep their labels; otherwise dark lenses and the frame."""
    p = c.person
    if p.glasses == "none":
        return
    if before_eyes:
        if p.glasses == "clear":
            lens = c.material(mix(p.skin, (226, 240, 255), 0.3), Label.GLASSES, 22, 0.8)
            for side in (-1, 1):
                c.fill(c.feature(*_lens(p, side), 0.02), lens)
        return
    frame = c.material(p.frame, Label.GLASSES, 23, 0.3)
    for side in (-1, 1):
        x, y = c.feature(*_lens(p, side), 0.03)
        if p.glasses == "sun":
            c.fill((x, y), c.material(mix(p.frame, (24, 26, 34), 0.8), Label.GLASSES, 22, 0.2))
            glare = c.material((120, 132, 150), Label.GLASSES, 22, 0.2)
            gx = side * p.eye_x + p.glasses_w * np.array([-0.55, -0.25, -0.5, -0.75])
            c.fill(c.feature(gx, p.eye_y + p.glasses_h * np.array([-0.45, -0.45, 0.4, 0.3]), 0.03), glare)
        c.stroke((np.append(x, x[:2]), np.append(y, y[:2])), p.frame_thick, frame)
        ex, ey = c.outline(np.array([side * p.width]), np.array([p.eye_y + 0.005]))
        outer = int(np.argmax(side * x))
        if side * (ex[0] - x[outer]) > 0:
            temple = np.array([x[outer], ex[0]]), np.array([y[outer] - 0.4 * p.glasses_h, ey[0]])
            c.stroke(temple, p.frame_thick, frame)
    inner = p.eye_x + 0.004 - p.glasses_w
    x, y = np.linspace(-inner, inner, 5) * 1.1, p.eye_y - 0.01 - 0.008 * np.array([0, 1, 1.3, 1, 0.0])
    c.stroke(c.feature(x, y, 0.045), p.frame_thick, frame)


def _hairline(p: Person, s: np.ndarray) -> Curve:
    """Return the lower edge of the front hair as x, y on the face, with s from -1 (one temple) to 1 (the other)."""
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


def front_hair(c: Canvas) -> None:
    """Draw the hair on the head and beside the face."""
    p = c.person
    if p.style == "bald":
        return
    hair = c.material(p.hair, Label.HAIR, 10, 0.7)
    thick = {"buzz": 0.012, "receding": 0.012, "quiff": 0.05, "part": 0.045}.get(p.style, p.volume)
    burns = {"buzz": -0.03, "receding": 0.0, "part": 0.02, "quiff": -0.01, "bun": -0.02, "curly": 0.0, "afro": 0.02}
    burn = burns.get(p.style, 0.12)
    t = np.linspace(0, np.pi, 60)
    w, top = p.width + 0.55 * thick, p.top + thick
    ox, oy = -w * power(np.cos(t), 0.92), -top * np.sin(t)
    oy = oy + burn * np.abs(np.cos(t)) ** 6
    if p.style in ("curly", "afro"):
        ox, oy = bumps(ox, oy, 0.07, 30)
    if p.style == "quiff":
        lift = np.exp(-((ox / p.width - 0.25 * p.side) ** 2) / 0.25) * (oy < -0.2)
        oy = oy - (0.03 + 0.05 * p.length) * lift * (1 + 0.25 * np.sin(ox * 70))
    if p.style == "part":
        oy = oy - 0.02 * np.exp(-((ox / p.width + 0.3 * p.side) ** 2) / 0.2) * (oy < -0.2)
    s = np.linspace(1, -1, 41)
    hx, hy = _hairline(p, s)
    fx, fy = c.feature(hx, hy, 0.01)
    # the temples run from the ends of the hairline down beside the cheeks, inside the outline
    ends = p.width * 0.9
    rx, ry = c.outline(np.array([w, ends]), np.array([burn, burn]))
    lx, ly = c.outline(np.array([-ends, -w]), np.array([burn, burn]))
    sx, sy = c.outline(ox, oy)
    c.fill((np.concatenate([sx, rx, fx, lx]), np.concatenate([sy, ry, fy, ly])), hair)
    if p.style in ("buzz", "receding"):
        return
    light = c.material(mix(p.hair, (255, 236, 200), 0.2), Label.HAIR, 24, 0.7)
    deep = c.material(mix(p.hair, (0, 0, 0), 0.25), Label.HAIR, 25, 0.7)
    part = 0.35 * p.side
    for k, start in enumerate(np.linspace(-0.86, 0.86, 9)):
        if p.style in ("curly", "afro"):
            cx, cy = start * p.width, -p.top * np.sqrt(max(0.0, 1 - start * start)) * 0.86 - 0.03
            arc = np.linspace(0.3, 3.6, 9) + k
            curl = c.outline(cx + 0.028 * np.cos(arc), cy + 0.024 * np.sin(arc), 0.08)
            c.stroke(curl, 0.008, light if k % 2 else deep)
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
            y = -0.17 + v * (length + 0.17)
            # above the ears the lock remains inside the cap of hair
            outer = (w + 0.008 * (y > 0)) * (1 - np.minimum(y / top, 0) ** 2) ** 0.46
            outer = outer * (1 + 0.12 * np.maximum(y, 0)) + wave
            inner = np.minimum(inner, outer)
            lock = np.concatenate([inner, outer[::-1]]), np.concatenate([y, (y - 0.02 * v)[::-1]])
            c.fill(c.outline(side * lock[0], lock[1], 0.03), hair)
            c.stroke(c.outline(side * (0.45 * inner + 0.55 * outer)[2:], y[2:], 0.03), 0.007, light)


def hat(c: Canvas) -> None:
    """Draw a hat over the hair."""
    p = c.person
    if p.hat == "none" or p.style in ("afro", "bun"):
        return
    color = c.material(p.hat_color, Label.HAT, 26, 0.8)
    trim = c.material(mix(p.hat_color, (20, 20, 30), 0.3), Label.HAT, 27, 0.8)
    t = np.linspace(0, np.pi, 40)
    w, top = p.width + p.volume * 0.6 + 0.012, p.top + p.volume + 0.03
    rim = -0.165
    x, y = -w * power(np.cos(t), 0.75), rim - 0.02 - (top + rim) * np.sin(t)
    s = np.linspace(1, -1, 25)
    bx, by = c.feature(s * w * 0.98, rim + 0.015 - 0.03 * (1 - s**2), 0.03)
    ends = c.outline(x, y)
    c.fill((np.concatenate([ends[0], bx]), np.concatenate([ends[1], by])), color)
    ux, uy = c.feature(s * w * 0.98, rim - 0.055 - 0.03 * (1 - s**2), 0.03)
    if p.hat == "beanie":
        bx[[0, -1]], ux[[0, -1]] = [w, -w], [w, -w]
        c.fill((np.concatenate([ux, bx[::-1]]), np.concatenate([uy, by[::-1]])), trim)
        c.fill(c.outline(*ellipse(0, -top - 0.02, 0.05, 0.045)), trim)
    else:
        vx, vy = c.feature(s * w * 0.86, rim + 0.05 - 0.04 * (1 - s**2), 0.13)
        c.fill((np.concatenate([bx[2:-2], vx[::-1]]), np.concatenate([by[2:-2] - 0.03, vy[::-1]])), trim)
