"""Canvas of a drawn face: materials, the turning of the head, polygons of material numbers, common outlines."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from psp_lightning.data.toyfaces.person import Color, Person, Scene

SUPERSAMPLING = 3  # odd, so that the centre of a pixel is the centre of one sub-pixel
TURN = np.linspace(0, 2 * np.pi, 40, endpoint=False)  # once around a closed outline
SPAN = np.linspace(-1, 1, 13)  # from one end of a feature to the other
DEPTH = 0.21  # of the face's front above the plane of its outline

BACKGROUND, SKIN, NOSE, GLASSES, L_EYE, R_EYE, L_BROW, R_BROW, L_EAR, R_EAR = range(10)
MOUTH, U_LIP, L_LIP, HAIR, HAT, EARRING, NECKLACE, NECK, CLOTH = range(10, 19)
BLACK: Color = (26.0, 20.0, 22.0)
WHITE: Color = (250.0, 248.0, 244.0)

Curve = tuple[np.ndarray, np.ndarray]  # x and y of its points


class Canvas:
    """An image of material numbers; a material has a colour, a label, a line group and shares of light and blush."""

    def __init__(self, person: Person, scene: Scene, size: int) -> None:
        self.size = size
        self.image = Image.new("L", (size * SUPERSAMPLING, size * SUPERSAMPLING))
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
        """Return how far the face comes forward at (x, y)."""
        u, v = x / (self.person.width * 1.08), y / 0.38
        return DEPTH * np.sqrt(np.clip(1 - u * u - v * v, 0, 1))

    def feature(self, x: np.ndarray, y: np.ndarray, out: float = 0.0) -> Curve:
        """Turn points on the face, `out` above it, with the head."""
        z = self.depth(x, y) + out
        turned = x * self.cos_yaw + z * self.sin_yaw
        depth = z * self.cos_yaw - x * self.sin_yaw
        return turned, y * self.cos_pitch + depth * self.sin_pitch

    def outline(self, x: np.ndarray, y: np.ndarray, z: float | np.ndarray = 0.0) -> Curve:
        """Turn points of a silhouette: the head is about as deep as wide, so only what is off its axis moves."""
        return x + z * self.sin_yaw, y + z * self.sin_pitch

    def pixels(self, x: np.ndarray, y: np.ndarray, body: bool = False) -> list[float]:
        cos, sin = (1.0, 0.0) if body else (self.cos_roll, self.sin_roll)
        k = self.size * SUPERSAMPLING
        points = np.empty((len(x), 2))
        points[:, 0] = (self.center[0] + self.scene.scale * (x * cos - y * sin)) * k - 0.5
        points[:, 1] = (self.center[1] + self.scene.scale * (x * sin + y * cos)) * k - 0.5
        return points.ravel().tolist()

    def fill(self, xy: Curve, material: int, body: bool = False) -> None:
        self.pen.polygon(self.pixels(*xy, body=body), fill=material)

    def stroke(self, xy: Curve, width: float, material: int, body: bool = False) -> None:
        width_px = max(1, round(width * self.size * SUPERSAMPLING * self.scene.scale))
        self.pen.line(self.pixels(*xy, body=body), fill=material, width=width_px, joint="curve")


def ellipse(x: float, y: float, width: float, height: float, every: int = 1) -> Curve:
    """Return the outline of an ellipse from its centre and half axes, `every` so many points of `TURN`."""
    return x + width * np.cos(TURN[::every]), y + height * np.sin(TURN[::every])


def band(x: np.ndarray, upper: np.ndarray, lower: np.ndarray) -> Curve:
    """Return the outline of the area between two curves over the same x."""
    return np.concatenate([x, x[::-1]]), np.concatenate([upper, lower[::-1]])


def power(t: np.ndarray, exponent: float) -> np.ndarray:
    """Return the power of the magnitude, with the sign of `t`."""
    return np.sign(t) * np.abs(t) ** exponent


def head(p: Person, grow: float = 0.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the outline of the head as x, y, z, clockwise from the right ear."""
    cos, sin = np.cos(TURN), np.sin(TURN)
    low = np.maximum(sin, 0)
    x = (p.width + grow) * power(cos, p.square) * (1 - p.jaw * low**1.7)
    y = np.where(sin > 0, p.chin + grow, p.top + grow) * sin
    return x, y, 0.1 * low**2
