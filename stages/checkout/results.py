"""What runs have shown: finished runs of a data set, and the tables of them.

`compare`, `sweep` and `report` read and print the same.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.datasets.groups import LABEL_GROUPS
from pipeline.errors import GmpipeError
from pipeline.evaluation.bootstrap import RESAMPLES, Interval
from pipeline.evaluation.paper import PAPER, PaperResults
from pipeline.evaluation.tables import (
    differences_table,
    labels_table,
    mean_difference,
    paper_table,
    results_table,
)
from pipeline.learning.checkpoint import load_checkpoint
from pipeline.settings import TrainSettings
from pipeline.shards.schema import Recipe
from stages.checkout.layout import CHECKPOINT_FILE, METRICS_FILE, PREDICTIONS_FILE
from stages.checkout.manifests import dataset_manifest
from stages.checkout.params import Request
from stages.checkout.plans import RunPlan, plan_run


@dataclass(frozen=True)
class Result:
    """A run that was trained and evaluated.

    Attributes:
        plan: what it is.
        metrics: as `evaluate` wrote them.
        recipe: of the regions that it was trained on.
    """

    plan: RunPlan
    metrics: dict[str, Any]
    recipe: Recipe


Results = Mapping[str, Sequence[Result]]
"""Variant -> its runs, one a seed."""

BASE = "full"
"""The variant that all others are held against."""


def load_runs(
    request: Request,
    variants: Sequence[str],
    seeds: Sequence[int],
) -> dict[str, list[Result]]:
    """Variants x seeds.

    Raises:
        GmpipeError: a run was not evaluated yet, was trained with other settings than it would be
            now, or two of them are of other regions or labels, so that no table may hold both.
    """
    options = ["--dataset", request.dataset]
    options += [word for seed in seeds for word in ("--seed", str(seed))]
    options += [word for override in request.overrides for word in ("--set", override)]
    all_of_them = f"`gmpipe compare {shlex.join(options)}`"
    runs: dict[str, list[Result]] = {}
    first: Result | None = None
    for variant in variants:
        for seed in seeds:
            run = _load_run(plan_run(request, variant, seed), all_of_them)
            first = first or run
            for name in ("fingerprint", "labels_sha256"):
                if run.metrics[name] != first.metrics[name]:
                    raise GmpipeError(
                        f"{run.plan.folder} and {first.plan.folder} can't be compared: `{name}` in "
                        f"{METRICS_FILE} is {run.metrics[name]}, expected {first.metrics[name]}. "
                        f"Run {_commands(run.plan)}, and the same for what else is older."
                    )
            runs.setdefault(variant, []).append(run)
    return runs


def _load_run(plan: RunPlan, all_of_them: str) -> Result:
    """A finished run; ``all_of_them`` is what makes all that are missing."""
    path = plan.folder / METRICS_FILE
    if not path.is_file():
        raise GmpipeError(
            f"there are no metrics at {path}. Run {all_of_them}, which makes all that is missing, "
            f"or {_commands(plan)}, for this run alone. Which runs are wanted, `variants` and "
            "`seeds` in params.yaml say."
        )
    checkpoint = load_checkpoint(plan.folder / CHECKPOINT_FILE)
    if checkpoint.settings != plan.settings:
        have, want = checkpoint.settings.model_dump(), plan.settings.model_dump()
        name = next(name for name in want if have[name] != want[name])
        raise GmpipeError(
            f"{plan.folder} was trained with other settings: `{name}` was {have[name]!r}, expected "
            f"{want[name]!r}. Run `dvc repro`, or {_commands(plan)}."
        )
    try:
        metrics = dict(json.loads(path.read_text()))
        if missing := {"fingerprint", "labels_sha256", "AP"} - metrics.keys():
            raise KeyError(*sorted(missing))
    except (ValueError, TypeError, KeyError) as error:
        again = _commands(plan, "evaluate")
        raise GmpipeError(f"{path} is damaged ({error!r}). Run {again}.") from error
    return Result(plan, metrics, checkpoint.recipe)


def _commands(plan: RunPlan, *names: str) -> str:
    return " and ".join(
        f"`gmpipe {name} {plan.options}`" for name in names or ("train", "evaluate")
    )


@dataclass(frozen=True)
class Scores:
    """What runs say of the test images.

    Attributes:
        image_ids: N, those of the split that have regions.
        truth: (N, C) int8: 1 positive, 0 negative, -1 ignored.
        runs: variant -> (N, C) float32 of each of its runs, probabilities.
    """

    image_ids: list[str]
    truth: np.ndarray
    runs: dict[str, list[np.ndarray]]


def load_scores(request: Request, results: Results) -> Scores:
    """The predictions of finished runs.

    Raises:
        GmpipeError: the predictions of a run can't be read, or are of other images.
    """
    image_ids: list[str] | None = None
    runs: dict[str, list[np.ndarray]] = {}
    for variant, of_variant in results.items():
        for run in of_variant:
            path = run.plan.folder / PREDICTIONS_FILE
            table = _read(path)
            found: list[str] = table.column("image_id").to_pylist()
            image_ids = found if image_ids is None else image_ids
            if found != image_ids:
                raise GmpipeError(
                    f"{path} is of other images than those of the first run. Delete it, "
                    f"{path.parent} with it, and run the same command again."
                )
            flat = np.asarray(table.column("scores").combine_chunks().flatten())
            runs.setdefault(variant, []).append(flat.reshape(len(found), -1))
    assert image_ids is not None  # there is a run
    manifest = dataset_manifest(request.dataset)
    places = {image_id: place for place, image_id in enumerate(manifest.image_ids("test"))}
    truth = manifest.truth("test")[[places[image_id] for image_id in image_ids]]
    return Scores(image_ids, truth, runs)


def _read(path: Path) -> pa.Table:
    try:
        return pq.read_table(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise GmpipeError(
            f"{path} can't be read ({error}). Delete its folder, and run the same command again."
        ) from error


def metrics_of(results: Results) -> dict[str, list[dict[str, Any]]]:
    """The metrics alone."""
    return {variant: [run.metrics for run in runs] for variant, runs in results.items()}


def tables(request: Request, results: Results, intervals: Mapping[str, Interval]) -> str:
    """The tables of a data set's runs, as Markdown.

    Args:
        intervals: of `bootstrap.intervals`, against `BASE`.
    """
    runs = metrics_of(results)
    first = next(iter(runs.values()))
    vocabulary = list(first[0]["AP"])
    groups = {"all": vocabulary}
    if request.prepare.source == "scenes":
        groups = {name: list(labels) for name, labels in LABEL_GROUPS["scenes"].items()}
    paper = PAPER.get(request.dataset)
    text = f"## Results\n\n{caption(request.dataset, first)}\n\n{results_table(runs)}\n"
    if paper is not None:
        lines = "\n".join(f"- {line}" for line in paper_differences(request, results, paper))
        text += (
            f"\n## Beside the paper\n\nGM-MLIC (IJCAI 2021), {paper.title}, in percent.\n\n"
            f"{paper_table(runs, paper)}\n\nWhat differs:\n\n{lines}\n"
        )
    printed = paper.ap if paper is not None else {}
    text += f"\n## Average precision by label\n\n{labels_table(runs, groups, printed)}\n"
    rows = {
        variant: (mean_difference(runs, variant, BASE), *found.difference)
        for variant, found in intervals.items()
        if found.difference is not None
    }
    if rows:
        text += (
            f"\n## Difference to {BASE}\n\nPoints of mAP, mean over the seeds. The interval is "
            f"that of {RESAMPLES:,} resamples of the {first[0]['images']:,} test images (paired "
            f"bootstrap): what other test images would do, not other seeds.\n\n"
            f"{differences_table(rows)}\n"
        )
    return text


def caption(dataset: str, seeds: Sequence[Mapping[str, Any]]) -> str:
    """What a table of a data set's runs is of, from the metrics of one row of it."""
    first = seeds[0]
    ap = list(first["AP"].values())
    counted = sum(value is not None for value in ap)
    of_labels = ""
    if counted < len(ap):
        of_labels = f"mAP, CP and CR over the {counted} of {len(ap)} labels that have a positive; "
    of_seeds = f"seed {first['seed']}"
    if len(seeds) > 1:
        numbers = ", ".join(str(metrics["seed"]) for metrics in seeds)
        of_seeds = f"mean and sample standard deviation of seeds {numbers}"
    return (
        f"{dataset}, split {first['split']}, {first['images']} images, in percent; "
        f"{of_labels}{of_seeds}"
    )


def paper_differences(request: Request, results: Results, paper: PaperResults) -> list[str]:
    """What a reader must know who sets ours beside the paper's."""
    run = next(iter(results.values()))[0]
    counts, used = run.metrics["counts"], run.plan.settings
    train, test = paper.images
    lines = [
        _detector(request, run.recipe),
        f"images: ours {counts['train']['images']:,} to train and {run.metrics['images']:,} to "
        f"test, the paper's {train:,} and {test:,}",
        _augmentation(run),
        f"label vectors: ours {used.label_vectors}; the paper's 300-d GloVe, trained on Wikipedia",
        f"{used.epochs} epochs in batches of {used.batch_size}: the paper gives neither, nor how "
        "its epoch was chosen",
    ]
    own = _other_settings(run.plan.settings, run.recipe, paper)
    if own:
        lines.append(f"settings of {run.plan.variant} other than the paper's: {'; '.join(own)}")
    if "mAP11" in run.metrics:
        lines.append(
            "mAP: ours is the mean area under the curve; the devkit's 11-point mAP of "
            f"{run.plan.folder.name} is {run.metrics['mAP11']:.1f}. The paper does not say which "
            "it takes, and the AP that it prints have a mean of 95.2, not 94.7"
        )
    return lines


def _detector(request: Request, recipe: Recipe) -> str:
    papers = "the paper's is a pre-trained ResNet50-FPN Faster R-CNN; on what, it does not say"
    if "imported_from" in recipe:
        return f"detector: ours are imported regions ({recipe['imported_from']}); {papers}"
    if request.detector.source == "torchvision":
        ours = "torchvision's ResNet50-FPN Faster R-CNN, trained on MS-COCO and kept as it is"
    else:
        ours = f"the one that `detector.{request.dataset}` describes, kept as it is"
    return f"detector: ours is {ours}; {papers}"


def _augmentation(run: Result) -> str:
    papers = "the paper crops at random, resizes to 448 x 448 and flips, anew in each epoch"
    if "size" not in run.recipe:
        return f"augmentation: ours none; {papers}"
    ours = f"resized to {run.recipe['size']} x {run.recipe['size']}"
    if run.plan.views > 1:
        return (
            f"augmentation: ours draws one of {run.plan.views} cached views of an image, the plain "
            f"one among them, {ours}; {papers}"
        )
    return f"augmentation: ours none, {ours}; {papers}"


def _other_settings(ours: TrainSettings, recipe: Recipe, paper: PaperResults) -> list[str]:
    """Those of which the paper says another value."""
    network = ours.network
    pairs = {
        "regions": (ours.regions or recipe["regions"], paper.regions),
        "network.latent_size": (network.latent_size, 512),
        "network.modules": (network.modules, 2),
        "network.node_norm": (network.node_norm, False),
        "optimizer": (ours.optimizer, "sgd"),
        "learning_rate": (ours.learning_rate, 0.01),
        "momentum": (ours.momentum, 0.9),
        "weight_decay": (ours.weight_decay, 0.0001),
        "schedule": (ours.schedule, "step"),
        "step_epochs": (ours.step_epochs, 30),
        "beta": (ours.beta, paper.beta),
    }
    return [
        f"{name} {have} (paper: {want})" for name, (have, want) in pairs.items() if have != want
    ]
