"""Stage `report`: runs, regions and photographs -> reports/<dataset>/, a page that opens from disk.

`pipeline.report.page` describes the folder.
"""

from __future__ import annotations

import csv
import io
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from ruamel.yaml import YAML

from pipeline.datasets.groups import label_groups
from pipeline.datasets.manifest import SPLITS, Manifest
from pipeline.errors import GmpipeError
from pipeline.evaluation.bootstrap import COVERAGE, RESAMPLES, Interval, intervals
from pipeline.evaluation.diagnostics import found_groups
from pipeline.evaluation.paper import PAPER
from pipeline.evaluation.tables import labels_csv, results_csv
from pipeline.files import folder_lock, replacing_folder
from pipeline.learning.checkpoint import load_checkpoint
from pipeline.learning.splits import SplitData, fill_cache, open_split
from pipeline.machine import cores
from pipeline.matching.network import MatchingNetwork
from pipeline.regions.detector import class_names
from pipeline.report import illustrations as drawn
from pipeline.report.gallery import (
    chosen_places,
    mean_label_nodes,
    read_regions,
    region_scores,
    write_pictures,
)
from pipeline.report.page import (
    PICTURES,
    TABLES,
    write_data,
    write_frame,
    write_images,
    write_scores,
)
from pipeline.report.rows import columns, label_cells, own_rows, paper_rows
from pipeline.settings import VARIANTS
from pipeline.shards.failures import read_failures
from pipeline.shards.reader import RegionCache
from stages.checkout.caches import advising_on_cache, open_cache
from stages.checkout.layout import (
    CHECKPOINT_FILE,
    HISTORY_FILE,
    SWEEP_FIGURE_STEM,
    SWEEP_RESULTS_FILE,
    SWEEPS,
    cache_folder,
    data_root,
    detector_folder,
    report_folder,
    runs_folder,
)
from stages.checkout.manifests import dataset_manifest
from stages.checkout.params import Request
from stages.checkout.results import (
    BASE,
    Result,
    Results,
    Scores,
    caption,
    load_runs,
    load_scores,
    metrics_of,
    paper_differences,
    tables,
)
from stages.checkout.times import read_times
from stages.console.progress import progress_bar

PAGE = "index.html"

FEW = 10
"""Positives in the test split below which the page warns of a label's average precision."""

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
    request: Request,
    variants: Sequence[str],
    seeds: Sequence[int],
    *,
    images: int,
) -> tuple[str, Path]:
    """Write the page of variants x seeds.

    Args:
        images: test images that the gallery shows at most; of more, a random sample.

    Returns:
        the tables, and the page.

    Raises:
        GmpipeError: as `load_runs`, or the cache is not the one that the runs were trained on.
    """
    results = load_runs(request, variants, seeds)
    scores = load_scores(request, results)
    spread = intervals(scores.runs, scores.truth, BASE)
    text = tables(request, results, spread)
    folder = report_folder(request.dataset)
    with folder_lock(folder), replacing_folder(folder) as temporary:
        write_frame(temporary)
        runs = metrics_of(results)
        (temporary / TABLES / "results.md").write_text(text)
        (temporary / TABLES / "results.csv").write_text(results_csv(runs))
        (temporary / TABLES / "labels.csv").write_text(labels_csv(runs))
        _write_page(temporary, request, results, scores, spread, images)
    return text, folder / PAGE


def _write_page(
    folder: Path,
    request: Request,
    results: Results,
    scores: Scores,
    spread: Mapping[str, Interval],
    images: int,
) -> None:
    manifest = dataset_manifest(request.dataset)
    labels = list(manifest.vocabulary)
    runs = metrics_of(results)
    base = BASE if BASE in results else next(iter(results))
    first = results[base][0]
    cache = _cache_of(first)
    checkpoint = load_checkpoint(first.plan.folder / CHECKPOINT_FILE)
    vectors = checkpoint.label_vectors.numpy()
    groups = label_groups(request.prepare.source, labels)
    grouped = "the groups that the data set's makers give"
    if groups is None:
        groups, grouped = found_groups(labels, vectors), "groups of near word vectors"

    figures = [drawn.draw_average_precision(folder, runs, base)]
    if len(results) > 1:
        figures.append(drawn.draw_gains(folder, runs, base))
    figures.append(drawn.draw_learning(folder, _histories(results)))
    first_seed = {variant: of_variant[0] for variant, of_variant in scores.runs.items()}
    figure, curves = drawn.draw_precision_recall(folder, first_seed, scores.truth, labels)
    figures += [figure, drawn.draw_calibration(folder, scores.runs, scores.truth)]
    who = f"{base}, seed {first.plan.seed}"
    figures.append(drawn.draw_co_occurrence(folder, first_seed[base], scores.truth, labels, who))
    shown = _write_gallery(folder, manifest, cache, results, images)
    network = checkpoint.network()
    if isinstance(network, MatchingNetwork):
        split = _shown_split(cache, manifest, checkpoint.settings.regions, images)
        nodes = mean_label_nodes(network, split, checkpoint.label_vectors)
        mapped = drawn.draw_label_map(folder, vectors, nodes, labels, groups, who, grouped)
        figures += [mapped] if mapped is not None else []
    figures += _sweeps(folder, request.dataset)

    paper = PAPER.get(request.dataset)
    of_paper = None
    if paper is not None:
        of_paper = {
            "title": paper.title,
            "ap": [paper.ap.get(label) for label in labels] if paper.ap else None,
            "differences": paper_differences(request, results, paper),
        }
    write_data(
        folder,
        "curves",
        {
            label: {
                variant: [np.round(axis, 4).tolist() for axis in curve]
                for variant, curve in of_label.items()
            }
            for label, of_label in curves.items()
        },
    )
    # In a script of its own: all others are the same bytes for the same runs.
    write_data(folder, "times", _times(request.dataset, results))
    write_data(
        folder,
        "overview",
        {
            "dataset": request.dataset,
            "caption": caption(request.dataset, runs[base]),
            "interval": f"{100 * COVERAGE:.0f} % interval over {RESAMPLES:,} resamples of the test "
            "images",
            "detector": _detector(request, first),
            "base": base,
            "variants": list(results),
            "labels": labels,
            "groups": {label: group for group, members in groups.items() for label in members},
            "positives": (scores.truth == 1).sum(axis=0).tolist(),
            "few": FEW,
            "ap": label_cells(runs),
            "columns": columns(runs, BASE),
            "rows": [*own_rows(runs, spread, BASE), *(paper_rows(paper) if paper else [])],
            "paper": of_paper,
            "figures": [asdict(figure) for figure in figures],
            "gallery": {**shown, "of": len(scores.image_ids), "seed": first.plan.seed},
            "run": _what_was_run(request, manifest, results, first),
        },
    )


def _cache_of(run: Result) -> RegionCache:
    """The cache that a run was trained on.

    Raises:
        GmpipeError: there is another one by now.
    """
    cache = open_cache(run.plan.dataset)
    if cache.fingerprint != run.metrics["fingerprint"]:
        raise GmpipeError(
            f"{cache.folder} has the fingerprint {cache.fingerprint}, {run.plan.folder} was made "
            f"from {run.metrics['fingerprint']}, so that the page can't show which regions won. "
            "Train and evaluate again, or restore the regions: "
            f"`{fill_cache(run.recipe, run.plan.dataset)} --replace` with the settings of then."
        )
    return cache


def _shown_split(
    cache: RegionCache, manifest: Manifest, regions: int | None, images: int
) -> SplitData:
    """The test images of the gallery.

    Args:
        regions: of an image; None for all that the cache holds.
        images: how many at most.
    """
    with advising_on_cache(manifest.dataset):
        split = open_split(cache, manifest, "test", regions=regions)
    return split.take(chosen_places(len(split), images))


def _write_gallery(
    folder: Path, manifest: Manifest, cache: RegionCache, results: Results, images: int
) -> dict[str, Any]:
    """Write pictures, regions, and what the first run of each variant says of them.

    Returns:
        what the page must know before it loads any of it.
    """
    split = _shown_split(cache, manifest, None, images)
    rows = {row["image_id"]: row for row in manifest.rows("test").to_pylist()}
    shown = [rows[image_id] for image_id in split.image_ids]
    root = data_root(manifest.dataset)
    total = len(split) * (1 + len(results))
    with progress_bar(total=total, desc="report", unit="image") as bar:
        sizes = write_pictures(
            [root / row["path"] for row in shown],
            folder / PICTURES,
            threads=cores(),
            on_images=bar.update,
        )
        there = np.asarray(sizes.all(axis=1))
        for bare in np.flatnonzero(~there):
            sizes[bare] = [shown[bare][name] or 0 for name in ("width", "height")]
        write_images(folder, list(split.image_ids), sizes, there, split.truth, read_regions(split))
        for place, runs in enumerate(results.values()):
            checkpoint = load_checkpoint(runs[0].plan.folder / CHECKPOINT_FILE)
            used = _shown_split(cache, manifest, checkpoint.settings.regions, images)
            write_scores(
                folder,
                place,
                region_scores(checkpoint.network(), used, checkpoint.label_vectors, bar.update),
            )
    classes = None
    if "imported_from" not in cache.recipe:
        classes = class_names(detector_folder(manifest.dataset))
    return {"images": len(split), "pictures": int(there.sum()), "classes": classes}


def _sweeps(folder: Path, dataset: str) -> list[drawn.Illustration]:
    found = []
    for sweep in sorted((runs_folder(dataset) / SWEEPS).glob("*/")):
        results, figure = sweep / SWEEP_RESULTS_FILE, sweep / SWEEP_FIGURE_STEM
        # A sweep that was killed on the way has no figure yet.
        if all(path.is_file() for path in (results, *map(figure.with_suffix, (".svg", ".png")))):
            found.append(drawn.copy_sweep(folder, results, figure))
    return found


def _histories(results: Results) -> dict[str, dict[int, list[dict[str, float]]]]:
    return {
        variant: {run.plan.seed: _read_history(run.plan.folder / HISTORY_FILE) for run in runs}
        for variant, runs in results.items()
    }


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


# What was run ------------------------------------------------------------------------------------


def _what_was_run(
    request: Request, manifest: Manifest, results: Results, first: Result
) -> dict[str, Any]:
    commits = {run.metrics["commit"] for runs in results.values() for run in runs}
    facts = [
        ("data set", request.dataset),
        ("split", first.metrics["split"]),
        *(
            (
                f"images of {split}",
                f"{counts['images']:,} (listed {counts['listed']:,}, missing "
                f"{counts['missing']:,}, unlabelled {counts['unlabelled']:,})",
            )
            for split, counts in manifest.counts.items()
        ),
        ("left out of these, without regions", _left_out(manifest)),
        ("labels", str(len(manifest.vocabulary))),
        ("regions by", _detector(request, first)),
        ("label vectors", first.plan.settings.label_vectors),
        ("regions of an image", str(first.plan.settings.regions or first.recipe["regions"])),
        ("fingerprint of the regions", first.metrics["fingerprint"]),
        ("commit of the runs", ", ".join(sorted(commit or "none" for commit in commits))),
    ]
    blocks: dict[str, Any] = {
        "prepare": request.prepare,
        "detector": request.detector,
        "extract": request.extract,
        "train": request.train,
    }
    shown = {name: block.model_dump(mode="json") for name, block in blocks.items()}
    own = shown["train"].pop("variants")
    shown["variants"] = {name: {**VARIANTS.get(name, {}), **own.get(name, {})} for name in results}
    return {
        "facts": facts,
        "packages": [("python", platform.python_version()), *map(_version, _PACKAGES)],
        "settings": _as_yaml(shown),
    }


def _left_out(manifest: Manifest) -> str:
    """How many images neither trained nor tested, since they could not be decoded or imported."""
    failed = read_failures(cache_folder(manifest.dataset))
    counts = {split: sum(one in failed for one in manifest.image_ids(split)) for split in SPLITS}
    return ", ".join(f"{count} of {split}" for split, count in counts.items())


def _detector(request: Request, run: Result) -> str:
    if "imported_from" in run.recipe:
        return f"another program, imported ({run.recipe['imported_from']})"
    chosen = request.detector
    return {
        "torchvision": "torchvision's ResNet50-FPN Faster R-CNN, trained on MS-COCO",
        "fit": "a Faster R-CNN fitted on boxes of this data set",
    }.get(chosen.source, f"a Faster R-CNN with the weights {chosen.weights}")


def _version(package: str) -> tuple[str, str]:
    try:
        return package, version(package)
    except PackageNotFoundError:  # gmpipe itself, where it runs without being installed
        return package, "not installed"


def _as_yaml(value: Any) -> str:
    stream = io.StringIO()
    yaml = YAML()
    yaml.default_flow_style = False
    yaml.dump(value, stream)
    return stream.getvalue()


def _times(dataset: str, results: Results) -> list[list[str]]:
    """Of the data set's stages and of these runs: stage, what of, seconds, and when it ended."""
    shown = {run.plan.folder.name for runs in results.values() for run in runs}
    return [
        [
            time.stage,
            time.run or (f"{time.rows:,} rows" if time.rows is not None else dataset),
            f"{time.seconds:.1f}",
            time.finished,
        ]
        for time in read_times(dataset)
        if not time.run or time.run in shown
    ]
