"""An explanation as a picture: the same bytes for the same explanation."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from PIL import Image

from pipeline.files import replacing
from pipeline.inference.explain import Explanation, LabelExplanation

MOST_LABELS = 10
"""Labels that a picture shows: the best ones."""

_MOST_REGIONS = 3  # bars of regions a label has, those that count most
_LONGEST_SIDE = 1024  # of the photograph as drawn, in pixels: no figure shows more

# Told apart by every kind of sight (Okabe and Ito); its yellow and black are hard to see on
# photographs.
_COLOURS = ("#e69f00", "#56b4e9", "#009e73", "#d55e00", "#cc79a7", "#0072b2")
_STYLES = ("solid", "dashed", "dotted")  # of a winner's box, when colours have run out
_GAIN, _LOSS = "#0072b2", "#d55e00"
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
    rows = math.ceil(len(labels) / columns)
    height = max(4.6, 1.35 * rows + 0.9)
    with rc_context({"font.size": 9, "font.family": "DejaVu Sans"}):
        figure = Figure(figsize=(9 if columns == 1 else 13, height), layout="constrained")
        parts: Any = figure.subfigures(1, 2, width_ratios=(1, 1) if columns == 1 else (5, 8))
        left, right = parts
        _draw_photograph(left.add_subplot(), explanation, labels, photograph, title)
        right.suptitle("Change of the score when this is taken away", fontsize=10)
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
    regions = [region for label in labels for region, _ in label.most_influential(_MOST_REGIONS)]
    return sorted(set(regions))


def _draw_photograph(
    axes: Any,
    explanation: Explanation,
    labels: tuple[LabelExplanation, ...],
    photograph: Image.Image,
    title: str,
) -> None:
    from matplotlib.patches import Rectangle
    from matplotlib.patheffects import withStroke

    small = photograph.copy()
    small.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE))
    width, height = photograph.size
    axes.imshow(small, extent=(0, width, height, 0), interpolation="lanczos")
    axes.set_axis_off()
    note = "" if explanation.predicted else "\nno label is above 0.5: this is the best one"
    if len(explanation.labels) > len(labels):
        note = f"\nthe {len(labels)} best of {len(explanation.labels)} labels"
    axes.set_title(title + note, fontsize=10, wrap=True)
    dark = [withStroke(linewidth=2, foreground="black")]

    def box(region: int, **style: Any) -> tuple[float, float, float, float]:
        x0, y0, x1, y1 = explanation.prediction.pixel_box(region)
        axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, **style))
        return x0, y0, x1, y1

    winners = _colours(labels)
    for region in _named(labels):
        if region not in winners:
            x0, y0, x1, y1 = box(region, edgecolor="white", linewidth=0.9, path_effects=dark)
            axes.text(
                x1, y1, str(region), color="white", fontsize=8, ha="right", va="bottom",
                path_effects=dark,
            )  # fmt: skip
    taken: list[float] = []  # heights of texts that start at the left
    for region, (colour, style) in winners.items():
        dark = [withStroke(linewidth=4, foreground="black")]
        x0, y0, *_ = box(
            region, edgecolor=colour, linewidth=2.2, linestyle=style, path_effects=dark
        )
        names = ", ".join(label.label for label in labels if label.region == region)
        line = height * 0.055
        while any(abs(y0 - other) < line for other in taken):
            y0 += line
        taken.append(y0)
        axes.text(
            min(x0, width * 0.6), y0, f"{region}: {names}", color="black", fontsize=8.5, va="top",
            bbox={"facecolor": colour, "edgecolor": "black", "linewidth": 0.6, "pad": 1.5},
            clip_on=False,
        )  # fmt: skip


def _bars(label: LabelExplanation) -> list[tuple[str, float | None]]:
    """Name and change of each bar; None where there is nothing to take away."""
    graphs = [("label graph", label.label_graph), ("instance graph", label.instance_graph)]
    return [
        *graphs,
        *((f"region {region}", change) for region, change in label.most_influential(_MOST_REGIONS)),
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
        f"{label.label}  {label.score:.2f}  (region {label.region})",
        fontsize=9, loc="left", fontweight="bold", pad=3,
    )  # fmt: skip
    axes.axvline(0, color="0.4", linewidth=0.8)
    for place, (_, change) in enumerate(bars):
        if change is None:
            axes.text(
                0, place, f" {_ABSENT}", va="center", fontsize=8, color="0.35", style="italic"
            )
            continue
        axes.barh(place, change, height=0.7, color=_GAIN if change > 0 else _LOSS)
        side = 1 if change > 0 else -1
        axes.text(
            change + side * 0.02 * limit, place, f"{change:+.2f}", va="center", fontsize=7.5,
            ha="left" if side > 0 else "right",
        )  # fmt: skip
    axes.set_xlim(-1.3 * limit, 1.3 * limit)
    axes.set_ylim(len(bars) - 0.4, -0.6)
    axes.set_yticks(range(len(bars)), [name for name, _ in bars], fontsize=8)
    axes.tick_params(left=False, labelbottom=False, bottom=False)
    for spine in axes.spines.values():
        spine.set_visible(False)
