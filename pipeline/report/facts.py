"""What was run: the page's last section."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from pipeline.datasets.difficult import describe_treatments
from pipeline.datasets.manifest import Manifest
from pipeline.evaluation.differences import describe_detector
from pipeline.evaluation.entries import EntryEvaluation
from pipeline.evaluation.metrics import Evaluation
from pipeline.report.inputs import PageInputs

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


def what_was_run(inputs: PageInputs) -> dict[str, Any]:
    """The section's data: facts about data and runs, versions of packages, and the settings."""
    return {
        "facts": _facts(inputs),
        "packages": [("python", platform.python_version()), *map(_version, _PACKAGES)],
        "settings": inputs.settings.split("\n"),
    }


def _facts(inputs: PageInputs) -> list[tuple[str, str]]:
    manifest, run = inputs.manifest, inputs.shown
    entries = [entry.evaluation for entry in inputs.entries]
    commits = {_commit(one) for seeds in inputs.evaluations.values() for one in seeds}
    return [
        ("data set", manifest.dataset),
        ("split", run.evaluation.split),
        *(
            (
                f"images of {split}",
                f"{counts['images']:,} (listed {counts['listed']:,}, missing "
                f"{counts['missing']:,}, unlabelled {counts['unlabelled']:,})",
            )
            for split, counts in manifest.counts.items()
        ),
        ("images left out, since they have no regions", _left_out(inputs)),
        ("labels", str(len(manifest.vocabulary))),
        *_difficult(manifest),
        ("regions made by", describe_detector(inputs.detector, run.recipe)),
        ("head of each network", _heads(inputs)),
        *((f"scores of {one.name}", one.describe()) for one in entries),
        ("label vectors", run.settings.label_vectors),
        ("regions per image", str(run.settings.regions or run.recipe["regions"])),
        ("fingerprint of the regions", run.evaluation.fingerprint),
        ("commit of the runs", ", ".join(sorted(commits))),
    ]


def _difficult(manifest: Manifest) -> list[tuple[str, str]]:
    """What the difficult labels count as and how many there are; empty if there are none."""
    if not manifest.treatments:
        return []
    counts = ", ".join(
        f"{count:,} of {split}" for split, count in manifest.difficult_counts.items()
    )
    return [("difficult labels", f"{describe_treatments(manifest.treatments)} ({counts})")]


def _heads(inputs: PageInputs) -> str:
    """The head of each variant, such as `full: gm-mlic`."""
    variants = (variant for variant in inputs.variants if variant in inputs.runs)
    heads = {variant: inputs.runs[variant][0].settings.network.head for variant in variants}
    return ", ".join(f"{variant}: {head}" for variant, head in heads.items())


def _commit(evaluation: Evaluation | EntryEvaluation) -> str:
    """The commit of the code that evaluated a run, and whether that says all about the code."""
    if evaluation.commit is None:
        return "none"
    return evaluation.commit + (" with uncommitted changes" if evaluation.uncommitted else "")


def _left_out(inputs: PageInputs) -> str:
    """How many images of each split have no regions: they could not be decoded or imported."""
    counts = {
        split: sum(image_id in inputs.failures for image_id in inputs.manifest.image_ids(split))
        for split in inputs.manifest.splits
    }
    return ", ".join(f"{count} of {split}" for split, count in counts.items())


def _version(package: str) -> tuple[str, str]:
    try:
        return package, version(package)
    except PackageNotFoundError:  # gmpipe itself, where it runs without being installed
        return package, "not installed"
