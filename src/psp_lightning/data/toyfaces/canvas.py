"""The canvas of a drawn face: materials, head rotation, polygons of material numbers and common outlines."""

from __future__ import annotations

import enum

import numpy as np
from PIL import Image, ImageDraw

from psp_lightning.data.toyfaces.person import Color, Person, Scene

SUPERSAMPLING = 3  # odd, because then the centre of a pixel is the centre of a sub-pixel
TURN = np.linspace(0, 2 * np.pi, 40, endpoint=False)  # angles around a closed outline
SPAN = np.linspace(-1, 1, 13)  # positions from one end of a feature to the other
DEPTH = 0.21  # from the plane of the face's outline to its front
BLACK: Color = (26.0, 20.0, 22.0)
WHITE: Color = (250.0, 248.0, 244.0)

Curve = tuple[np.ndarray, np.ndarray]  # x and y of its points


class Label(enum.IntEnum):
    """The ids of CelebAMask-HQ."""

    BACKGROUND, SKIN, NOSE, GLASSES, L_EYE, R_EYE, L_BROW, R_BROW, L_EAR, R_EAR = range(10)
    MOUTH, U_LIP, L_LIP, HAIR, HAT, EARRING, NECKLACE, NECK, CLOTH = range(10, 19)


class Canvas:
    """An image of material numbers. A material has a colour, a label, a line group, and shares of light and blush."""

    def __init__(self, person: Person, scene: Scene, size: int) -> None:
        self.size = size
        self.image = Image.new("L", (size * SUPERSAMPLING, size * SUPERSAMPLING))
        self.pen = ImageDraw.Draw(self.image)
        # materials and their numbers, in order; 0 is the background
        self.materials: dict[tuple[Color, int, int, float, float], int] = {}
        self.material((0.0, 0.0, 0.0), Label.BACKGROUND, 0, 0.0)
        self.person, self.scene = person, scene
        self.cos_yaw, self.sin_yaw = np.cos(scene.yaw), np.sin(scene.yaw)
        self.cos_pitch, self.sin_pitch = np.cos(scene.pitch), np.sin(scene.pitch)
        self.cos_roll, self.sin_roll = np.cos(scene.roll), np.sin(scene.roll)
        self.center = (0.5 + scene.dx, 0.53 + scene.dy)

    def material(self, color: Color, label: int, group: int, shade: float = 1.0, flush: float = 0.0) -> int:
        """Return the number of a material."""
        return self.materials.setdefault((color, label, group, shade, flush), len(self.materials))

    def feature(self, x: np.ndarray, y: np.ndarray, out: float = 0.0) -> Curve:
        """Rotate points of the face with the head; `out` is the height of the points above the face's surface."""
        u, v = x / (self.person.width * 1.08), y / 0.38
        z = DEPTH * np.sqrt(np.clip(1 - u * u - v * v, 0, 1)) + out
        turned = x * self.cos_yaw + z * self.sin_yaw
        depth = z * self.cos_yaw - x * self.sin_yaw
        return turned, y * self.cos_pitch + depth * self.sin_pitch

    def outline(self, x: np.ndarray, y: np.ndarray, z: float | np.ndarray = 0.0) -> Curve:
        """Rotate points of the silhouette: the head is about as deep as wide, so only points off its axis move."""
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
    """Return the outline of an ellipse from its centre and half axes, using every `every`-th angle of `TURN`."""
    return x + width * np.cos(TURN[::every]), y + height * np.sin(TURN[::every])


def band(x: np.ndarray, upper: np.ndarray, lower: np.ndarray) -> Curve:
    """Return the outline of the area between two curves with the same x."""
    return np.concatenate([x, x[::-1]]), np.concatenate([upper, lower[::-1]])


def power(t: np.ndarray, exponent: float) -> np.ndarray:
    """Raise the magnitude of `t` to a power, keeping the sign."""
    return np.sign(t) * np.abs(t) ** exponent
