"""Draw an explanation as a picture. The same explanation gives the same bytes."""

from __future__ import annotations

import math
import textwrap
import unicodedata
from pathlib import Path
from typing import Any

from PIL import Image

from pipeline.drawing import choose_fonts, drawing
from pipeline.files import replacing
from pipeline.formats.text import legible
from pipeline.inference.explain import Explanation, LabelExplanation

MOST_LABELS = 10
"""Number of labels that a picture shows at most, best first."""

_MOST_REGIONS = 3  # bars of regions per label, those with the largest changes
_LEAST = 0.005  # smallest change of a region that gets a bar: what rounds to 0.01
_MOST_ROWS = 4  # of charts in a column
_CHART = (4.2, 1.35)  # width and height of the chart of one label, in inches
_LEAST_HEIGHT = 1.8  # of all charts together, in inches
_PHOTOGRAPH = (3.4, 6.0)  # least and largest width of the photograph's side, in inches
_TITLE, _HEADING = 0.4, 0.8  # room above photograph and charts, in inches
_LONGEST_SIDE = 1024  # of the photograph as drawn, in pixels: no figure shows more

# Colours that people with any colour vision can distinguish (Okabe and Ito). Their yellow and black
# are left out, since they are hard to see on photographs.
_COLOURS = ("#e69f00", "#56b4e9", "#009e73", "#d55e00", "#cc79a7", "#0072b2")
_STYLES = ("solid", "dashed", "dotted")  # of a winner's box, once all colours are used
_GAIN, _LOSS = "#0072b2", "#d55e00"
_DARK = "#0072b2"  # the colour that needs white letters
_TITLE_SIZE = 10  # of letters, in points
_TAG_SIZE = 8.5  # of letters, in points
_TAG_WIDTH = 30  # letters per line
_NO_REGION = "#ffffff"  # colour of a label that comes from the image as a whole


def draw(explanation: Explanation, photograph: Image.Image, title: str, path: Path) -> None:
    """Write a PNG with the photograph and its regions, and beside it the changes of each score.

    Every region that says most for a label has a box in its own colour, with its number and labels.
    A region that is only named among the most influential ones has a thin white box and a number. A
    label that comes from the image as a whole has no box.

    Args:
        explanation: of the photograph.
        photograph: in RGB, as the detector saw it.
        title: written above the photograph; printable.
        path: of the file to write.
    """
    # It takes half a second to import, and only figures need it.
    from matplotlib.figure import Figure

    labels = explanation.labels[:MOST_LABELS]
    columns = math.ceil(len(labels) / _MOST_ROWS)
    rows = math.ceil(len(labels) / columns)
    sides, height = _sizes(rows, columns, photograph.width / photograph.height)
    with drawing({"font.size": 9}):
        figure = Figure(figsize=(sum(sides), height), layout="constrained")
        parts: Any = figure.subfigures(1, 2, width_ratios=sides)
        left, right = parts
        room = sides[0], height - _TITLE
        _draw_photograph(left.add_subplot(), explanation, labels, photograph, title, room)
        right.suptitle(
            f"Change of the score without {'a graph or ' if _has_graph(labels) else ''}a region\n"
            f"(the {_MOST_REGIONS} regions that change it most, if by {_LEAST} or more)",
            fontsize=_TITLE_SIZE,
        )
        limit = _limit(labels)
        most = max(3, *(len(_bars(label)) for label in labels))
        grid = right.subplots(rows, columns, squeeze=False)
        for number, axes in enumerate(grid.T.flat):
            if number < len(labels):
                _draw_bars(axes, explanation, labels[number], limit, most, _colours(labels))
            else:
                axes.set_axis_off()
        choose_fonts(figure)
        with replacing(path) as temporary:
            figure.savefig(temporary, format="png", dpi=120, metadata={"Software": None})


def _sizes(rows: int, columns: int, ratio: float) -> tuple[tuple[float, float], float]:
    """Choose sizes in inches that leave little of the picture blank.

    Args:
        rows, columns: of charts.
        ratio: of the photograph's width to its height.

    Returns:
        the widths of the photograph's side and of the charts' side, and the height of both.
    """
    across, down = _CHART
    charts = max(_LEAST_HEIGHT, rows * down) + _HEADING
    least, most = _PHOTOGRAPH
    wide = min(most, ratio * (max(charts, least) - _TITLE))
    return (max(least, wide), columns * across), max(charts, wide / ratio + _TITLE)


def _colours(labels: tuple[LabelExplanation, ...]) -> dict[int, tuple[str, str]]:
    """Choose a colour and a line style for each region that says most for a label."""
    winners = dict.fromkeys(label.region for label in labels if label.region is not None)
    colours, styles = len(_COLOURS), len(_STYLES)
    return {
        region: (_COLOURS[number % colours], _STYLES[number // colours % styles])
        for number, region in enumerate(winners)
    }


def _named(labels: tuple[LabelExplanation, ...]) -> list[int]:
    """List the regions that have a bar."""
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
    """Draw the photograph with its boxes and their tags.

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
    best = not explanation.predicted and not explanation.asked
    note = "\nno label is predicted; this is the best one" if best else ""
    if len(explanation.labels) > len(labels):
        note = f"\nthe {len(labels)} best of {len(explanation.labels)} labels"
    # matplotlib's own wrapping takes texts for formulas.
    width_in_letters = int(room[0] * 72 / (0.6 * _TITLE_SIZE))
    axes.set_title(textwrap.fill(title, width_in_letters) + note, fontsize=_TITLE_SIZE)

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
        names = ", ".join(_in_line(label.label) for label in labels if label.region == region)
        texts[region] = (textwrap.fill(f"{region}: {names}", _TAG_WIDTH), colour)
    # Winners first: their tags are the longer ones.
    order = [*winners, *(region for region in texts if region not in winners)]
    pixels = max(width / room[0], height / room[1]) / 72  # of the photograph, per point
    sizes = []
    for region in order:
        lines = texts[region][0].splitlines()
        letters = max(map(_letters, lines))
        sizes.append(
            ((letters * 0.62 + 0.6) * _TAG_SIZE * pixels, (len(lines) + 0.5) * _TAG_SIZE * pixels)
        )
    boxes = [explanation.prediction.pixel_box(region) for region in order]
    for region, (x, y) in zip(order, _tag_corners(boxes, sizes, width, height), strict=True):
        text, colour = texts[region]
        axes.text(x, y, text, fontsize=_TAG_SIZE, va="top", **_tag(colour))


def _in_line(label: str) -> str:
    """Make a label fit for a line of text: as `legible`, without reordering what stands beside it.

    A label that is written from right to left gets an invisible mark for the other direction on
    both sides.
    """
    shown = legible(label)
    mark = "\u200e" if {"R", "AL"} & set(map(unicodedata.bidirectional, shown)) else ""
    return f"{mark}{shown}{mark}"


def _letters(line: str) -> float:
    """The width of a line in Latin letters; those of Chinese, Japanese and Korean are wider."""
    return sum(1.7 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in line)


def _tag_corners(
    boxes: list[tuple[float, float, float, float]],
    sizes: list[tuple[float, float]],
    width: int,
    height: int,
) -> list[tuple[float, float]]:
    """Choose left and top of each box's tag, in pixels: at a corner, clear of other tags."""
    chosen: list[tuple[float, float]] = []
    taken: list[tuple[float, float, float, float]] = []
    for (x0, y0, x1, y1), (w, h) in zip(boxes, sizes, strict=True):
        corners = [(x, y) for y in (y0 - h, y0, y1, y1 - h) for x in (x0, x1 - w)]
        inside = [
            (min(max(x, 0), max(width - w, 0)), min(max(y, 0), height - h)) for x, y in corners
        ]

        def covered(corner: tuple[float, float], w: float = w, h: float = h) -> float:
            """Compute the area of other tags that a tag at this corner would cover."""
            x, y = corner
            return sum(
                max(0, min(x + w, right) - max(x, left)) * max(0, min(y + h, low) - max(y, high))
                for left, high, right, low in taken
            )

        x, y = min(inside, key=covered)  # the first of those that cover least
        taken.append((x, y, x + w, y + h))
        chosen.append((x, y))
    return chosen


def _tag(colour: str) -> dict[str, Any]:
    """Make the style of a text in a coloured box."""
    return {
        "color": "white" if colour == _DARK else "black",
        "bbox": {"facecolor": colour, "edgecolor": "black", "linewidth": 0.6, "pad": 1.5},
    }


def _has_graph(labels: tuple[LabelExplanation, ...]) -> bool:
    return any(one.label_graph is not None or one.instance_graph is not None for one in labels)


def _bars(label: LabelExplanation) -> list[tuple[str, float]]:
    """List name and change of each bar."""
    graphs = {"label graph": label.label_graph, "instance graph": label.instance_graph}
    return [
        *((name, change) for name, change in graphs.items() if change is not None),
        *(
            (f"region {region}", change)
            for region, change in label.most_influential(_MOST_REGIONS, _LEAST)
        ),
    ]


def _limit(labels: tuple[LabelExplanation, ...]) -> float:
    """Find the largest change of all, so that bars of different labels can be compared."""
    changes = [abs(change) for label in labels for _, change in _bars(label)]
    return max([0.05, *changes])


def _draw_bars(
    axes: Any,
    explanation: Explanation,
    label: LabelExplanation,
    limit: float,
    rows: int,
    colours: dict[int, tuple[str, str]],
) -> None:
    """Draw the bars of a label.

    Args:
        limit: the largest change of all labels.
        rows: room for this many bars, the same for each label.
    """
    bars = _bars(label)
    by, colour = "the whole image", _NO_REGION
    if label.region is not None:
        by, colour = f"region {label.region}", colours[label.region][0]
    if explanation.attribution == "weights" and label.said is not None:
        by += f", weight {label.said:.2f}"
    axes.set_title(
        f"{_in_line(label.label)}  {label.score:.2f}  by {by}",
        fontsize=9,
        loc="left",
        pad=5,
        **_tag(colour),
    )
    axes.axvline(0, color="0.4", linewidth=0.8)
    if not bars:
        text = "no region changes it" if explanation.reads_regions else "this head reads no regions"
        axes.text(0, 0, f"  {text}", va="center", fontsize=8, style="italic")
    for row, (_, change) in enumerate(bars):
        axes.barh(row, change, height=0.7, color=_GAIN if change > 0 else _LOSS)
        rounded = round(change, 2)
        axes.text(
            change + (0.03 if change >= 0 else -0.03) * limit,
            row,
            f"{rounded:+.2f}" if rounded else "0.00",
            va="center",
            ha="left" if change >= 0 else "right",
            fontsize=8,
        )
    axes.set_xlim(-1.35 * limit, 1.35 * limit)
    axes.set_ylim(rows - 0.5, -0.5)
    axes.set_yticks(range(len(bars)), [name for name, _ in bars], fontsize=8)
    axes.tick_params(left=False, labelbottom=False, bottom=False)
    for spine in axes.spines.values():
        spine.set_visible(False)
