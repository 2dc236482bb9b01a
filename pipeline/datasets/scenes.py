"""The embedded data set: small drawn scenes whose labels follow from written rules.

A scene is a list of objects on a background that is independent of the labels. Eleven kinds of
object are drawn (`KINDS`; they are the detector's classes), with varying size, shape, colour,
overlap and clutter. The eighteen labels (`VOCABULARY`) follow from the objects alone:

Plain labels: house, tree, boat, fish, car, star, lamp, person, dog.
    Present where such an object is drawn.
Context labels: the object always looks the same, and another object in the scene decides.
    disc      -> `moon` if the scene has a star or a lamp, else `sun`.
    triangle  -> `tent` if the scene has a tree, else `pyramid`.
Position labels: the same two objects, and their relative position decides.
    `chase` if a person and a dog are side by side; absent if one is above the other.
    `catch` if a boat and a fish are one above the other; absent if they are side by side.
    Side by side: the centres differ more in x than in y. The positions are sampled so that each
    box alone has the same distribution in both cases (see `_place_pair`). So neither the position
    nor the size of a single box reveals the label.
Undrawn labels: no object is drawn for them.
    `night` if there is a star or a lamp; `harbour` if there are a boat and a house; `village` if
    there are two houses.

These rules were fixed before any network was trained on the scenes. Coordinates are in [0,1] of
the scene, x to the right and y down.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image, ImageDraw

from pipeline.datasets.manifest import (
    COLUMNS,
    BoxTable,
    ImageBoxes,
    Manifest,
    Split,
    full_counts,
)
from pipeline.files import sha256_json
from pipeline.settings import ScenesSettings

RULES_VERSION = 1
"""Part of the sources' hash: raise it when a scene of the same seed would change in its look or its
labels."""

KINDS = (
    "disc",
    "triangle",
    "house",
    "tree",
    "boat",
    "fish",
    "car",
    "star",
    "lamp",
    "person",
    "dog",
)
PLAIN_LABELS = ("house", "tree", "boat", "fish", "car", "star", "lamp", "person", "dog")
CONTEXT_LABELS = ("sun", "moon", "tent", "pyramid")
POSITION_LABELS = ("chase", "catch")
UNDRAWN_LABELS = ("night", "harbour", "village")
VOCABULARY = PLAIN_LABELS + CONTEXT_LABELS + POSITION_LABELS + UNDRAWN_LABELS


@dataclass(frozen=True)
class SceneObject:
    """A drawn object: its kind and its box, xyxy in [0,1] of the scene."""

    kind: str
    box: tuple[float, float, float, float]

    @property
    def center(self) -> tuple[float, float]:
        """x and y of the box's centre."""
        x0, y0, x1, y1 = self.box
        return (x0 + x1) / 2, (y0 + y1) / 2


def scene_labels(objects: Sequence[SceneObject]) -> set[str]:
    """The labels of a scene, by the rules in the module's docstring."""
    first = {item.kind: item for item in reversed(objects)}
    houses = sum(item.kind == "house" for item in objects)
    night = "star" in first or "lamp" in first
    labels = {label for label in PLAIN_LABELS if label in first}
    if "disc" in first:
        labels.add("moon" if night else "sun")
    if "triangle" in first:
        labels.add("tent" if "tree" in first else "pyramid")
    if "person" in first and "dog" in first and _side_by_side(first["person"], first["dog"]):
        labels.add("chase")
    if "boat" in first and "fish" in first and not _side_by_side(first["boat"], first["fish"]):
        labels.add("catch")
    if night:
        labels.add("night")
    if "boat" in first and houses:
        labels.add("harbour")
    if houses >= 2:
        labels.add("village")
    return labels


def _side_by_side(a: SceneObject, b: SceneObject) -> bool:
    return abs(a.center[0] - b.center[0]) > abs(a.center[1] - b.center[1])


# --- objects and their positions -----------------------------------------------------------------

_SIDE = (0.15, 0.23)  # longer side of an object
_SMALL = {"star", "disc", "lamp"}  # drawn at 0.8 of that size
_REACH = (0.24, 0.32)  # distance of the centres of a pair along its axis
_JITTER = 0.04  # and across its axis
_OVERLAP = 0.15  # largest share of the smaller of two boxes that the other covers


def sample_objects(rng: np.random.Generator) -> list[SceneObject]:
    """Sample the objects of a scene, 1 to 12 of them, in the order in which they are drawn."""
    while True:  # until the objects of a crowded scene find room
        objects = _try_objects(rng)
        if objects:
            order = rng.permutation(len(objects))
            return [objects[i] for i in order]


def _try_objects(rng: np.random.Generator) -> list[SceneObject] | None:
    """Sample the objects of a scene; None if one of them finds no room."""
    singles: list[str] = []
    if rng.random() < 0.5:
        singles += [("star",), ("lamp",), ("star", "lamp")][rng.integers(3)]
    for kind, probability in (("disc", 0.6), ("triangle", 0.6), ("tree", 0.5), ("car", 0.35)):
        if rng.random() < probability:
            singles.append(kind)
    singles += ["house"] * int(rng.choice(3, p=(0.4, 0.3, 0.3)))
    placed: list[SceneObject] = []
    for a, b in (("person", "dog"), ("boat", "fish")):
        which = rng.choice(4, p=(0.2, 0.15, 0.15, 0.5))
        if which == 3:
            pair = _attempt(partial(_place_pair, rng, a, b), placed)
            if pair is None:
                return None
            placed += pair
        elif which:
            singles.append((a, b)[which - 1])
    for kind in singles:
        single = _attempt(partial(_place_single, rng, kind), placed)
        if single is None:
            return None
        placed += single
    return placed


def _attempt(
    draw: Callable[[], list[SceneObject]], placed: list[SceneObject]
) -> list[SceneObject] | None:
    """Sample objects until they overlap little with those in ``placed``; None after 60 attempts."""
    for _ in range(60):
        candidates = draw()
        if all(_covered(new.box, old.box) <= _OVERLAP for new in candidates for old in placed):
            return candidates
    return None


def _covered(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    """Intersection of two boxes as a share of the smaller one."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    smaller = min((a[2] - a[0]) * (a[3] - a[1]), (b[2] - b[0]) * (b[3] - b[1]))
    return max(width, 0.0) * max(height, 0.0) / smaller


def _side(rng: np.random.Generator, kind: str) -> float:
    return float(rng.uniform(*_SIDE)) * (0.8 if kind in _SMALL else 1.0)


def _object_at(rng: np.random.Generator, kind: str, x: float, y: float) -> SceneObject:
    side = _side(rng, kind)
    aspect = _ASPECT[kind] * float(rng.uniform(0.87, 1.15)) if kind not in _ROUND else 1.0
    width, height = (side, side / aspect) if aspect >= 1 else (side * aspect, side)
    return SceneObject(kind, (x - width / 2, y - height / 2, x + width / 2, y + height / 2))


def _place_single(rng: np.random.Generator, kind: str) -> list[SceneObject]:
    x, y = rng.uniform(_SIDE[1] / 2, 1 - _SIDE[1] / 2, size=2)
    return [_object_at(rng, kind, float(x), float(y))]


def _place_pair(rng: np.random.Generator, a: str, b: str) -> list[SceneObject]:
    """Place two objects side by side or one above the other, with equal probability.

    Let (x, y) be the middle, r half the reach, and s, t independent signs. The first object is at
    (x + s r, y + t r) in both cases. The second is at (x - s r, y + t r) beside it, or at
    (x + s r, y - t r) above or below it. So each box alone has the same distribution in both cases.
    """
    reach = float(rng.uniform(*_REACH)) / 2
    margin = reach + _JITTER + _SIDE[1] / 2
    x, y = rng.uniform(margin, 1 - margin, size=2)
    s, t = rng.choice((-1, 1), size=2)
    beside = rng.random() < 0.5
    ax, ay = x + s * reach, y + t * reach
    bx, by = (x - s * reach, y + t * reach) if beside else (x + s * reach, y - t * reach)
    shake = rng.uniform(-_JITTER, _JITTER, size=4) / 2
    return [
        _object_at(rng, a, float(ax + shake[0]), float(ay + shake[1])),
        _object_at(rng, b, float(bx + shake[2]), float(by + shake[3])),
    ]


# --- drawing -------------------------------------------------------------------------------------

_ROUND = {"disc", "star"}
_ASPECT = {  # width over height
    "disc": 1.0,
    "triangle": 1.1,
    "house": 1.0,
    "tree": 0.75,
    "boat": 1.15,
    "fish": 1.7,
    "car": 1.6,
    "star": 1.0,
    "lamp": 0.5,
    "person": 0.5,
    "dog": 1.35,
}

# A part of an object: its shape, its points in [0,1] of the object's box, and its brightness.
_Part = tuple[str, tuple[tuple[float, float], ...], float]


def _star_points() -> tuple[tuple[float, float], ...]:
    angles = np.arange(10) * np.pi / 5 - np.pi / 2
    radii = np.where(np.arange(10) % 2 == 0, 1.0, 0.42)
    points = np.stack([np.cos(angles) * radii, np.sin(angles) * radii], axis=1)
    points = (points - points.min(0)) / (points.max(0) - points.min(0))
    return tuple((float(x), float(y)) for x, y in points)


_PARTS: dict[str, tuple[_Part, ...]] = {
    "disc": (("ellipse", ((0, 0), (1, 1)), 1.0),),
    "triangle": (("polygon", ((0.5, 0), (1, 1), (0, 1)), 1.0),),
    "house": (
        ("rectangle", ((0.1, 0.45), (0.9, 1)), 1.0),
        ("polygon", ((0.5, 0), (1, 0.48), (0, 0.48)), 0.6),
        ("rectangle", ((0.42, 0.68), (0.6, 1)), 0.4),
    ),
    "tree": (
        ("rectangle", ((0.4, 0.6), (0.6, 1)), 0.5),
        ("ellipse", ((0, 0), (1, 0.7)), 1.0),
    ),
    "boat": (
        ("polygon", ((0, 0.65), (1, 0.65), (0.8, 1), (0.2, 1)), 0.65),
        ("polygon", ((0.45, 0), (0.45, 0.6), (0.95, 0.6)), 1.0),
        ("polygon", ((0.38, 0.1), (0.38, 0.6), (0.08, 0.6)), 1.0),
    ),
    "fish": (
        ("ellipse", ((0, 0.08), (0.76, 0.92)), 1.0),
        ("polygon", ((0.68, 0.5), (1, 0), (1, 1)), 0.75),
        ("ellipse", ((0.14, 0.3), (0.24, 0.47)), 0.1),
    ),
    "car": (
        ("polygon", ((0.22, 0), (0.72, 0), (0.86, 0.42), (0.1, 0.42)), 0.75),
        ("rectangle", ((0, 0.38), (1, 0.8)), 1.0),
        ("ellipse", ((0.12, 0.62), (0.36, 1)), 0.15),
        ("ellipse", ((0.64, 0.62), (0.88, 1)), 0.15),
    ),
    "star": (("polygon", _star_points(), 1.0),),
    "lamp": (
        ("rectangle", ((0.42, 0.3), (0.58, 1)), 0.5),
        ("polygon", ((0.25, 0), (0.75, 0), (1, 0.38), (0, 0.38)), 1.0),
        ("rectangle", ((0.2, 0.93), (0.8, 1)), 0.5),
    ),
    "person": (
        ("ellipse", ((0.25, 0), (0.75, 0.28)), 1.0),
        ("polygon", ((0.1, 0.3), (0.9, 0.3), (0.72, 0.68), (0.28, 0.68)), 0.7),
        ("polygon", ((0.28, 0.66), (0.5, 0.66), (0.3, 1), (0, 1)), 0.5),
        ("polygon", ((0.5, 0.66), (0.72, 0.66), (1, 1), (0.7, 1)), 0.5),
    ),
    "dog": (
        ("rectangle", ((0.15, 0.38), (0.8, 0.7)), 1.0),
        ("ellipse", ((0.66, 0.05), (1, 0.5)), 0.8),
        ("polygon", ((0.68, 0.2), (0.72, 0), (0.84, 0.12)), 0.5),
        ("rectangle", ((0.17, 0.65), (0.28, 1)), 0.7),
        ("rectangle", ((0.66, 0.65), (0.77, 1)), 0.7),
        ("polygon", ((0.2, 0.48), (0, 0.15), (0.1, 0.1), (0.28, 0.42)), 0.8),
    ),
}

_SUPERSAMPLING = 4


def draw_scene(objects: Sequence[SceneObject], size: int, rng: np.random.Generator) -> Image.Image:
    """Draw the objects, first to last, on a random background with clutter.

    Colours, background and clutter are sampled independently of the objects, so they reveal nothing
    about the labels.

    Returns:
        an RGB image of ``size`` x ``size`` pixels.
    """
    side = size * _SUPERSAMPLING
    tones = rng.integers(60, 196, size=(2, 3))
    across = np.linspace(0, 1, size)[None, :, None]
    down = np.linspace(0, 1, size)[:, None, None]
    angle = rng.uniform(0, 2 * np.pi)
    mix = 0.5 + 0.5 * (np.cos(angle) * (across - 0.5) + np.sin(angle) * (down - 0.5))
    image = Image.fromarray((tones[0] * mix + tones[1] * (1 - mix)).astype(np.uint8))
    image = image.resize((side, side), Image.Resampling.NEAREST)
    painter = ImageDraw.Draw(image)
    for _ in range(rng.integers(3, 9)):  # clutter: thin strokes, unlike any part of an object
        start = rng.uniform(0, side, size=2)
        stop = start + rng.normal(0, side / 8, size=2)
        ink = tuple(int(v) for v in rng.integers(30, 226, size=3))
        painter.line([*start, *stop], fill=ink, width=int(rng.integers(2, 7)))
    backdrop = tones.mean(0)
    for item in objects:
        _paint(painter, item, _ink(rng, backdrop), bool(rng.random() < 0.5), side)
    small = image.resize((size, size), Image.Resampling.BOX)
    noise = rng.normal(0, 4, size=(size, size, 3))
    return Image.fromarray(np.clip(np.asarray(small) + noise, 0, 255).astype(np.uint8))


def _ink(rng: np.random.Generator, backdrop: np.ndarray) -> np.ndarray:
    """A colour that contrasts with the background."""
    while True:
        ink = rng.integers(20, 256, size=3)
        if np.abs(ink - backdrop).max() > 80:
            return ink


def _paint(
    painter: ImageDraw.ImageDraw, item: SceneObject, ink: np.ndarray, mirrored: bool, side: int
) -> None:
    x0, y0, x1, y1 = (value * side for value in item.box)
    for shape, points, shade in _PARTS[item.kind]:
        corners = [
            (x0 + (1 - x if mirrored else x) * (x1 - x0), y0 + y * (y1 - y0)) for x, y in points
        ]
        fill = tuple(int(v) for v in ink * shade)
        if shape == "polygon":
            painter.polygon(corners, fill=fill)
        else:
            box = [*map(min, *corners), *map(max, *corners)]
            (painter.ellipse if shape == "ellipse" else painter.rectangle)(box, fill=fill)


# --- the data set --------------------------------------------------------------------------------


def scenes_sources(settings: ScenesSettings) -> dict[str, str]:
    """`Manifest.sources` of the scenes: equal hashes mean that the scenes on disk are current."""
    return {"settings": sha256_json({"rules": RULES_VERSION, **settings.model_dump()})}


def make_scenes(
    folder: Path,
    prefix: str,
    dataset: str,
    settings: ScenesSettings,
    progress: Callable[[Sequence[int]], Sequence[int]] = lambda numbers: numbers,
) -> tuple[Manifest, BoxTable]:
    """Draw the data set's images as PNG into ``folder``.

    Args:
        folder: the folder of the images.
        prefix: that folder relative to the data set's root, for the paths in the manifest.
        dataset: its name in params.yaml.
        settings: the number of scenes, their size and the seed.
        progress: wraps the numbers of the scenes while they are drawn, e.g. in a progress bar.

    Returns:
        the manifest, and the boxes of the drawn objects.
    """
    folder.mkdir(parents=True, exist_ok=True)
    plan: list[tuple[Split, int]] = [("train", n) for n in range(settings.train)]
    plan += [("test", n) for n in range(settings.test)]
    rows = []
    boxes: dict[str, ImageBoxes] = {}
    for index in progress(range(len(plan))):
        split, number = plan[index]
        # One generator per scene, so that more scenes do not change the others.
        rng = np.random.default_rng([settings.seed, split == "test", number])
        objects = sample_objects(rng)
        image_id = f"{split}-{number:05d}"
        draw_scene(objects, settings.size, rng).save(folder / f"{image_id}.png")
        labels = scene_labels(objects)
        rows.append(
            {
                "image_id": image_id,
                "path": f"{prefix}/{image_id}.png",
                "split": split,
                "labels": [n for n, label in enumerate(VOCABULARY) if label in labels],
                "ignored": [],
                "width": settings.size,
                "height": settings.size,
            }
        )
        boxes[image_id] = ImageBoxes(
            np.array([KINDS.index(item.kind) + 1 for item in objects]),
            np.array([item.box for item in objects], dtype=np.float32),
        )
    table = pa.Table.from_pylist(rows, schema=COLUMNS)
    manifest = Manifest(
        dataset=dataset,
        split_name="drawn",
        vocabulary=VOCABULARY,
        sources=scenes_sources(settings),
        counts=full_counts(table),
        table=table,
    )
    return manifest, BoxTable(KINDS, boxes)
