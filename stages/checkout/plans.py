"""What a run is, what it reads, and where it goes."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.datasets.manifest import Manifest
from pipeline.errors import GmpipeError
from pipeline.labels.vectors import LabelVectors, load_label_vectors
from pipeline.settings import TrainSettings
from pipeline.shards.index import read_index
from pipeline.shards.reader import RegionCache
from stages.checkout.caches import open_cache
from stages.checkout.layout import cache_folder, run_folder
from stages.checkout.manifests import dataset_manifest
from stages.checkout.params import Request, unreached, unread_by_runs
from stages.console.messages import note

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunPlan:
    """What a run is made from, and where it goes.

    Attributes:
        dataset, variant, seed: what the run is.
        settings: the variant's own.
        views: of each training image.
        folder: where it goes.
        options: of the command line that asks for this run.
    """

    dataset: str
    variant: str
    seed: int
    settings: TrainSettings
    views: int
    folder: Path
    options: str


def plan_run(request: Request, variant: str, seed: int) -> RunPlan:
    """Plan a run of a data set; a run with overridden settings gets a folder of its own."""
    own = request.variant(variant)
    views = request.extract.views
    different = None
    if request.is_overridden(variant):
        different = {"train": own.model_dump(mode="json"), "views": views}
    folder = run_folder(request.dataset, variant, seed, different)
    options = ["--dataset", request.dataset, "--variant", variant, "--seed", str(seed)]
    for override in request.overrides:
        options += ["--set", override]
    return RunPlan(request.dataset, variant, seed, own, views, folder, shlex.join(options))


def open_inputs(
    dataset: str, settings: TrainSettings
) -> tuple[Manifest, RegionCache, LabelVectors]:
    """What training and evaluation read of a data set."""
    manifest = dataset_manifest(dataset)
    cache = open_cache(dataset)
    _log.info(
        "read the index of %s: %d rows in %d shards", cache.folder, len(cache), len(cache.shards)
    )
    vectors = load_label_vectors(manifest.vocabulary, settings.label_vectors)
    _log.info("read the vectors of %d labels from %s", len(vectors.names), vectors.source)
    return manifest, cache, vectors


_OF_REGIONS = ("regions", "size", "score_threshold", "nms_threshold", "feature_dtype", "views")


def note_other_regions(request: Request) -> None:
    """Tell that params.yaml asks for other regions than the cache holds, which runs read.

    Nothing is said of imported regions, nor where no index can be read: the command that needs it
    says so.
    """
    try:
        recipe = read_index(cache_folder(request.dataset)).recipe
    except GmpipeError:
        return
    asked = request.extract_in_file  # of `--set` tells another note
    differences = [
        f"{name} {recipe[name]}, params.yaml asks for {getattr(asked, name)}"
        for name in _OF_REGIONS
        if name in recipe and recipe[name] != getattr(asked, name)
    ]
    if differences and "imported_from" not in recipe:
        note(
            f"the cache of {request.dataset} has {'; '.join(differences)}. Runs read the cache: "
            f"`gmpipe extract --dataset {request.dataset} --replace` makes it what is asked for."
        )


def note_unused_overrides(request: Request, variants: Sequence[str]) -> None:
    """Note which `--set` options a run of stage two ignores, and which a variant overrides."""
    for key in unread_by_runs(request):
        note(f"a run on {request.dataset} does not read `{key}`: this --set changes nothing.")
    for variant in variants:
        for key in unreached(request, variant):
            own = f"train.{request.dataset}.variants.{variant}.{key}"
            note(
                f"{variant} has a `{key}` of its own, which this --set does not change; "
                f"--set {own}=... does."
            )
