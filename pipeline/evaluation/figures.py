"""Metrics of many runs -> the figures that people look at, the same bytes for the same numbers."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline.files import replacing

AXES = {"regions": "regions m", "network.modules": "convolution modules k"}
"""Labels of the settings that the paper's Figure 4 (a) and (b) vary; others have their own name."""

_BLUE, _ORANGE = "#0072b2", "#e69f00"  # told apart by every kind of sight (Okabe and Ito)


def sweep_figure(
    stem: Path, key: str, maps: Mapping[str, Sequence[float]], *, title: str, numeric: bool
) -> None:
    """mAP against the value of a setting, as <stem>.svg and <stem>.png.

    A line through the means, bars of one sample standard deviation where there are several seeds,
    a dot a run.

    Args:
        stem: path without its suffix.
        key: of the setting.
        maps: value -> mAP of its runs, in percent.
        title: above the figure.
        numeric: whether the values are numbers, which then stand at their places on the axis.
    """
    # It takes half a second to import, and only figures need it.
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    places = [float(value) if numeric else place for place, value in enumerate(maps)]
    means = [statistics.fmean(values) for values in maps.values()]
    spreads = [statistics.stdev(v) if len(v) > 1 else 0.0 for v in maps.values()]
    # Text stays text, and ids come from the content: else each writing would be another.
    with rc_context({"svg.hashsalt": "gmpipe", "svg.fonttype": "none", "font.size": 11}):
        figure = Figure(figsize=(5.5, 3.8), layout="constrained")
        axes = figure.add_subplot()
        several = any(len(values) > 1 for values in maps.values())
        axes.errorbar(
            places,
            means,
            yerr=spreads if several else None,
            color=_BLUE,
            marker="o",
            capsize=4,
            linestyle="-" if numeric else "none",
            label="mean ± standard deviation",
        )
        if several:
            dots = [(x, y) for x, of_x in zip(places, maps.values(), strict=True) for y in of_x]
            axes.plot(*zip(*dots, strict=True), ".", color=_ORANGE, zorder=3, label="a seed")
            axes.legend(frameon=False)
        axes.set_xticks(places, list(maps))
        axes.set_xlabel(AXES.get(key, key))
        axes.set_ylabel("mAP (%)")
        axes.set_title(title)
        axes.grid(axis="y", color="0.9")
        for suffix, metadata in (("svg", {"Date": None, "Creator": None}), ("png", None)):
            with replacing(stem.with_suffix(f".{suffix}")) as temporary:
                options = {"Software": None} if metadata is None else metadata
                figure.savefig(temporary, format=suffix, dpi=150, metadata=options)
