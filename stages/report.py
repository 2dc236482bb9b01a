"""Stage `report`: runs, regions and photographs -> reports/<dataset>/, a page that opens from disk.

What it holds and how is described in `pipeline.report.page`.
"""

from __future__ import annotations

import csv
import io
import platform
import shutil
import statistics
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from ruamel.yaml import YAML

from pipeline.datasets.groups import label_groups
from pipeline.datasets.manifest import Manifest, read_manifest
from pipeline.errors import GmpipeError
from pipeline.evaluation import figures
from pipeline.evaluation.diagnostics import (
    Calibration,
    CoOccurrence,
    calibration,
    co_occurrence,
    found_groups,
    label_map,
    thinned_curve,
)
from pipeline.evaluation.metrics import THRESHOLD
from pipeline.evaluation.paper import PAPER, PaperResults
from pipeline.evaluation.tables import as_csv, labels_csv, results_csv
from pipeline.files import folder_lock, replacing_folder
from pipeline.learning.checkpoint import Checkpoint, load_checkpoint
from pipeline.learning.data import fill_cache, open_split
from pipeline.machine import cores
from pipeline.matching.network import MatchingNetwork
from pipeline.regions.detector import class_names
from pipeline.report.gallery import (
    chosen_places,
    mean_label_nodes,
    read_regions,
    region_scores,
    write_pictures,
)
from pipeline.report.page import (
    FIGURES,
    PICTURES,
    TABLES,
    write_data,
    write_frame,
    write_images,
    write_scores,
)
from pipeline.settings import VARIANTS
from pipeline.shards.reader import RegionCache
from stages.layout import (
    CHECKPOINT_FILE,
    HISTORY_FILE,
    SWEEP_FIGURE_STEM,
    SWEEP_RESULTS_FILE,
    SWEEPS,
    cache_folder,
    data_root,
    detector_folder,
    manifest_file,
    report_folder,
    runs_folder,
)
from stages.params import DatasetSettings
from stages.progress import progress_bar
from stages.results import (
    BASE,
    Interval,
    Results,
    Scores,
    bootstrap_intervals,
    caption,
    load_runs,
    load_scores,
    metrics_of,
    paper_differences,
    tables,
)

IMAGES = 1000
"""Test images that the gallery shows at most, unless asked for another number."""

PAGE = "index.html"

_SIX = ("CP", "CR", "CF1", "OP", "OR", "OF1")
_PACKAGES = (
    "gmpipe",
    "torch",
    "torchvision",
    "numpy",
    "h5py",
    "pyarrow",
    "dask",
    "scikit-learn",
    "dvc",
)


def report(
    settings: DatasetSettings,
    variants: Sequence[str],
    seeds: Sequence[int],
    overrides: Sequence[str] = (),
    *,
    images: int = IMAGES,
) -> str:
    """Write the page of variants x seeds.

    Args:
        overrides: the `--set` options that ``settings`` were read with.
        images: test images that the gallery shows at most; of more, a random sample.

    Returns:
        the tables, and where the page is.

    Raises:
        GmpipeError: as `load_runs`, or the cache is not the one that the runs were trained on.
    """
    results = load_runs(settings, variants, seeds, overrides)
    scores = load_scores(settings, results)
    intervals = bootstrap_intervals(results, scores)
    text = tables(settings, results, intervals)
    folder = report_folder(settings.dataset)
    with folder_lock(folder), replacing_folder(folder) as temporary:
        writer = _Writer(temporary, settings, results, scores, intervals)
        writer.write(text, images)
    return f"{text}\n{folder / PAGE}"


class _Writer:
    """Writes one page.

    Args:
        folder: an empty one.
        settings, results, scores, intervals: of the runs to show.
    """

    def __init__(
        self,
        folder: Path,
        settings: DatasetSettings,
        results: Results,
        scores: Scores,
        intervals: Mapping[str, Interval],
    ) -> None:
        self.folder = folder
        self.settings = settings
        self.results = results
        self.scores = scores
        self.intervals = intervals
        self.manifest = read_manifest(manifest_file(settings.dataset))
        self.labels = list(self.manifest.vocabulary)
        self.paper = PAPER.get(settings.dataset)
        self.base = BASE if BASE in results else next(iter(results))
        self.figures: list[dict[str, Any]] = []

    def write(self, text: str, images: int) -> None:
        """Write everything.

        Args:
            text: the tables, as Markdown.
            images: that the gallery shows at most.
        """
        write_frame(self.folder)
        runs = metrics_of(self.results)
        (self.folder / TABLES / "results.md").write_text(text)
        (self.folder / TABLES / "results.csv").write_text(results_csv(runs))
        (self.folder / TABLES / "labels.csv").write_text(labels_csv(runs))
        gallery, groups = self._gallery(images)
        ap = _mean_ap(self.results)
        self._draw_labels(ap)
        self._draw_learning()
        curves = self._draw_curves()
        errors = self._draw_calibration()
        self._draw_co_occurrence()
        self._copy_sweeps()
        write_data(self.folder, "curves", curves)
        write_data(
            self.folder,
            "overview",
            {
                "dataset": self.settings.dataset,
                "caption": caption(self.settings.dataset, runs[self.base]),
                "base": self.base,
                "variants": list(self.results),
                "labels": self.labels,
                "groups": {label: group for group, of in groups.items() for label in of},
                "positives": [int(n) for n in (self.scores.truth == 1).sum(axis=0)],
                "ap": {
                    variant: [
                        _mean_and_spread([run.metrics["AP"][label] for run in found])
                        for label in self.labels
                    ]
                    for variant, found in self.results.items()
                },
                "paper": self._paper_data(),
                "columns": _columns(self.results, self.paper),
                "rows": [*_own_rows(self.results, self.intervals), *_paper_rows(self.paper)],
                "calibration": errors,
                "figures": self.figures,
                "gallery": gallery,
                "run": self._what_was_run(),
            },
        )

    def _paper_data(self) -> dict[str, Any] | None:
        if self.paper is None:
            return None
        return {
            "title": self.paper.title,
            "ap": [self.paper.ap.get(label) for label in self.labels] if self.paper.ap else None,
            "differences": paper_differences(self.settings, self.results, self.paper),
        }

    def _figure(self, name: str, title: str, alt: str, note: str, *, table: bool = True) -> Path:
        """Note a figure for the page, and say where to draw it."""
        self.figures.append(
            {"name": name, "title": title, "alt": alt, "note": note, "table": table}
        )
        return self.folder / FIGURES / name

    def _table(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        (self.folder / TABLES / f"{name}.csv").write_text(as_csv(rows))

    # The gallery ---------------------------------------------------------------------------------

    def _gallery(self, images: int) -> tuple[dict[str, Any], Mapping[str, Sequence[str]]]:
        """Write pictures, regions and scores; draw the map of the labels on the way.

        Returns:
            what the page must know of them, and the labels' groups.
        """
        dataset = self.settings.dataset
        cache = RegionCache.open(cache_folder(dataset))
        first = self.results[self.base][0]
        if cache.fingerprint != first.metrics["fingerprint"]:
            raise GmpipeError(
                f"{cache.folder} has the fingerprint {cache.fingerprint}, {first.plan.folder} was "
                f"made from {first.metrics['fingerprint']}: the page can't show whose regions won. "
                f"Train and evaluate again, or restore the regions with "
                f"`{fill_cache(first.recipe, dataset)} --replace` and the settings of then."
            )
        split = open_split(cache, self.manifest, "test")
        split = split.take(chosen_places(len(split), images))
        rows = {row["image_id"]: row for row in self.manifest.rows("test").to_pylist()}
        shown = [rows[image_id] for image_id in split.image_ids]
        work = len(split) * (1 + len(self.results))
        groups: Mapping[str, Sequence[str]] = {}
        with progress_bar(total=work, desc="report", unit="image") as bar:
            sizes = write_pictures(
                [data_root(dataset) / row["path"] for row in shown],
                self.folder / PICTURES,
                threads=cores(),
                on_images=bar.update,
            )
            there = np.asarray(sizes.all(axis=1))
            for bare in np.flatnonzero(~there):
                sizes[bare] = [shown[bare][name] or 0 for name in ("width", "height")]
            regions = read_regions(split)
            write_images(self.folder, list(split.image_ids), sizes, there, split.truth, regions)
            for place, (variant, runs) in enumerate(self.results.items()):
                checkpoint = load_checkpoint(runs[0].plan.folder / CHECKPOINT_FILE)
                used = open_split(cache, self.manifest, "test", 1, checkpoint.settings.regions)
                used = used.take(chosen_places(len(used), images))
                network = checkpoint.network()
                found = region_scores(network, used, checkpoint.label_vectors, bar.update)
                write_scores(self.folder, place, found)
                if variant == self.base:
                    groups = self._groups(checkpoint)
                    if isinstance(network, MatchingNetwork):
                        nodes = mean_label_nodes(network, used, checkpoint.label_vectors)
                        self._draw_label_map(checkpoint, nodes, groups)
        classes = None
        if "imported_from" not in cache.recipe:
            classes = class_names(detector_folder(dataset))
        about = {
            "images": len(split),
            "of": len(self.scores.image_ids),
            "pictures": int(there.sum()),
            "seed": first.metrics["seed"],
            "classes": classes,
        }
        return about, groups

    def _groups(self, checkpoint: Checkpoint) -> Mapping[str, Sequence[str]]:
        known = label_groups(self.labels)
        if known is not None:
            return known
        return found_groups(self.labels, checkpoint.label_vectors.numpy())

    def _draw_label_map(
        self, checkpoint: Checkpoint, nodes: np.ndarray, groups: Mapping[str, Sequence[str]]
    ) -> None:
        vectors = checkpoint.label_vectors.numpy()
        maps = {"word vectors": label_map(vectors), "learned label nodes": label_map(nodes)}
        places = {title: found for title, found in maps.items() if found is not None}
        if not places:
            return
        grouped = "the data set's own groups"
        if label_groups(self.labels) is None:
            grouped = "groups of near word vectors"
        stem = self._figure(
            "label-map",
            "Topology of the labels",
            f"Two maps of the {len(self.labels)} labels, coloured by {grouped}: by word vectors, "
            f"and by the nodes that {self.base} has learned. Coordinates are in label-map.csv.",
            f"The paper's Figure 5: t-SNE (cosine) of the word vectors, and of the label nodes "
            f"after the last convolution module of {self.base}, seed {checkpoint.seed}, mean over "
            f"the images of the gallery. Colour: {grouped}. Distances between far points mean "
            "little in such a map.",
        )
        figures.label_map_figure(stem, places, self.labels, groups)
        group_of = {label: group for group, of in groups.items() for label in of}
        self._table(
            "label-map",
            (
                {"map": title, "label": label, "group": group_of[label], "x": x, "y": y}
                for title, found in places.items()
                for label, (x, y) in zip(self.labels, found, strict=True)
            ),
        )

    # Figures -------------------------------------------------------------------------------------

    def _draw_labels(self, ap: Mapping[str, Mapping[str, float]]) -> None:
        of_base = ap[self.base]
        order = sorted(of_base, key=lambda label: -of_base[label])
        ordered = {
            variant: {label: ap[variant][label] for label in order}
            for variant in [self.base, *(name for name in ap if name != self.base)]
        }
        spread = {}
        if len(self.results[self.base]) > 1:
            spread = {
                label: statistics.stdev(run.metrics["AP"][label] for run in self.results[self.base])
                for label in order
            }
        best, worst = order[0], order[-1]
        stem = self._figure(
            "average-precision",
            "Average precision by label",
            f"Bars of {self.base} for {len(order)} labels, from {of_base[best]:.1f} % ({best}) to "
            f"{of_base[worst]:.1f} % ({worst}), with a mark for each other variant. All numbers "
            "are in the table above and in labels.csv.",
            "Mean over the seeds"
            + (f"; the lines are the sample standard deviation of {self.base}." if spread else "."),
            table=False,
        )
        figures.average_precision_figure(stem, ordered, spread)
        differences = {
            variant: {label: found[label] - of_base[label] for label in order}
            for variant, found in ordered.items()
            if variant != self.base
        }
        if not differences:
            return
        said = "; ".join(
            f"{variant} loses most on {min(found, key=found.__getitem__)} "
            f"({min(found.values()):+.1f}) and gains most on "
            f"{max(found, key=found.__getitem__)} ({max(found.values()):+.1f})"
            for variant, found in differences.items()
        )
        stem = self._figure(
            "gains-and-losses",
            "Labels that gain and lose most",
            f"For each variant the difference in average precision to {self.base}: {said}.",
            f"Points of average precision minus those of {self.base}, mean over the seeds.",
        )
        figures.gains_figure(stem, differences, self.base)
        self._table(
            "gains-and-losses",
            (
                {"variant": variant, "label": label, "difference": value}
                for variant, found in differences.items()
                for label, value in found.items()
            ),
        )

    def _draw_learning(self) -> None:
        histories = {
            variant: [_read_history(run.plan.folder / HISTORY_FILE) for run in runs]
            for variant, runs in self.results.items()
        }
        ends = ", ".join(
            f"{variant} {statistics.fmean(run[-1]['train_loss'] for run in of_variant):.3f}"
            for variant, of_variant in histories.items()
        )
        stem = self._figure(
            "learning-curves",
            "Learning curves",
            f"Loss of the training split by epoch, a line a run. At the end it is: {ends}.",
            "A line a run, from its history.csv.",
        )
        figures.learning_figure(stem, histories)
        self._table(
            "learning-curves",
            (
                {"variant": variant, "seed": run.metrics["seed"], **row}
                for variant, of_variant in histories.items()
                for run, history in zip(self.results[variant], of_variant, strict=True)
                for row in history
            ),
        )

    def _draw_curves(self) -> dict[str, dict[str, list[list[float]]]]:
        """Precision-recall curves of the first seed, for the figure and for the page."""
        curves = {
            label: {
                variant: thinned_curve(runs[0][:, place], self.scores.truth[:, place])
                for variant, runs in self.scores.runs.items()
            }
            for place, label in enumerate(self.labels)
            if (self.scores.truth[:, place] == 1).any()
        }
        seed = self.results[self.base][0].metrics["seed"]
        stem = self._figure(
            "precision-recall",
            "Precision and recall, all labels",
            f"{len(curves)} small panels, a label each, with a precision-recall curve for each of "
            f"{len(self.results)} variants. Points are in precision-recall.csv.",
            f"Seed {seed}; at most 100 points of a curve.",
        )
        figures.precision_recall_figure(stem, curves)
        self._table(
            "precision-recall",
            (
                {"label": label, "variant": variant, "recall": r, "precision": p}
                for label, of_label in curves.items()
                for variant, (recall, precision) in of_label.items()
                for r, p in zip(recall, precision, strict=True)
            ),
        )
        return {
            label: {
                variant: [[round(float(x), 4) for x in axis] for axis in curve]
                for variant, curve in of_label.items()
            }
            for label, of_label in curves.items()
        }

    def _draw_calibration(self) -> dict[str, float]:
        found: dict[str, Calibration] = {
            variant: calibration(
                np.concatenate(runs), np.concatenate([self.scores.truth] * len(runs))
            )
            for variant, runs in self.scores.runs.items()
        }
        said = ", ".join(f"{variant} {one.error:.1f} %" for variant, one in found.items())
        stem = self._figure(
            "calibration",
            "Calibration",
            "Reliability diagram: share of positives against probability, in bins. Expected "
            f"calibration error: {said}.",
            "Every image and label is one entry, all seeds together. Below: how many entries a bin "
            f"has. Expected calibration error: {said}.",
        )
        figures.calibration_figure(stem, found)
        self._table(
            "calibration",
            (
                {
                    "variant": variant,
                    "bin": number,
                    "entries": int(one.count[number]),
                    "confidence": _known(one.confidence[number]),
                    "frequency": _known(one.frequency[number]),
                }
                for variant, one in found.items()
                for number in range(len(one.count))
            ),
        )
        return {variant: one.error for variant, one in found.items()}

    def _draw_co_occurrence(self) -> None:
        found = co_occurrence(self.scores.runs[self.base][0], self.scores.truth)
        stem = self._figure(
            "co-occurrence",
            "Labels that come together",
            f"Three matrices of {len(self.labels)} x {len(self.labels)} labels: how often the "
            "label of a column comes with that of a row in truth, as predicted, and the "
            "difference. "
            f"{_largest_gaps(found, self.labels)}",
            f"Of the test images with the label of the row, the share that also has that of the "
            f"column: in truth, as predicted by {self.base}, seed "
            f"{self.results[self.base][0].metrics['seed']} (probability over {THRESHOLD}), and the "
            f"difference. {_largest_gaps(found, self.labels)}",
        )
        figures.co_occurrence_figure(stem, found, self.labels)
        self._table(
            "co-occurrence",
            (
                {
                    "label": one,
                    "with": other,
                    "truth": _known(found.truth[i, j]),
                    "predicted": _known(found.predicted[i, j]),
                }
                for i, one in enumerate(self.labels)
                for j, other in enumerate(self.labels)
                if i != j
            ),
        )

    def _copy_sweeps(self) -> None:
        top = runs_folder(self.settings.dataset) / SWEEPS
        for folder in sorted(top.glob("*/")):
            results = folder / SWEEP_RESULTS_FILE
            drawn = [folder / f"{SWEEP_FIGURE_STEM}.{suffix}" for suffix in ("svg", "png")]
            if not all(path.is_file() for path in (results, *drawn)):
                continue  # of a sweep that was killed before its figure
            with results.open(newline="") as stream:
                rows = list(csv.DictReader(stream))
            means: dict[str, list[float]] = {}
            for row in rows:
                means.setdefault(row["value"], []).append(float(row["mAP"]))
            said = ", ".join(f"{value}: {statistics.fmean(v):.1f}" for value, v in means.items())
            key, variant = rows[0]["setting"], rows[0]["variant"]
            stem = self._figure(
                f"sweep-{folder.name}",
                f"Sweep of {key}",
                f"mAP of {variant} against {figures.AXES.get(key, key)}: {said}.",
                "The paper's Figure 4 varies m and k." if key in figures.AXES else "",
            )
            for path in drawn:
                shutil.copyfile(path, stem.with_suffix(path.suffix))
            shutil.copyfile(results, self.folder / TABLES / f"sweep-{folder.name}.csv")

    # What was run --------------------------------------------------------------------------------

    def _what_was_run(self) -> dict[str, Any]:
        first = self.results[self.base][0]
        commits = {run.metrics["commit"] for runs in self.results.values() for run in runs}
        rows = [
            ("data set", self.settings.dataset),
            ("split", first.metrics["split"]),
            *_count_rows(self.manifest),
            ("labels", str(len(self.labels))),
            ("label vectors", first.plan.settings.label_vectors),
            ("regions of an image", str(first.plan.settings.regions or first.recipe["regions"])),
            ("fingerprint of the regions", first.metrics["fingerprint"]),
            ("commit of the runs", ", ".join(sorted(c or "none" for c in commits))),
        ]
        return {
            "facts": rows,
            "packages": [("python", platform.python_version()), *_versions()],
            "settings": _as_yaml(
                {
                    "prepare": self.settings.prepare.model_dump(mode="json"),
                    "detector": self.settings.detector.model_dump(mode="json"),
                    "extract": self.settings.extract.model_dump(mode="json"),
                    "train": self.settings.train.model_dump(mode="json", exclude={"variants"}),
                    "variants": {
                        variant: {
                            **VARIANTS.get(variant, {}),
                            **self.settings.train.variants.get(variant, {}),
                        }
                        for variant in self.results
                    },
                }
            ),
        }


def _count_rows(manifest: Manifest) -> list[tuple[str, str]]:
    return [
        (
            f"images of {split}",
            f"{counts['images']:,} (listed {counts['listed']:,}, missing {counts['missing']:,}, "
            f"unlabelled {counts['unlabelled']:,})",
        )
        for split, counts in manifest.counts.items()
    ]


def _versions() -> list[tuple[str, str]]:
    found = []
    for name in _PACKAGES:
        try:
            found.append((name, version(name)))
        except PackageNotFoundError:  # gmpipe itself, where it is run without being installed
            found.append((name, "not installed"))
    return found


def _as_yaml(value: Any) -> str:
    stream = io.StringIO()
    yaml = YAML()
    yaml.default_flow_style = False
    yaml.dump(value, stream)
    return stream.getvalue()


def _read_history(path: Path) -> list[dict[str, float]]:
    """The rows of a run's history.

    Raises:
        GmpipeError: it is missing or damaged.
    """
    try:
        with path.open(newline="") as stream:
            rows = [
                {name: float(value) for name, value in row.items()}
                for row in csv.DictReader(stream)
            ]
        if not rows:
            raise ValueError("it has no row")
    except (OSError, ValueError, TypeError) as error:
        raise GmpipeError(
            f"{path} can't be read ({error}). Delete its folder, and train and evaluate again."
        ) from error
    return rows


def _mean_ap(results: Results) -> dict[str, dict[str, float]]:
    """AP of each label with a positive, by variant, mean over the seeds."""
    return {
        variant: {
            label: statistics.fmean(run.metrics["AP"][label] for run in runs)
            for label, value in runs[0].metrics["AP"].items()
            if value is not None
        }
        for variant, runs in results.items()
    }


def _known(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _mean_and_spread(values: Sequence[float | None]) -> list[float | None] | None:
    """[mean, sample standard deviation or None], of numbers that are all there or all missing."""
    present = [value for value in values if value is not None]
    if not present:
        return None
    return [statistics.fmean(present), statistics.stdev(present) if len(present) > 1 else None]


def _largest_gaps(found: CoOccurrence, labels: Sequence[str], most: int = 3) -> str:
    """The pairs that prediction joins too often or too seldom."""
    gaps = np.nan_to_num(found.predicted - found.truth)
    order = np.argsort(-np.abs(gaps), axis=None, kind="stable")[:most]
    pairs = [np.unravel_index(place, gaps.shape) for place in order]
    said = ", ".join(
        f"{labels[j]} with {labels[i]} ({100 * gaps[i, j]:+.0f} points)" for i, j in pairs
    )
    return f"Largest differences: {said}."


# Rows of the table of results --------------------------------------------------------------------


def _columns(results: Results, paper: PaperResults | None) -> list[dict[str, str]]:
    """Key, title and group of each column of numbers."""
    first = next(iter(results.values()))[0].metrics
    columns = [{"key": "mAP", "title": "mAP", "group": ""}]
    if "mAP11" in first:
        columns.append({"key": "mAP11", "title": "11-point mAP", "group": ""})
    if len(results) > 1 and BASE in results:
        columns.append({"key": "difference", "title": f"to {BASE}", "group": ""})
    for group, title in (("all", "All"), ("top3", "Top-3"), ("top3_forced", "Top-3, always three")):
        columns += [{"key": f"{group} {name}", "title": name, "group": title} for name in _SIX]
    return columns


def _cells(metrics: Mapping[str, Any]) -> dict[str, float]:
    cells = {name: metrics[name] for name in ("mAP", "mAP11") if name in metrics}
    cells |= {f"all {name}": metrics[name] for name in _SIX}
    for group in ("top3", "top3_forced"):
        cells |= {f"{group} {name}": metrics[group][name] for name in _SIX}
    return cells


def _own_rows(results: Results, intervals: Mapping[str, Interval]) -> list[dict[str, Any]]:
    """A row a variant, and below it one a seed: key -> [mean, spread] or [mean, spread, ends]."""
    rows: list[dict[str, Any]] = []
    for variant, runs in results.items():
        each = [_cells(run.metrics) for run in runs]
        cells: dict[str, Any] = {
            key: _mean_and_spread([one[key] for one in each]) for key in each[0]
        }
        interval = intervals[variant]
        cells["mAP"].append(interval.ends)
        if interval.difference is not None:
            value, low, high = interval.difference
            cells["difference"] = [value, None, (low, high)]
        rows.append({"kind": "variant", "name": variant, "of": variant, "cells": cells})
        if len(runs) > 1:
            rows += [
                {
                    "kind": "seed",
                    "name": f"seed {run.metrics['seed']}",
                    "of": variant,
                    "cells": {key: [value, None] for key, value in one.items()},
                }
                for run, one in zip(runs, each, strict=True)
            ]
    return rows


def _paper_rows(paper: PaperResults | None) -> list[dict[str, Any]]:
    """A row for every method of the paper's tables of this data set."""
    if paper is None:
        return []
    return [
        {
            "kind": "paper",
            "name": method,
            "of": method,
            "cells": {
                _own_key(column): [value, None]
                for column, value in row.items()
                if value is not None and column in paper.columns
            },
        }
        for method, row in paper.methods.items()
    ]


def _own_key(column: str) -> str:
    """A column of the paper, by the key that ours has."""
    if column == "mAP":
        return column
    if column.startswith("top-3 "):
        return f"top3 {column.removeprefix('top-3 ')}"
    return f"all {column}"
