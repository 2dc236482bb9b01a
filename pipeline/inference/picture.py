"""An explanation as a picture: the same bytes for the same explanation."""

from __future__ import annotations

import math
import textwrap
from pathlib import Path
from typing import Any

from PIL import Image

from pipeline.files import replacing
from pipeline.inference.explain import Explanation, LabelExplanation

MOST_LABELS = 10
"""Labels that a picture shows: the best ones."""

_MOST_REGIONS = 3  # bars of regions a label has, those that count most
_LEAST = 0.005  # change of a region that has a bar: what rounds to 0.01
_LEAST_ROWS = 3  # of charts: a single one does not fill the picture
_LONGEST_SIDE = 1024  # of the photograph as drawn, in pixels: no figure shows more

# Told apart by every kind of sight (Okabe and Ito); its yellow and black are hard to see on
# photographs.
_COLOURS = ("#e69f00", "#56b4e9", "#009e73", "#d55e00", "#cc79a7", "#0072b2")
_STYLES = ("solid", "dashed", "dotted")  # of a winner's box, when colours have run out
_GAIN, _LOSS = "#0072b2", "#d55e00"
_DARK = "#0072b2"  # of these the one that asks for white letters
_TAG_SIZE = 8.5  # of letters, in points
_TAG_WIDTH = 30  # letters of a line
_ABSENT = "none in this run"


def draw(explanation: Explanation, photograph: Image.Image, title: str, path: Path) -> None:
    """Write the picture, a PNG: the photograph with regions, and beside it what labels are owed to.

    Every region that won a label has a box in a colour of its own, with its number and labels;
    those that are only named among the most influential ones have a thin white box and a number.

    Args:
        photograph: in RGB, as it was looked at.
        title: above the photograph.
        path: of the file.
    """
    # It takes half a second to import, and only figures need it.
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    labels = explanation.labels[:MOST_LABELS]
    columns = 1 if len(labels) <= 4 else 2
    rows = max(_LEAST_ROWS, math.ceil(len(labels) / columns))
    width, height = (9.0 if columns == 1 else 13.0), max(4.6, 1.35 * rows + 0.9)
    shares = (1, 1) if columns == 1 else (5, 8)
    with rc_context({"font.size": 9, "font.family": "DejaVu Sans"}):
        figure = Figure(figsize=(width, height), layout="constrained")
        parts: Any = figure.subfigures(1, 2, width_ratios=shares)
        left, right = parts
        room = width * shares[0] / sum(shares), height - 0.6
        _draw_photograph(left.add_subplot(), explanation, labels, photograph, title, room)
        right.suptitle("Change of the score when this is taken away", fontsize=10)
        right.supxlabel(f"Regions without a bar change it by less than {_LEAST}.", fontsize=8)
        limit = _limit(labels)
        grid = right.subplots(rows, columns, squeeze=False)
        for place, axes in enumerate(grid.T.flat):
            if place < len(labels):
                _draw_bars(axes, labels[place], limit, _colours(labels))
            else:
                axes.set_axis_off()
        with replacing(path) as temporary:
            figure.savefig(temporary, format="png", dpi=120, metadata={"Software": None})


def _colours(labels: tuple[LabelExplanation, ...]) -> dict[int, tuple[str, str]]:
    """Colour and line style of each region that won a label."""
    winners = dict.fromkeys(label.region for label in labels)
    colours, styles = len(_COLOURS), len(_STYLES)
    return {
        region: (_COLOURS[place % colours], _STYLES[place // colours % styles])
        for place, region in enumerate(winners)
    }


def _named(labels: tuple[LabelExplanation, ...]) -> list[int]:
    """The regions that bars tell of."""
    regions = [
        region for label in labels for region, _ in label.most_influential(_MOST_REGIONS, _LEAST)
    ]
    return sorted(set(regions))


def _draw_photograph(
    axes: Any,
    explanation: Explanation,
    labels: tuple[LabelExplanation, ...],
    photograph: Image.Image,
    title: str,
    room: tuple[float, float],
) -> None:
    """
    Args:
        room: width and height of the axes, in inches.
    """
    from matplotlib.patches import Rectangle
    from matplotlib.patheffects import withStroke

    small = photograph.copy()
    small.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE))
    width, height = photograph.size
    axes.imshow(small, extent=(0, width, height, 0), interpolation="lanczos")
    axes.set_axis_off()
    axes.set_anchor("N")
    note = "" if explanation.predicted else "\nno label is above 0.5: this is the best one"
    if len(explanation.labels) > len(labels):
        note = f"\nthe {len(labels)} best of {len(explanation.labels)} labels"
    axes.set_title(title + note, fontsize=10, wrap=True)

    def box(region: int, colour: str, line: float, style: str = "solid") -> None:
        x0, y0, x1, y1 = explanation.prediction.pixel_box(region)
        patch = Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=colour)
        patch.set(linewidth=line, linestyle=style)
        patch.set_path_effects([withStroke(linewidth=line + 1.6, foreground="black")])
        axes.add_patch(patch)

    winners = _colours(labels)
    texts = {region: (str(region), "#ffffff") for region in _named(labels)}
    for region in texts:
        if region not in winners:
            box(region, "white", 0.9)
    for region, (colour, style) in winners.items():
        box(region, colour, 2.2, style)
        names = ", ".join(label.label for label in labels if label.region == region)
        texts[region] = (textwrap.fill(f"{region}: {names}", _TAG_WIDTH), colour)
    # Winners first: their tags are the longer ones.
    order = [*winners, *(region for region in texts if region not in winners)]
    pixels = max(width / room[0], height / room[1]) / 72  # of the photograph, in a point
    sizes = []
    for region in order:
        lines = texts[region][0].splitlines()
        letters = max(map(len, lines))
        sizes.append(
            ((letters * 0.62 + 0.6) * _TAG_SIZE * pixels, (len(lines) + 0.5) * _TAG_SIZE * pixels)
        )
    boxes = [explanation.prediction.pixel_box(region) for region in order]
    for region, (x, y) in zip(order, _places(boxes, sizes, width, height), strict=True):
        text, colour = texts[region]
        axes.text(x, y, text, fontsize=_TAG_SIZE, va="top", **_tag(colour))


def _places(
    boxes: list[tuple[float, float, float, float]],
    sizes: list[tuple[float, float]],
    width: int,
    height: int,
) -> list[tuple[float, float]]:
    """Left and top of a tag for each box, all in pixels: at a corner, and clear of other tags."""
    places: list[tuple[float, float]] = []
    taken: list[tuple[float, float, float, float]] = []
    for (x0, y0, x1, y1), (w, h) in zip(boxes, sizes, strict=True):
        corners = [(x, y) for y in (y0 - h, y0, y1, y1 - h) for x in (x0, x1 - w)]
        inside = [
            (min(max(x, 0), max(width - w, 0)), min(max(y, 0), height - h)) for x, y in corners
        ]

        def covered(place: tuple[float, float], w: float = w, h: float = h) -> float:
            """Area of other tags that a tag there would cover."""
            x, y = place
            return sum(
                max(0, min(x + w, right) - max(x, left)) * max(0, min(y + h, low) - max(y, high))
                for left, high, right, low in taken
            )

        x, y = min(inside, key=covered)  # the first of those that cover least
        taken.append((x, y, x + w, y + h))
        places.append((x, y))
    return places


def _tag(colour: str) -> dict[str, Any]:
    """Style of a text in a box of a colour."""
    return {
        "color": "white" if colour == _DARK else "black",
        "bbox": {"facecolor": colour, "edgecolor": "black", "linewidth": 0.6, "pad": 1.5},
    }


def _bars(label: LabelExplanation) -> list[tuple[str, float | None]]:
    """Name and change of each bar; None where there is nothing to take away."""
    graphs = [("label graph", label.label_graph), ("instance graph", label.instance_graph)]
    return [
        *graphs,
        *(
            (f"region {region}", change)
            for region, change in label.most_influential(_MOST_REGIONS, _LEAST)
        ),
    ]


def _limit(labels: tuple[LabelExplanation, ...]) -> float:
    """The largest change of all, so that bars of different labels can be compared."""
    changes = [abs(change) for label in labels for _, change in _bars(label) if change is not None]
    return max([0.05, *changes])


def _draw_bars(
    axes: Any, label: LabelExplanation, limit: float, colours: dict[int, tuple[str, str]]
) -> None:
    bars = _bars(label)
    axes.set_title(
        f"{label.label}  {label.score:.2f}  by region {label.region}",
        fontsize=9,
        loc="left",
        pad=5,
        **_tag(colours[label.region][0]),
    )
    axes.axvline(0, color="0.4", linewidth=0.8)
    for place, (_, change) in enumerate(bars):
        if change is None:
            axes.text(0, place, f"  {_ABSENT}", va="center", fontsize=8, style="italic")
            continue
        axes.barh(place, change, height=0.7, color=_GAIN if change > 0 else _LOSS)
        rounded = round(change, 2)
        axes.text(
            change + (0.03 if change >= 0 else -0.03) * limit,
            place,
            f"{rounded:+.2f}" if rounded else "0.00",
            va="center",
            ha="left" if change >= 0 else "right",
            fontsize=8,
        )
    axes.set_xlim(-1.35 * limit, 1.35 * limit)
    axes.set_ylim(_MOST_REGIONS + 1.5, -0.5)  # the same for each label, however many bars it has
    axes.set_yticks(range(len(bars)), [name for name, _ in bars], fontsize=8)
    axes.tick_params(left=False, labelbottom=False, bottom=False)
    for spine in axes.spines.values():
        spine.set_visible(False)
