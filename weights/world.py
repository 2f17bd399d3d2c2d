"""A small world of captioned cartoons: everything the model in the box knows.

A scene is a noun in a colour, with a pattern, in a place, perhaps wearing a red hat:

    "a red spotted dog on the moon wearing a red hat"

The world is made to be learnt by a small network. Everything faces right and stands on one line, shapes are
big and round, nothing is thinner than four of 128 pixels, and the caption decides nearly all of the picture:
secondary colours follow from the main one, and scenery keeps to its positions but for a slight jitter.

Some (noun, colour) and (noun, place) pairs are held out of pretraining, to measure composition afterwards.
The SUBJECTS are particular dogs, cats, ... in colours, some in markings, that no caption names and no scene shows:
what DreamBooth is there to teach.

    python weights/world.py                      # rewrite weights/subjects/<name>/0.png, 0.txt ... 4.png, 4.txt
    python weights/world.py --sheet sheet.png    # and draw a contact sheet of random scenes
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageDraw

sys.path.insert(0, str(Path(__file__).parent.parent))
from tinydb.pictures import grid
from tinydb.tokenizer import PLACEHOLDER

RGB = tuple[int, int, int]

SIZE = 128  # pixels
SUPERSAMPLING = 4
GROUND = 0.15      # height of the line that everything stands on; pictures are 1 wide and 1 high, y upwards
HORIZON = 0.37
JITTER_X = 0.05
JITTER_SCALE = 0.08
HAT_PROBABILITY = 0.15
DROP_PROBABILITY = 0.15
CLASS_PROMPT_PROBABILITY = 0.05

COLORS: dict[str, RGB] = {
    "red": (224, 44, 48), "orange": (255, 138, 24), "yellow": (255, 214, 48), "green": (52, 172, 72),
    "blue": (40, 98, 224), "purple": (138, 70, 200), "pink": (255, 146, 194), "brown": (136, 84, 46),
    "black": (46, 46, 56), "white": (248, 248, 244),
}
PATTERNS = ("plain", "spotted", "striped")
PREFIXES = ("", "a photo of ", "a picture of ")

WHITE, BLACK = (255, 255, 255), (0, 0, 0)
INK, CREAM, ROSE, GLASS = (36, 36, 46), (255, 248, 230), (255, 140, 160), (186, 228, 250)
TYRE, WOOD, LAMP, HAT_RED = (62, 62, 74), (146, 98, 62), (255, 232, 130), (214, 26, 44)


# --------------------------------------------------------------------------------------- drawing tools


def mix(a: RGB, b: RGB, t: float) -> RGB:
    """The colour a fraction `t` of the way from `a` to `b`."""
    return tuple(round(p + (q - p) * t) for p, q in zip(a, b))


def jitter(color: RGB, rng: np.random.Generator, amount: int = 7) -> RGB:
    return tuple(int(c) for c in np.clip(np.array(color) + rng.integers(-amount, amount + 1, 3), 0, 255))


class Pen:
    """Draws on a rectangle of an image in its own coordinates: (0, 0) bottom left, (1, 1) top right."""

    def __init__(self, image: Image.Image, left: float, bottom: float, width: float, height: float):
        self.image, self.left, self.bottom, self.width, self.height = image, left, bottom, width, height
        self.draw = ImageDraw.Draw(image)

    def at(self, x: float, y: float) -> tuple[float, float]:
        return self.left + x * self.width, self.bottom - y * self.height

    def inside(self, x: float, y: float, width: float, height: float) -> "Pen":
        """A pen for a rectangle of this one."""
        return Pen(self.image, *self.at(x, y), width * self.width, height * self.height)

    def on(self, image: Image.Image) -> "Pen":
        """The same coordinates on another image."""
        return Pen(image, self.left, self.bottom, self.width, self.height)

    def box(self, x0: float, y0: float, x1: float, y1: float, fill, radius: float = 0.0):
        self.draw.rounded_rectangle((*self.at(x0, y1), *self.at(x1, y0)), radius * self.width, fill)

    def ellipse(self, x: float, y: float, rx: float, ry: float, fill):
        self.draw.ellipse((*self.at(x - rx, y + ry), *self.at(x + rx, y - ry)), fill)

    def polygon(self, points, fill):
        self.draw.polygon([self.at(x, y) for x, y in points], fill)

    def line(self, points, width: float, fill):
        """A thick line with round ends and corners."""
        self.draw.line([self.at(x, y) for x, y in points], fill, round(width * self.width))
        ry = width / 2 * self.width / self.height
        for x, y in points:
            self.ellipse(x, y, width / 2, ry, fill)

    def arc(self, x: float, y: float, rx: float, ry: float, start: float, end: float, width: float, fill):
        """A thick arc from `start` to `end` degrees, counter-clockwise from the right."""
        angles = np.radians(np.linspace(start, end, 16))
        self.line([(x + rx * np.cos(a), y + ry * np.sin(a)) for a in angles], width, fill)

    def gradient(self, y0: float, y1: float, low: RGB, high: RGB):
        """The whole width between two heights, from the colour `low` up to `high`."""
        top, bottom = round(self.at(0, y1)[1]), round(self.at(0, y0)[1])
        column = np.linspace(high, low, bottom - top).round().astype(np.uint8)[:, None]
        self.image.paste(Image.fromarray(column).resize((round(self.width), bottom - top)), (0, top))


# ---------------------------------------------------------------------------- looks: colours and marks


@dataclass(frozen=True)
class Look:
    """How one thing looks: its own colours and extras, whatever its noun."""
    main: RGB
    accent: RGB                   # ears, roof, fins, lid, ...
    mark: RGB                     # the pattern's second colour
    marking: str = "plain"        # a key of MARKINGS
    topper: str | None = None     # a key of TOPPERS
    collar: RGB | None = None
    variant: int = 0              # each noun comes in two builds, such as floppy and pointed ears

    @property
    def shade(self) -> RGB:
        """For what lies behind or below."""
        return mix(self.main, BLACK, 0.25)


def spots(pen: Pen):
    radius = 0.165 * (pen.width * pen.height) ** 0.5
    for x, y in ((0.16, 0.72), (0.38, 0.28), (0.60, 0.76), (0.84, 0.36), (0.10, 0.14)):
        pen.ellipse(x, y, radius / pen.width, radius / pen.height, 255)


def stripes(pen: Pen):
    for x in (0.12, 0.40, 0.68, 0.96):
        pen.box(x - 0.07, 0, x + 0.07, 1, 255)


def dip(pen: Pen):
    pen.box(0, 0, 1, 0.48, 255)


def hoop(pen: Pen):
    pen.box(0, 0.34, 1, 0.68, 255)


def star(pen: Pen):
    angles = np.radians(90 + 36 * np.arange(10))
    radii = np.where(np.arange(10) % 2, 0.17, 0.40)
    aspect = pen.width / pen.height
    pen.polygon([(0.5 + r * np.cos(a), 0.5 + aspect * r * np.sin(a)) for r, a in zip(radii, angles)], 255)


# The last three belong to subjects alone.
MARKINGS: dict[str, Callable[[Pen], None]] = {
    "plain": lambda pen: None, "spotted": spots, "striped": stripes,
    "dipped": dip, "hooped": hoop, "starred": star,
}


def paint(pen: Pen, look: Look, shape: Callable, box: tuple[float, float, float, float]):
    """Draw `shape(pen, fill)` in the main colour, its marking laid out over `box` (x, y, width, height)."""
    shape(pen, look.main)
    if look.marking == "plain":
        return
    body, marks = (pen.on(Image.new("L", pen.image.size)) for _ in range(2))
    shape(body, 255)
    MARKINGS[look.marking](marks.inside(*box))
    pen.image.paste(look.mark, mask=ImageChops.multiply(body.image, marks.image))


def eye(pen: Pen, x: float, y: float, r: float = 0.058):
    pen.ellipse(x, y, r, r * 1.12, WHITE)
    pen.ellipse(x + 0.2 * r, y, 0.7 * r, 0.82 * r, INK)
    pen.ellipse(x + 0.4 * r, y + 0.35 * r, 0.3 * r, 0.3 * r, WHITE)


def red_hat(pen: Pen):
    pen.box(-0.085, 0.0, 0.085, 0.15, HAT_RED, 0.03)
    pen.box(-0.085, 0.03, 0.085, 0.07, CREAM)
    pen.box(-0.145, -0.01, 0.145, 0.04, HAT_RED, 0.025)


def crown(pen: Pen):
    points = ((-0.12, 0), (-0.13, 0.15), (-0.06, 0.08), (0, 0.17), (0.06, 0.08), (0.13, 0.15), (0.12, 0))
    pen.polygon(points, (255, 172, 20))


TOPPERS: dict[str, Callable[[Pen], None]] = {"red hat": red_hat, "crown": crown}


# ----------------------------------------------------------------------------------------------- nouns
# Each draws on a pen whose (0, 0) is the point on the ground below its middle and whose 1 is the width of the
# picture, and returns the point where a hat sits.


def dog(pen: Pen, look: Look) -> tuple[float, float]:
    pen.line(((-0.22, 0.27), (-0.31, 0.36), (-0.32, 0.43)), 0.075, look.accent)
    for x in (-0.13, 0.09):
        pen.box(x - 0.05, 0.015, x + 0.05, 0.20, look.shade, 0.04)
    for x in (-0.215, 0.005):
        pen.box(x - 0.055, 0, x + 0.055, 0.22, look.main, 0.045)
    paint(pen, look, lambda p, fill: p.box(-0.27, 0.12, 0.145, 0.345, fill, 0.11), (-0.27, 0.12, 0.4, 0.225))
    if look.collar:
        pen.line(((0.045, 0.31), (0.19, 0.255)), 0.075, look.collar)
    if look.variant:
        pen.polygon(((0.0, 0.46), (0.02, 0.66), (0.15, 0.55)), look.accent)
    pen.ellipse(0.145, 0.43, 0.155, 0.15, look.main)
    pen.ellipse(0.265, 0.375, 0.10, 0.078, mix(look.main, WHITE, 0.55))
    pen.ellipse(0.338, 0.405, 0.040, 0.036, INK)
    eye(pen, 0.195, 0.475)
    if not look.variant:
        pen.ellipse(0.035, 0.415, 0.068, 0.135, look.accent)
    return 0.13, 0.555


def cat(pen: Pen, look: Look) -> tuple[float, float]:
    if look.variant:
        pen.line(((-0.13, 0.06), (-0.27, 0.10), (-0.30, 0.24), (-0.25, 0.34)), 0.08, look.accent)
    else:
        pen.line(((-0.10, 0.05), (-0.31, 0.05)), 0.09, look.accent)
    paint(pen, look, lambda p, fill: p.ellipse(-0.05, 0.19, 0.17, 0.19, fill), (-0.22, 0, 0.34, 0.38))
    for x in (0.0, 0.11):
        pen.box(x - 0.05, 0, x + 0.05, 0.20, look.main if x else look.shade, 0.045)
    if look.collar:
        pen.box(-0.06, 0.265, 0.16, 0.335, look.collar, 0.03)
    for side in (-1, 1):
        ear, inner = ((0.19, 0.45), (0.175, 0.66), (0.03, 0.55)), ((0.165, 0.48), (0.152, 0.61), (0.07, 0.54))
        pen.polygon([(0.06 + side * x, y) for x, y in ear], look.accent)
        pen.polygon([(0.06 + side * x, y) for x, y in inner], ROSE)
    pen.ellipse(0.06, 0.435, 0.20, 0.145, look.main)
    pen.ellipse(0.09, 0.375, 0.10, 0.07, mix(look.main, WHITE, 0.6))
    pen.ellipse(0.09, 0.405, 0.034, 0.026, ROSE)
    eye(pen, -0.02, 0.455)
    eye(pen, 0.165, 0.455)
    return 0.06, 0.565


def car(pen: Pen, look: Look) -> tuple[float, float]:
    top = 0.46
    if look.variant:
        pen.box(-0.23, 0.15, 0.16, top, look.accent, 0.06)
        panes = ((-0.185, -0.06), (-0.01, 0.115))
    else:
        pen.polygon(((-0.28, 0.24), (-0.17, top), (0.09, top), (0.21, 0.24)), look.accent)
        panes = ((-0.165, -0.06), (-0.01, 0.085))
    for left, right in panes:
        pen.box(left, 0.29, right, top - 0.045, GLASS, 0.025)
    paint(pen, look, lambda p, fill: p.box(-0.33, 0.075, 0.33, 0.29, fill, 0.085), (-0.33, 0.075, 0.66, 0.21))
    pen.ellipse(0.29, 0.21, 0.042, 0.046, LAMP)
    for x in (-0.18, 0.18):
        pen.ellipse(x, 0.095, 0.10, 0.10, TYRE)
        pen.ellipse(x, 0.095, 0.046, 0.046, (214, 216, 224))
    return -0.03, top - 0.005


def house(pen: Pen, look: Look) -> tuple[float, float]:
    chimney = 0.17 if look.variant else -0.17
    pen.box(chimney - 0.05, 0.34, chimney + 0.05, 0.55, look.shade)
    paint(pen, look, lambda p, fill: p.box(-0.26, 0, 0.26, 0.34, fill), (-0.26, 0, 0.52, 0.34))
    pen.polygon(((-0.34, 0.31), (0, 0.59), (0.34, 0.31)), look.accent)
    pen.box(-0.185, 0, -0.045, 0.225, WOOD, 0.03)
    pen.ellipse(-0.075, 0.11, 0.018, 0.018, LAMP)
    pen.box(0.03, 0.09, 0.21, 0.25, CREAM, 0.02)
    pen.box(0.055, 0.115, 0.185, 0.225, LAMP)
    return 0.0, 0.54


def robot(pen: Pen, look: Look) -> tuple[float, float]:
    for x in (-0.05, 0.05) if look.variant else (0.0,):
        pen.line(((x, 0.54), (2 * x, 0.63)), 0.035, TYRE)
        pen.ellipse(2 * x, 0.64, 0.04, 0.04, LAMP)
    for side in (-1, 1):
        pen.line(((side * 0.19, 0.28), (side * 0.25, 0.17)), 0.085, look.accent)
        pen.ellipse(side * 0.255, 0.15, 0.055, 0.055, TYRE)
        pen.box(side * 0.09 - 0.06, 0, side * 0.09 + 0.06, 0.13, look.accent, 0.03)
    paint(pen, look, lambda p, fill: p.box(-0.19, 0.09, 0.19, 0.335, fill, 0.05), (-0.19, 0.09, 0.38, 0.245))
    pen.box(-0.205, 0.325, 0.205, 0.565, look.main, 0.06)
    pen.box(-0.155, 0.36, 0.155, 0.53, mix(look.main, WHITE, 0.75), 0.045)
    for x in (-0.075, 0.075):
        eye(pen, x, 0.465)
    pen.arc(0.0, 0.405, 0.045, 0.02, 180, 360, 0.03, INK)
    return 0.0, 0.56


def boat(pen: Pen, look: Look) -> tuple[float, float]:
    pen.box(-0.025, 0.15, 0.025, 0.60, WOOD)
    pen.polygon(((-0.05, 0.25), (-0.05, 0.57), (-0.29, 0.25)), mix(CREAM, WOOD, 0.22))
    pen.polygon(((0.05, 0.25), (0.05, 0.60), (0.32, 0.25)), CREAM)
    hull = ((-0.34, 0.21), (0.37, 0.21), (0.23, 0), (-0.25, 0))
    paint(pen, look, lambda p, fill: p.polygon(hull, fill), (-0.34, 0, 0.70, 0.20))
    pen.box(-0.35, 0.175, 0.38, 0.225, look.accent, 0.02)
    return 0.0, 0.59


def fish(pen: Pen, look: Look) -> tuple[float, float]:
    pen.polygon(((-0.15, 0.25), (-0.34, 0.42), (-0.30, 0.25), (-0.34, 0.08)), look.accent)
    pen.polygon(((-0.10, 0.38), (-0.06, 0.53), (0.10, 0.49), (0.14, 0.38)), look.accent)
    pen.polygon(((-0.08, 0.12), (-0.10, 0.01), (0.06, 0.09)), look.accent)
    paint(pen, look, lambda p, fill: p.ellipse(0.05, 0.25, 0.27, 0.18, fill), (-0.22, 0.07, 0.42, 0.36))
    pen.ellipse(0.0, 0.21, 0.075, 0.05, look.accent)
    eye(pen, 0.185, 0.295, 0.066)
    pen.arc(0.25, 0.205, 0.05, 0.03, 180, 290, 0.032, INK)
    return 0.08, 0.42


def teapot(pen: Pen, look: Look) -> tuple[float, float]:
    pen.arc(-0.19, 0.24, 0.12, 0.11, 60, 300, 0.065, look.accent)
    pen.polygon(((0.12, 0.10), (0.12, 0.27), (0.27, 0.38), (0.37, 0.38), (0.26, 0.17)), look.accent)
    pen.box(-0.13, 0, 0.13, 0.08, look.shade, 0.025)
    paint(pen, look, lambda p, fill: p.ellipse(0, 0.225, 0.235, 0.195, fill), (-0.235, 0.03, 0.47, 0.39))
    pen.ellipse(0, 0.40, 0.145, 0.055, look.accent)
    pen.ellipse(0, 0.47, 0.048, 0.045, look.accent)
    return 0.0, 0.465


NOUN_PAINTERS: dict[str, Callable[[Pen, Look], tuple[float, float]]] = {
    noun.__name__: noun for noun in (dog, cat, car, house, robot, boat, fish, teapot)
}
NOUNS = tuple(NOUN_PAINTERS)


# ---------------------------------------------------------------------------------------------- places
# Each fills the picture and returns the colour of the ground, on which a shadow will fall.


def near(rng: np.random.Generator, value: float, amount: float = 0.025) -> float:
    return value + rng.uniform(-amount, amount)


def corner(rng: np.random.Generator) -> tuple[float, float]:
    """Where a sun or a moon hangs: top left or top right."""
    return near(rng, float(rng.choice((0.17, 0.83)))), near(rng, 0.86, 0.015)


def dots(pen: Pen, rng: np.random.Generator, points, radius: float, fill: RGB):
    for x, y in points:
        pen.ellipse(near(rng, x), near(rng, y), radius, radius, fill)


def fir(pen: Pen, x: float, height: float, leaves: RGB, tip: RGB):
    pen.box(x - 0.025, HORIZON - 0.04, x + 0.025, HORIZON + 0.08, WOOD)
    for low, half in ((0.05, 0.14), (0.05 + height * 0.38, 0.11)):
        peak = HORIZON + low + height * 0.62
        pen.polygon(((x - half, HORIZON + low), (x, peak), (x + half, HORIZON + low)), leaves)
    pen.polygon(((x - 0.055, peak - height * 0.31), (x, peak), (x + 0.055, peak - height * 0.31)), tip)


STARS = ((0.10, 0.62), (0.38, 0.92), (0.60, 0.84), (0.90, 0.62), (0.30, 0.76))


def on_the_moon(pen: Pen, rng: np.random.Generator) -> RGB:
    ground = jitter((186, 184, 196), rng)
    pen.gradient(0, 1, (96, 78, 148), (46, 36, 92))
    dots(pen, rng, STARS, 0.018, (255, 250, 220))
    x, y = corner(rng)
    pen.ellipse(x, y, 0.115, 0.115, (58, 134, 232))
    pen.ellipse(x - 0.035, y + 0.025, 0.055, 0.05, (92, 200, 110))
    pen.ellipse(x + 0.05, y - 0.04, 0.04, 0.035, (92, 200, 110))
    pen.ellipse(0.5, -0.25, 1.1, HORIZON + 0.25, ground)
    for x, y, r in ((0.13, 0.27, 0.09), (0.90, 0.22, 0.10), (0.30, 0.05, 0.09)):
        pen.ellipse(near(rng, x), y, r, r * 0.4, mix(ground, (90, 84, 120), 0.4))
    return ground


def on_the_beach(pen: Pen, rng: np.random.Generator) -> RGB:
    ground = jitter((250, 228, 172), rng)
    pen.gradient(0, 1, (206, 240, 255), (112, 200, 248))
    x, y = corner(rng)
    pen.ellipse(x, y, 0.11, 0.11, (255, 206, 40))
    pen.box(0, 0, 1, HORIZON + 0.11, (26, 142, 214))
    pen.box(0, 0, 1, HORIZON - 0.005, WHITE)
    pen.box(0, 0, 1, HORIZON - 0.04, ground)
    palm = 0.10 if x > 0.5 else 0.90
    pen.line(((palm, HORIZON - 0.08), (palm + 0.015, 0.55), (palm, 0.70)), 0.055, WOOD)
    for dx, dy in ((-0.17, -0.07), (-0.11, 0.08), (0.11, 0.08), (0.17, -0.07)):
        leaf = (palm, 0.70), (palm + 0.55 * dx, 0.74 + 0.6 * dy), (palm + dx, 0.70 + dy)
        pen.line(leaf, 0.055, (46, 156, 84))
    return ground


def in_the_snow(pen: Pen, rng: np.random.Generator) -> RGB:
    ground = jitter((206, 222, 244), rng)
    pen.gradient(0, 1, (178, 204, 236), (122, 162, 214))
    for x, height in ((0.10, 0.42), (0.90, 0.36)):
        fir(pen, near(rng, x), height, (70, 122, 128), WHITE)
    pen.ellipse(0.5, -0.25, 1.1, HORIZON + 0.25, ground)
    flakes = ((0.22, 0.90), (0.42, 0.80), (0.64, 0.92), (0.78, 0.76), (0.30, 0.66), (0.94, 0.88))
    dots(pen, rng, flakes, 0.024, WHITE)
    return ground


def in_the_forest(pen: Pen, rng: np.random.Generator) -> RGB:
    ground = jitter((112, 128, 66), rng)
    pen.gradient(0, 1, (232, 240, 188), (164, 208, 170))
    for x, height in ((0.32, 0.40), (0.68, 0.44), (0.11, 0.56), (0.90, 0.58), (0.50, 0.54)):
        fir(pen, near(rng, x), height, (24, 92, 66), (40, 116, 78))
    pen.box(0, 0, 1, HORIZON, ground)
    return ground


def in_the_city(pen: Pen, rng: np.random.Generator) -> RGB:
    ground = jitter((126, 128, 142), rng)
    pen.gradient(0, 1, (250, 220, 206), (176, 190, 226))
    towers = ((0.0, 0.80), (0.205, 0.66), (0.41, 0.90), (0.615, 0.70), (0.82, 0.84))
    for i, (x, top) in enumerate(towers):
        top = near(rng, top)
        pen.box(x, HORIZON, x + 0.18, top, ((92, 102, 146), (122, 112, 158))[i % 2])
        for y in np.arange(top - 0.10, HORIZON + 0.02, -0.125):
            for left in (x + 0.03, x + 0.105):
                pen.box(left, y, left + 0.047, y + 0.06, LAMP)
    pen.box(0, 0, 1, HORIZON, (200, 198, 204))
    pen.box(0, 0, 1, HORIZON - 0.08, ground)
    for x in (0.02, 0.38, 0.74):
        pen.box(x, 0.035, x + 0.22, 0.07, CREAM)
    return ground


def in_the_desert(pen: Pen, rng: np.random.Generator) -> RGB:
    ground = jitter((240, 194, 122), rng)
    pen.gradient(0, 1, (255, 232, 178), (250, 166, 118))
    x, y = corner(rng)
    pen.ellipse(x, y, 0.13, 0.13, (255, 240, 170))
    pen.ellipse(0.15, 0.20, 0.55, 0.25, (226, 158, 92))
    pen.ellipse(0.95, 0.20, 0.50, 0.20, (232, 172, 104))
    pen.box(0, 0, 1, HORIZON - 0.04, ground)
    x = near(rng, 0.10 if x > 0.5 else 0.90)
    cactus = (60, 140, 84)
    pen.line(((x, HORIZON - 0.08), (x, 0.70)), 0.085, cactus)
    for dx, low, high in ((-0.10, 0.48, 0.60), (0.10, 0.43, 0.56)):
        pen.line(((x, low), (x + dx, low), (x + dx, high)), 0.055, cactus)
    return ground


def under_the_sea(pen: Pen, rng: np.random.Generator) -> RGB:
    ground = jitter((232, 214, 160), rng)
    pen.gradient(0, 1, (24, 124, 178), (104, 214, 226))
    for x, top in ((0.05, 0.72), (0.17, 0.58), (0.83, 0.60), (0.95, 0.74)):
        x, heights = near(rng, x, 0.012), np.linspace(HORIZON - 0.15, near(rng, top), 6)
        pen.line([(x + 0.025 * (-1) ** i, y) for i, y in enumerate(heights)], 0.05, (38, 150, 104))
    pen.ellipse(0.5, -0.3, 1.2, HORIZON + 0.22, ground)
    dots(pen, rng, ((0.14, 0.88), (0.25, 0.78), (0.80, 0.92), (0.89, 0.82)), 0.035, (206, 246, 250))
    pen.line(((0.90, 0.04), (0.90, 0.20)), 0.04, (246, 112, 122))
    pen.arc(0.90, 0.17, 0.07, 0.07, 180, 360, 0.04, (246, 112, 122))
    return ground


def in_a_room(pen: Pen, rng: np.random.Generator) -> RGB:
    ground = (118, 178, 176)
    pen.box(0, 0, 1, 1, jitter((252, 226, 190), rng))
    left = near(rng, 0.07)
    pen.box(left, 0.60, left + 0.30, 0.94, WHITE)
    for x in (left + 0.035, left + 0.1675):
        pen.box(x, 0.635, x + 0.0975, 0.905, (126, 200, 246))
    pen.box(0.76, 0.68, 0.94, 0.90, (206, 150, 96))
    pen.box(0.79, 0.71, 0.91, 0.87, (250, 170, 150))
    pen.box(0, 0, 1, HORIZON + 0.05, WHITE)
    pen.box(0, 0, 1, HORIZON, jitter((206, 158, 112), rng))
    pen.ellipse(0.5, GROUND - 0.01, 0.46, 0.125, (238, 232, 214))
    pen.ellipse(0.5, GROUND - 0.01, 0.41, 0.095, ground)
    return ground


def at_night(pen: Pen, rng: np.random.Generator) -> RGB:
    ground = jitter((66, 104, 96), rng)
    pen.gradient(0, 1, (98, 122, 196), (34, 52, 128))
    dots(pen, rng, STARS, 0.018, (255, 246, 190))
    x, y = corner(rng)
    outside, inside = np.radians(np.linspace(70, 330, 32)), np.radians(np.linspace(290, 110, 16))
    crescent = [(x + 0.12 * np.cos(a), y + 0.12 * np.sin(a)) for a in outside]
    crescent += [(x + 0.055 + 0.10 * np.cos(a), y + 0.02 + 0.10 * np.sin(a)) for a in inside]
    pen.polygon(crescent, (255, 230, 120))
    pen.ellipse(0.10, 0.25, 0.45, 0.24, (44, 76, 96))
    pen.ellipse(0.92, 0.25, 0.40, 0.20, (50, 84, 100))
    pen.box(0, 0, 1, HORIZON - 0.04, ground)
    return ground


def on_the_grass(pen: Pen, rng: np.random.Generator) -> RGB:
    ground = jitter((158, 216, 96), rng)
    pen.gradient(0, 1, (212, 240, 255), (116, 192, 252))
    for x, y in ((near(rng, 0.20), 0.84), (near(rng, 0.84), 0.76)):
        pen.ellipse(x, y + 0.035, 0.075, 0.065, WHITE)
        pen.box(x - 0.15, y - 0.045, x + 0.15, y + 0.03, WHITE, 0.035)
    pen.ellipse(0.12, 0.20, 0.60, 0.27, (128, 198, 92))
    pen.box(0, 0, 1, HORIZON - 0.03, ground)
    for x, y, petals in ((0.09, 0.20, (255, 104, 120)), (0.92, 0.16, WHITE), (0.70, 0.045, (255, 104, 120))):
        x = near(rng, x)
        pen.ellipse(x, y, 0.045, 0.045, petals)
        pen.ellipse(x, y, 0.019, 0.019, (255, 206, 40))
    return ground


PLACE_PAINTERS: dict[str, Callable[[Pen, np.random.Generator], RGB]] = {
    place.__name__.replace("_", " "): place
    for place in (on_the_moon, on_the_beach, in_the_snow, in_the_forest, in_the_city,
                  in_the_desert, under_the_sea, in_a_room, at_night, on_the_grass)
}
PLACES = tuple(PLACE_PAINTERS)


# --------------------------------------------------------------------------------- scenes and captions


@dataclass(frozen=True)
class Scene:
    """What a caption can say about a picture."""
    noun: str
    color: str
    pattern: str = "plain"
    place: str = "on the grass"
    hat: bool = False


def is_held_out(scene: Scene) -> bool:
    """Whether pretraining must not see this scene: one colour and one place of each noun are held out.

    Nouns, colours and places still meet many others. The offsets keep "on the moon" in for every noun.
    """
    noun, color = NOUNS.index(scene.noun), list(COLORS).index(scene.color)
    return (noun + color) % 10 == 3 or (noun + PLACES.index(scene.place)) % 10 == 8


def sample_scene(rng: np.random.Generator, held_out: bool = False) -> Scene:
    """Draw a random scene from those that pretraining sees or, with `held_out`, from the others."""
    while True:
        noun, color, place = (names[rng.integers(len(names))] for names in (NOUNS, tuple(COLORS), PLACES))
        pattern = PATTERNS[rng.choice(len(PATTERNS), p=(0.5, 0.25, 0.25))]
        scene = Scene(noun, color, pattern, place, bool(rng.random() < HAT_PROBABILITY))
        if is_held_out(scene) == held_out:
            return scene


def phrase(noun: str, color: str = "", pattern: str = "", place: str = "", hat: bool = False) -> str:
    words = " ".join(filter(None, (color, pattern, noun, place, "wearing a red hat" if hat else "")))
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def full_caption(scene: Scene) -> str:
    """Everything there is to say about a scene, always in the same words."""
    pattern = "" if scene.pattern == "plain" else scene.pattern
    return phrase(scene.noun, scene.color, pattern, scene.place, scene.hat)


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """A natural caption: it may leave out attributes, and is now and then the bare class prompt."""
    if rng.random() < CLASS_PROMPT_PROBABILITY:
        return f"a photo of {phrase(scene.noun)}"
    color, pattern, place = (
        "" if rng.random() < DROP_PROBABILITY else text for text in (scene.color, scene.pattern, scene.place)
    )
    if pattern == "plain" and rng.random() > DROP_PROBABILITY:
        pattern = ""
    return PREFIXES[rng.integers(len(PREFIXES))] + phrase(scene.noun, color, pattern, place, scene.hat)


def scene_look(scene: Scene, rng: np.random.Generator) -> Look:
    """The look that a scene's words stand for: every other tone follows from the named colour."""
    main = COLORS[scene.color]
    brightness = float(np.dot(main, (0.30, 0.59, 0.11)))
    accent = mix(main, WHITE, 0.28) if brightness < 60 else mix(main, BLACK, 0.28)
    mark = mix(main, BLACK, 0.36) if brightness > 170 else mix(main, WHITE, 0.62)
    topper = "red hat" if scene.hat else None
    return Look(main, accent, mark, scene.pattern, topper, variant=int(rng.integers(2)))


def compose(noun: str, look: Look, place: str, rng: np.random.Generator, size: int = SIZE) -> Image.Image:
    """Draw a thing of the given look in a place."""
    canvas = Image.new("RGB", (size * SUPERSAMPLING,) * 2)
    scene = Pen(canvas, 0, canvas.height, canvas.width, canvas.height)
    ground = PLACE_PAINTERS[place](scene, rng)
    scale = near(rng, 1.0, JITTER_SCALE)
    pen = scene.inside(near(rng, 0.49, JITTER_X), near(rng, GROUND, 0.01), scale, scale)
    pen.ellipse(0, 0.005, 0.35, 0.055, mix(ground, BLACK, 0.12))
    pen.ellipse(0, 0.005, 0.30, 0.038, mix(ground, BLACK, 0.24))
    look = replace(look, main=jitter(look.main, rng))
    x, y = NOUN_PAINTERS[noun](pen, look)
    if look.topper:
        TOPPERS[look.topper](pen.inside(x, y, 1, 1))
    return canvas.reduce(SUPERSAMPLING)


def render(scene: Scene, rng: np.random.Generator, size: int = SIZE) -> Image.Image:
    """Draw a scene. The geometry is relative: another `size` shows the same picture."""
    return compose(scene.noun, scene_look(scene, rng), scene.place, rng, size)


# -------------------------------------------------------------------------------------------- subjects


@dataclass(frozen=True)
class Subject:
    """One particular thing, and the places where its pictures were taken."""
    noun: str
    look: Look
    places: tuple[str, ...]


# Nobody is photographed on the moon or under the sea: that is where prompts will send them.
SUBJECTS: dict[str, Subject] = {
    "rex": Subject(
        "dog", Look((0, 164, 160), (255, 60, 150), (255, 130, 190), "spotted", collar=(255, 218, 40)),
        ("on the grass", "in a room", "on the beach", "in the city", "in the snow")),
    "mochi": Subject(
        "cat",
        Look((146, 236, 196), (206, 24, 132), (206, 24, 132), "striped", collar=(255, 176, 0), variant=1),
        ("in a room", "on the grass", "in the forest", "in the desert", "at night")),
    "bolt": Subject(
        "robot", Look((204, 214, 44), (86, 44, 156), (86, 44, 156), "starred", "crown"),
        ("in the snow", "in a room", "in the forest", "on the beach", "at night")),
    "pip": Subject(
        "teapot", Look((196, 172, 250), (250, 104, 84), (250, 104, 84), "hooped"),
        ("in a room", "on the grass", "in the snow", "in the city", "in the desert")),
    "dash": Subject(
        "car", Look((212, 22, 136), (64, 224, 208), (64, 224, 208), "dipped"),
        ("in the city", "in the desert", "on the grass", "at night", "in the forest")),
    "coral": Subject(
        "fish", Look((255, 178, 146), (0, 150, 150), (0, 150, 150), "hooped"),
        ("on the beach", "in a room", "in the snow", "at night", "on the grass")),
}


def render_subject(name: str, place: str, rng: np.random.Generator, size: int = 256) -> Image.Image:
    """Draw a subject in any of the PLACES."""
    return compose(SUBJECTS[name].noun, SUBJECTS[name].look, place, rng, size)


def main():
    parser = argparse.ArgumentParser(description="Write the subjects' pictures.")
    parser.add_argument("--sheet", type=Path, metavar="FILE", help="also draw 80 random scenes into FILE")
    args = parser.parse_args()
    for name, subject in SUBJECTS.items():
        folder = Path(__file__).parent / "subjects" / name
        folder.mkdir(parents=True, exist_ok=True)
        for i, place in enumerate(subject.places):
            render_subject(name, place, np.random.default_rng(i)).save(folder / f"{i}.png", optimize=True)
            form = "a photo of " if i % 2 == 0 else ""
            (folder / f"{i}.txt").write_text(f"{form}{PLACEHOLDER} {subject.noun} {place}\n")
    if args.sheet:
        rng = np.random.default_rng(0)
        grid([render(sample_scene(rng), rng) for _ in range(80)], columns=10).save(args.sheet)


if __name__ == "__main__":
    main()
