"""Canvas of a drawn face: materials, the turning of the head, and polygons of material numbers."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from psp_lightning.data.toyfaces.person import Color, Person, Scene

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


def power(t: np.ndarray, exponent: float) -> np.ndarray:
    return np.sign(t) * np.abs(t) ** exponent


def head(p: Person, grow: float = 0.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Outline of the head as x, y, z, clockwise from the right ear."""
    cos, sin = np.cos(T), np.sin(T)
    low = np.maximum(sin, 0)
    x = (p.width + grow) * power(cos, p.square) * (1 - p.jaw * low**1.7)
    y = np.where(sin > 0, p.chin + grow, p.top + grow) * sin
    return x, y, 0.1 * low**2
