"""The figures of the page and of sweeps. The same numbers give the same bytes.

Every figure is written as <stem>.svg and <stem>.png. An SVG follows the reader's light or dark
setting; a PNG is always light. The colours can be told apart with every kind of colour vision, and
variants also differ in marker or dashes.

Letters: C labels, B bins, T points of a curve.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.drawing import choose_fonts, drawing, set_log_scale
from pipeline.evaluation.diagnostics import Calibration, CoOccurrence
from pipeline.evaluation.spread import spread_of
from pipeline.files import replacing
from pipeline.formats.text import legible, printable

AXES = {"regions": "regions m", "network.modules": "convolution modules k"}
"""Axis labels of the settings that the paper's Figure 4 (a) and (b) varies; any other setting is
labelled with its name."""

COLOURS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#8c8c8c")
"""Colours of the variants in their order (Okabe and Ito, with grey for black), repeated if there
are more variants."""

_DASHES = {"-": "", "--": "8 4", "-.": "8 3 2 3", ":": "2 3"}
"""Lines of the variants in their order, repeated like the colours: as matplotlib names them -> as
SVG names them (`stroke-dasharray`)."""

_MARKERS = "osD^vPX*<>"

_INK, _SOFT, _GRID, _PAPER = "#1b1f24", "#59636e", "#d1d9e0", "#ffffff"
_DARK = {_INK: "#e6edf3", _SOFT: "#9198a1", _GRID: "#3d444d", _PAPER: "#0d1117"}
"""What replaces each of these colours where the reader prefers dark."""

_STYLE: dict[Any, Any] = {
    "svg.hashsalt": "gmpipe",  # ids depend on the content alone, so the bytes can be repeated
    "svg.fonttype": "none",  # text stays text
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.edgecolor": _SOFT,
    "axes.facecolor": _PAPER,
    "axes.labelcolor": _INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.axisbelow": True,
    "figure.facecolor": _PAPER,
    "grid.color": _GRID,
    "legend.frameon": False,
    "text.color": _INK,
    "xtick.color": _SOFT,
    "xtick.labelcolor": _INK,
    "ytick.color": _SOFT,
    "ytick.labelcolor": _INK,
}

Curve = tuple[NDArray[np.float64], NDArray[np.float64]]
"""Recall and precision (T,)."""


def looks(variants: Sequence[str]) -> dict[str, dict[str, str]]:
    """How the page's own charts draw each variant: `colour` and `dash`, as in the figures.

    Args:
        variants: in the order in which the figures draw them.
    """
    dashes = list(_DASHES.values())
    return {
        variant: {"colour": _colour(number), "dash": dashes[number % len(dashes)]}
        for number, variant in enumerate(variants)
    }


@contextmanager
def drawing_to(stem: Path, width: float, height: float) -> Iterator[Any]:
    """Yield a figure of a size in inches to draw on; save it when the block ends without error."""
    # The import takes half a second, and only figures need it.
    from matplotlib.figure import Figure

    with drawing(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure
        choose_fonts(figure)
        with replacing(stem.with_suffix(".png")) as temporary:
            figure.savefig(temporary, format="png", dpi=150, metadata={"Software": None})
        # Keep the layout that was computed for the PNG: computing it takes half of the time.
        figure.set_layout_engine("none")
        with replacing(stem.with_suffix(".svg")) as temporary:
            figure.savefig(temporary, format="svg", metadata={"Date": None, "Creator": None})
            text = _following_the_reader(temporary.read_text(encoding="utf-8"))
            temporary.write_text(text, encoding="utf-8")


def _following_the_reader(svg: str) -> str:
    """Add a style sheet to an SVG that exchanges its colours where the reader prefers dark."""
    rules = "".join(
        f'[style*="{what}: {light}"]{{{what}:{dark} !important}}'
        for light, dark in _DARK.items()
        for what in ("fill", "stroke")
    )
    style = f"<style>@media (prefers-color-scheme: dark){{{rules}}}</style>"
    head, defs, rest = svg.partition("<defs>")
    return f"{head}{style}{defs}{rest}"


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def _dashes(number: int) -> str:
    return list(_DASHES)[number % len(_DASHES)]


def _marker(number: int) -> str:
    return _MARKERS[number % len(_MARKERS)]


def _beyond(letters: int, labels: Iterable[str]) -> float:
    """How many inches the longest label needs beyond a number of letters."""
    return 0.08 * max([0, *(len(legible(label)) - letters for label in labels)])


def sweep_figure(
    stem: Path,
    key: str,
    numbers: Mapping[str, Sequence[float | None]],
    validation: Mapping[str, Sequence[float]] | None = None,
    *,
    title: str,
    numeric: bool,
    metric: str = "mAP",
) -> None:
    """Draw a metric against the value of a setting.

    A line through the means; with several seeds also a bar of one sample standard deviation at
    each mean, and a dot for each run. A validation mAP is the first line; rings mark its best.

    Args:
        stem: path without suffix.
        key: name of the setting.
        numbers: value -> the metric of its runs in percent; None where it is not defined.
        validation: value -> the validation mAP of its runs; None or empty if there is none.
        title: above the figure.
        numeric: whether the values are numbers, to be placed to scale on the axis.
        metric: name of what was measured on the test split.
    """
    positions = [float(value) if numeric else number for number, value in enumerate(numbers)]
    line = "-" if numeric else "none"
    with drawing_to(stem, 5.5, 3.8) as figure:
        axes = figure.add_subplot()
        if validation:
            same = metric == "mAP"  # the axis names it then
            of_validation, of_test = ("", "") if same else (" mAP", f" {metric}")
            _sweep_line(axes, positions, validation, f"validation{of_validation}", 0, line)
            _sweep_line(axes, positions, numbers, f"test{of_test}", 1, "--" if numeric else line)
            means = list(map(fmean, validation.values()))
            best = [n for n, mean in enumerate(means) if mean == max(means)]
            ring = {"color": _colour(3), "fillstyle": "none", "markersize": 13}
            axes.plot(positions, means, "o", markevery=best, **ring, label="best by validation")
        else:
            _sweep_line(axes, positions, numbers, "", 0, line)
        if len(axes.get_legend_handles_labels()[1]) > 1:
            axes.legend()
        axes.set_xticks(positions, list(map(legible, numbers)))
        axes.set_xlabel(AXES.get(key, printable(key)))
        axes.set_ylabel("percent" if validation and metric != "mAP" else f"{metric} (%)")
        axes.set_title(printable(title))
        axes.grid(axis="y")


def _sweep_line(
    axes: Any,
    x: Sequence[float],
    numbers: Mapping[str, Sequence[float | None]],
    of: str,
    n: int,
    line: str,
) -> None:
    """Draw the n-th line at the positions ``x``: means, deviations, and runs as dots."""
    spreads = {at: spread_of(values) for at, values in zip(x, numbers.values(), strict=True)}
    known = {at: spread for at, spread in spreads.items() if spread is not None}
    several = any(spread.deviation is not None for spread in known.values())
    axes.errorbar(
        list(known),
        [spread.mean for spread in known.values()],
        yerr=[spread.deviation or 0.0 for spread in known.values()] if several else None,
        color=_colour(n),
        marker=_MARKERS[n],
        capsize=4,
        linestyle=line,
        label=f"{of} mean ± standard deviation".strip() if several else of or "mean",
    )
    if several:
        dots = [(at, y) for at, values in zip(x, numbers.values(), strict=True) for y in values]
        colour, label = _SOFT if of else _colour(1), "" if n else "each seed"
        axes.plot(*zip(*dots, strict=True), ".", color=colour, zorder=3, label=label)


def average_precision_figure(
    stem: Path, ap: Mapping[str, Mapping[str, float]], deviation: Mapping[str, float]
) -> None:
    """Draw the AP of each label: the first variant as bars, the others as marks on them.

    Args:
        stem: path without suffix.
        ap: variant -> label -> AP in percent, averaged over the seeds; labels in the order of the
            bars.
        deviation: label -> sample standard deviation for the first variant; empty for one seed.
    """
    first, *others = ap
    labels = list(ap[first])
    positions = np.arange(len(labels))
    with drawing_to(stem, 7.5, 1.4 + 0.26 * len(labels)) as figure:
        axes = figure.add_subplot()
        axes.barh(
            positions,
            list(ap[first].values()),
            xerr=[deviation[label] for label in labels] if deviation else None,
            color=_colour(0),
            ecolor=_SOFT,
            height=0.72,
            alpha=0.75,
            label=first,
        )
        for number, variant in enumerate(others, 1):
            axes.plot(
                [ap[variant][label] for label in labels],
                positions,
                linestyle="none",
                marker=_marker(number),
                color=_colour(number),
                markeredgecolor=_PAPER,
                markeredgewidth=0.7,
                markersize=7,
                label=variant,
            )
        axes.set_yticks(positions, list(map(legible, labels)))
        axes.set_ylim(len(labels) - 0.4, -0.6)
        axes.set_xlim(0, 100)
        axes.set_xlabel("average precision (%)")
        axes.grid(axis="x")
        figure.legend(loc="outside upper center", ncols=3)


def gains_figure(
    stem: Path, differences: Mapping[str, Mapping[str, float]], base: str, most: int = 6
) -> None:
    """Draw for each variant the labels that gain and lose most compared with ``base``.

    Args:
        stem: path without suffix.
        differences: variant -> label -> its AP minus that of ``base``, in points.
        base: the variant to compare with.
        most: how many labels to show on either side.
    """
    columns = min(2, len(differences))
    rows = -(-len(differences) // columns)
    shown = {}
    for variant, of_variant in differences.items():
        ranked = sorted(of_variant.items(), key=lambda entry: -entry[1])
        shown[variant] = ranked if len(ranked) <= 2 * most else [*ranked[:most], *ranked[-most:]]
    longest = max(map(len, shown.values()))
    reach = 1.1 * max(1.0, *(abs(value) for entries in shown.values() for _, value in entries))
    width = 4.2 + _beyond(16, (label for entries in shown.values() for label, _ in entries))
    with drawing_to(stem, width * columns, rows * (1.0 + 0.22 * longest)) as figure:
        panels = figure.subplots(rows, columns, squeeze=False)
        for axes in panels.flat[len(shown) :]:
            axes.set_visible(False)
        for axes, (variant, entries) in zip(panels.flat, shown.items(), strict=False):
            values = [value for _, value in entries]
            positions = np.arange(len(entries))
            colours = [_colour(0) if value >= 0 else _colour(3) for value in values]
            axes.barh(positions, values, color=colours, height=0.72)
            axes.axvline(0, color=_SOFT, linewidth=0.8)
            axes.set_yticks(positions, [legible(label) for label, _ in entries])
            axes.set_ylim(len(entries) - 0.4, -0.6)
            axes.set_xlim(-reach, reach)
            axes.set_title(variant)
            axes.grid(axis="x")
            axes.set_xlabel(f"AP minus that of {base} (points)")


def learning_figure(
    stem: Path, histories: Mapping[str, Sequence[Sequence[Mapping[str, float]]]]
) -> None:
    """Draw the loss of every run by epoch, and its validation mAP if there is one.

    Args:
        stem: path without suffix.
        histories: variant -> the history of each run, one row per epoch.
    """
    runs = [run for of_variant in histories.values() for run in of_variant]
    panels = {"train_loss": "training loss"}
    if any("validation_mAP" in run[0] for run in runs):
        panels["validation_mAP"] = "validation mAP (%)"
    with drawing_to(stem, 4.8 * len(panels) + 0.6, 3.8) as figure:
        for axes, (column, title) in zip(
            np.atleast_1d(figure.subplots(1, len(panels))), panels.items(), strict=True
        ):
            for number, (variant, of_variant) in enumerate(histories.items()):
                for index, run in enumerate(of_variant):
                    if column in run[0]:
                        axes.plot(
                            [row["epoch"] for row in run],
                            [row[column] for row in run],
                            _dashes(number),
                            color=_colour(number),
                            # A line of one epoch has no length.
                            marker=_marker(number) if len(run) == 1 else None,
                            linewidth=1.6,
                            label=variant if index == 0 else None,
                        )
            axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
            axes.set_xlabel("epoch")
            axes.set_ylabel(title)
            axes.grid()
            if column == "train_loss":
                if all(row[column] > 0 for run in runs for row in run):
                    set_log_scale(axes)
                axes.legend()


def precision_recall_figure(stem: Path, curves: Mapping[str, Mapping[str, Curve]]) -> None:
    """Draw precision against recall, one panel per label.

    Args:
        stem: path without suffix.
        curves: label -> variant -> curve; empty if the label has no positive.
    """
    columns = min(6, len(curves))
    rows = -(-len(curves) // columns)
    width, height = max(6.0, 1.7 * columns), 1.7 * rows + 0.9
    with drawing_to(stem, width, height) as figure:
        # The margins are set by hand: computing a layout for so many panels takes longer than
        # drawing them.
        figure.set_layout_engine("none")
        panels = figure.subplots(
            rows,
            columns,
            squeeze=False,
            sharex=True,
            sharey=True,
            gridspec_kw={
                "left": 0.6 / width,
                "right": 1 - 0.15 / width,
                "bottom": 0.5 / height,
                "top": 1 - 0.75 / height,
                "hspace": 0.3,
            },
        )
        for axes in panels.flat[len(curves) :]:
            axes.set_visible(False)
        lines: dict[str, Any] = {}
        for axes, (label, of_label) in zip(panels.flat, curves.items(), strict=False):
            for number, (variant, (recall, precision)) in enumerate(of_label.items()):
                [lines[variant]] = axes.plot(
                    100 * recall,
                    100 * precision,
                    _dashes(number),
                    color=_colour(number),
                    linewidth=1.2,
                )
            axes.set_title(legible(label, 20), fontsize=9)
            axes.set_xlim(0, 100)
            axes.set_ylim(0, 103)
            axes.grid()
        figure.supxlabel("recall (%)", fontsize=10, y=0.08 / height)
        figure.supylabel("precision (%)", fontsize=10, x=0.08 / width)
        figure.legend(lines.values(), lines, loc="upper center", ncols=3)


def calibration_figure(stem: Path, calibrations: Mapping[str, Calibration]) -> None:
    """Draw a reliability diagram, and below it how many entries each bin has.

    Args:
        stem: path without suffix.
        calibrations: one for each variant.
    """
    with drawing_to(stem, 5.2, 5.7 + 0.1 * len(calibrations)) as figure:
        axes, counts = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        axes.plot([0, 100], [0, 100], color=_SOFT, linewidth=1, linestyle=":", label="perfect")
        for number, (variant, one) in enumerate(calibrations.items()):
            filled = one.count > 0
            axes.plot(
                100 * one.confidence[filled],
                100 * one.frequency[filled],
                _dashes(number),
                color=_colour(number),
                marker=_marker(number),
                markersize=5,
                label=f"{variant} ({one.error:.1f} %)",
            )
            edges = np.linspace(0, 100, len(one.count) + 1)
            counts.stairs(one.count, edges, color=_colour(number), linewidth=1.4)
        axes.set_ylabel("positive entries (%)")
        axes.set_ylim(0, 100)
        figure.legend(
            loc="outside upper center",
            ncols=2,
            fontsize=9,
            title="expected calibration error",
            title_fontsize=9,
        )
        axes.grid()
        set_log_scale(counts)
        counts.set_xlim(0, 100)
        counts.set_xlabel("probability (%)")
        counts.set_ylabel("entries")


def co_occurrence_figure(stem: Path, shares: CoOccurrence, labels: Sequence[str]) -> None:
    """Draw how often label j comes with label i: true, predicted, and the difference.

    Args:
        stem: path without suffix.
        shares: for C labels.
        labels: C names.
    """
    panels: tuple[tuple[str, NDArray[np.float64], str, int], ...] = (
        ("truth", shares.truth, "cividis", 0),
        ("prediction", shares.predicted, "cividis", 0),
        ("prediction - truth", shares.predicted - shares.truth, "PuOr_r", -100),
    )
    side = max(2.4, 0.17 * len(labels))
    names = list(map(legible, labels))
    beyond = _beyond(20, labels)
    with drawing_to(stem, 3 * side + 2.4 + beyond, side + 1.6 + beyond) as figure:
        row = figure.subplots(1, 3)
        for column, (axes, (title, matrix, colours, low)) in enumerate(
            zip(row, panels, strict=True)
        ):
            axes.set_facecolor(_GRID)
            image = axes.imshow(100 * matrix, cmap=colours, vmin=low, vmax=100)
            axes.set_title(title)
            axes.set_xticks(range(len(labels)), names, rotation=90, fontsize=8)
            axes.set_yticks(range(len(labels)), names if column == 0 else [], fontsize=8)
            if column:
                unit = "points" if low else "%"
                figure.colorbar(image, ax=row[:2] if not low else axes, label=unit, shrink=0.8)
        row[0].set_ylabel("of images with ...")
        row[0].set_xlabel("... the share with ...")


def label_map_figure(
    stem: Path,
    maps: Mapping[str, NDArray[np.float64]],
    labels: Sequence[str],
    groups: Mapping[str, Sequence[str]] | None,
) -> None:
    """Draw maps of the labels, one panel per map, coloured by group if there are any.

    Args:
        stem: path without suffix.
        maps: title -> (C, 2).
        labels: C names.
        groups: name of a group -> its labels, or None.
    """
    indices = {label: index for index, label in enumerate(labels)}
    small = 8 if len(labels) <= 40 else 6.5
    with drawing_to(stem, 5.2 * len(maps), 5.4) as figure:
        row = np.atleast_1d(figure.subplots(1, len(maps)))
        for axes, (title, points) in zip(row, maps.items(), strict=True):
            handles = {}
            for number, (group, members) in enumerate((groups or {"": labels}).items()):
                drawn = [indices[label] for label in members if label in indices]
                [handles[group]] = axes.plot(
                    *points[drawn].T,
                    linestyle="none",
                    marker=_marker(number),
                    color=_colour(number),
                    markersize=7,
                )
                for index in drawn:
                    axes.annotate(
                        legible(labels[index]),
                        points[index],
                        xytext=(5, 3),
                        textcoords="offset points",
                        fontsize=small,
                    )
            axes.set_title(title)
            axes.set_xticks([])
            axes.set_yticks([])
            axes.margins(0.12)
        if groups:
            names = list(map(legible, handles))
            figure.legend(handles.values(), names, loc="outside lower center", ncols=6)
