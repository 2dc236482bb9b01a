"""Plans of runs: what a run is, what it reads, and where its results go."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pipeline.datasets.manifest import Manifest, read_manifest
from pipeline.errors import (
    DamagedError,
    GmpipeError,
    InputError,
    MismatchError,
    MissingError,
    advising,
)
from pipeline.formats.text import counted, first_few
from pipeline.labels.vectors import LabelVectors, load_label_vectors
from pipeline.learning.checkpoint import Checkpoint, load_checkpoint
from pipeline.learning.splits import check_regions, check_whole, training_size, validation_size
from pipeline.settings import TrainSettings, difficult_settings
from pipeline.shards.failures import read_failures
from pipeline.shards.index import read_index
from pipeline.shards.reader import RegionCache
from pipeline.shards.schema import Recipe, fingerprint
from stages.checkout.caches import fill_command, open_cache
from stages.checkout.keys import differing, flat, shown_differences
from stages.checkout.layout import CHECKPOINT_FILE, cache_folder, manifest_file, run_folder
from stages.checkout.manifests import changed_treatment, dataset_manifest
from stages.checkout.params import Request, unreached, unread_by_runs
from stages.console.messages import note
from stages.console.progress import progress_phase

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunPlan:
    """What a run is made from, and where its results go.

    Attributes:
        dataset, variant, seed: which identify the run.
        source: of the data set, as in its settings.
        settings: the variant's own.
        views: number of views of each training image.
        folder: of the results.
        arguments: of the command line that asks for this run.
    """

    dataset: str
    variant: str
    seed: int
    source: str
    settings: TrainSettings
    views: int
    folder: Path
    arguments: tuple[str, ...]

    @property
    def options(self) -> str:
        """`arguments`, quoted for a shell."""
        return shlex.join(self.arguments)


def plan_run(request: Request, variant: str, seed: int) -> RunPlan:
    """Plan a run of a data set. A run with overridden settings gets a folder of its own."""
    settings = request.variant(variant)
    views = request.extract.views
    overridden = None
    if request.is_overridden(variant):
        overridden = {"train": settings.model_dump(mode="json"), "views": views}
    folder = run_folder(request.dataset, variant, seed, overridden)
    arguments = ["--dataset", request.dataset, "--variant", variant, "--seed", str(seed)]
    arguments += request.set_options
    source = request.prepare.source
    return RunPlan(
        request.dataset, variant, seed, source, settings, views, folder, tuple(arguments)
    )


def open_inputs(
    dataset: str, settings: TrainSettings
) -> tuple[Manifest, RegionCache, LabelVectors]:
    """Open what training and evaluation read of a data set.

    Raises:
        MissingError, DamagedError: the manifest or the region cache is missing or damaged.
        GmpipeError: as `load_label_vectors`.
    """
    manifest = dataset_manifest(dataset)
    cache = open_cache(dataset)
    _log.info(
        "read the index of %s: %d rows in %d shards", cache.folder, len(cache), len(cache.shards)
    )
    with progress_phase("read label vectors"):  # of GloVe, a file of up to 6 GB
        vectors = load_label_vectors(manifest.vocabulary, settings.label_vectors)
    _log.info("read the vectors of %d labels from %s", len(vectors.names), vectors.source)
    return manifest, cache, vectors


def read_checkpoint(plan: RunPlan) -> Checkpoint:
    """Read the checkpoint of a run that was trained as planned.

    Raises:
        MissingError, DamagedError: as `load_checkpoint`.
        MismatchError: it was trained with other settings.
    """
    with advising(f"Run {run_commands(plan)}.", MissingError, DamagedError):
        checkpoint = load_checkpoint(plan.folder / CHECKPOINT_FILE)
    of_checkpoint = (checkpoint.dataset, checkpoint.variant, checkpoint.seed)
    if of_checkpoint != (plan.dataset, plan.variant, plan.seed):
        raise MismatchError(
            f"{plan.folder / CHECKPOINT_FILE} is of the run of {checkpoint.dataset!r}, variant "
            f"{checkpoint.variant!r}, seed {checkpoint.seed}.",
            f"Restore the checkpoint of this run, or run {run_commands(plan)}.",
        )
    if differences := differing_settings(checkpoint, plan.settings, plan.views):
        raise MismatchError(
            f"{plan.folder} was trained with other settings: {shown_differences(differences)}.",
            f"Run `dvc repro`, or {run_commands(plan)}.",
        )
    return checkpoint


def differing_settings(
    checkpoint: Checkpoint, settings: TrainSettings, views: int
) -> dict[str, tuple[object, object]]:
    """Return the settings in which a checkpoint's differ from others, see `differing`."""
    used = {**checkpoint.settings.model_dump(), "views": checkpoint.views}
    return differing(used, {**settings.model_dump(), "views": views})


def check_training_rows(
    checkpoint: Checkpoint, manifest: Manifest, cache: RegionCache, path: Path, remedy: str
) -> None:
    """Check that a run was trained on the training split of today, so on none of its test images.

    Args:
        checkpoint: of the run.
        manifest, cache: of its data set, as they are today.
        path: of the checkpoint.
        remedy: the next step if it was not.

    Raises:
        MismatchError: it was trained on other images, or on other labels of them.
    """
    today = manifest.train_sha256
    if checkpoint.train_sha256 != today:
        if changed := changed_treatment(manifest, "train_sha256", checkpoint.train_sha256):
            raise MismatchError(
                f"{path} was trained under another protocol for difficult labels than that of "
                f"{manifest_file(manifest.dataset)}: {changed}.",
                f"{remedy} Or change that back in params.yaml, and run `gmpipe prepare --dataset "
                f"{manifest.dataset}`.",
            )
        raise MismatchError(
            f"{path} was trained on another training split (an image, its split or "
            "one of its labels has changed since, in `val` too if there is one): "
            f"{counted(checkpoint.trained_images, 'image')} with the sha256 "
            f"{checkpoint.train_sha256}. A training would now use "
            f"{counted(_trainable(checkpoint.settings, manifest, cache), 'image')}, and the sha256 "
            f"is {today}.{_other_images(checkpoint, manifest, cache)} Images of the test split may "
            "be among those that it was trained on.",
            remedy,
        )


def _trainable(settings: TrainSettings, manifest: Manifest, cache: RegionCache) -> int:
    """How many images a training would use now, counted as `Checkpoint.trained_images`."""
    failures = read_failures(cache.folder)
    images = sum(image_id not in failures for image_id in manifest.image_ids("train"))
    if not images:
        return 0
    if settings.validation and "val" not in manifest.splits:
        images -= validation_size(images, settings.validation)
    return training_size(images, settings.training_share)


def _other_images(checkpoint: Checkpoint, manifest: Manifest, cache: RegionCache) -> str:
    """Sentences, after a blank, on how the images differ from those that a run was made of.

    Nothing holds the images of a run, but its cache does; empty if the cache is another one now.
    """
    if fingerprint(checkpoint.recipe) != cache.fingerprint:
        return ""
    before = dict.fromkeys([*read_failures(cache.folder), *cache.ids])
    now = dict.fromkeys(manifest.table.column("image_id").to_pylist())
    gone = [repr(image_id) for image_id in before if image_id not in now]
    new = [repr(image_id) for image_id in now if image_id not in before]
    said = f" The data set no longer has {first_few(gone)}." if gone else ""
    if new:
        said += f" New in it: {first_few(new)}."
    return said or " It has the same images, so their labels or splits differ."


def run_commands(plan: RunPlan, *names: str) -> str:
    """The commands, by default `train` and `evaluate`, that make a run."""
    return " and ".join(
        f"`gmpipe {name} {plan.options}`" for name in names or ("train", "evaluate")
    )


def refill_command(recipe: Recipe, dataset: str) -> str:
    """The command that writes regions of a recipe to the cache."""
    return fill_command(dataset, imported="imported_from" in recipe)


def check_run_regions(runs: Sequence[RunPlan], cache: RegionCache) -> None:
    """Check that the cache holds what runs read: enough regions, and the whole views' vectors.

    Args:
        runs: of one data set.
        cache: of that data set.

    Raises:
        InputError: it holds fewer regions per image, or it lacks vectors that a head reads.
    """
    dataset = runs[0].dataset
    refill = f"`{refill_command(cache.recipe, dataset)} --replace`"
    remedy = (
        f"Lower train.{dataset}.regions to {cache.regions}, or raise extract.{dataset}.regions and "
        f"run {refill}."
    )
    with advising(remedy, InputError):
        for run in runs:
            check_regions(cache, dataset, run.settings.regions)
    # Of the runs of one variant, which a sweep changes, one that reads them comes last.
    reading_last = sorted(runs, key=lambda run: run.settings.network.needs_whole)
    variants = {run.variant: run.settings for run in reading_last}
    if "imported_from" in cache.recipe:
        remedy = (
            f"Import a file that has the array `whole`, with extract.{dataset}.whole true: "
            f"{refill}. Files of bottom-up attention have no such array."
        )
    else:
        remedy = f"Set `extract.{dataset}.whole: true` in params.yaml, and run {refill}."
    others = [name for name, settings in variants.items() if not settings.network.needs_whole]
    if others:
        remedy += f" Or leave them out: `--heads {','.join(others)}` names the other variants."
    with advising(remedy, InputError):
        check_whole(cache, dataset, variants)


_OF_REGIONS = (
    "boxes",
    "regions",
    "size",
    "score_threshold",
    "nms_threshold",
    "feature_dtype",
    "views",
)


def note_other_regions(request: Request) -> None:
    """Print a note if params.yaml asks for other regions than those in the cache.

    Runs read the cache. Nothing is printed for imported regions, nor where the index can't be read:
    the command that needs it reports that.
    """
    try:
        recipe = {"boxes": "detector", **read_index(cache_folder(request.dataset)).recipe}
    except GmpipeError:
        return
    asked = request.extract_in_file
    differences = [
        f"{name} {recipe[name]} (params.yaml: {getattr(asked, name)})"
        for name in _OF_REGIONS
        # A value that --set gives is asked for too; `note_unused_overrides` reports others.
        if name in recipe
        and recipe[name] not in (getattr(asked, name), getattr(request.extract, name))
    ]
    if differences and "imported_from" not in recipe:
        note(
            f"the cache of {request.dataset} was made with other settings than params.yaml has: "
            f"{', '.join(differences)}. Runs read the cache as it is; to extract the regions that "
            f"params.yaml describes, run `gmpipe extract --dataset {request.dataset} --replace`."
        )


def note_other_treatments(request: Request) -> None:
    """Print a note if the manifest treats difficult labels otherwise than params.yaml says.

    Runs read the manifest. Nothing is printed where it can't be read: the command that needs it
    reports that.
    """
    dataset = request.dataset
    with suppress(GmpipeError, OSError):
        in_file = request.params_in_file.prepare.get(dataset, request.prepare)
        # A value that --set gives is asked for too; `note_unused_overrides` reports others.
        asked, also = difficult_settings(in_file), difficult_settings(request.prepare)
        differences = [
            f"{split} {treatment} (params.yaml: {getattr(asked, split)})"
            for split, treatment in read_manifest(manifest_file(dataset)).treatments.items()
            if treatment not in (getattr(asked, split), getattr(also, split))
        ]
        if differences:
            note(
                f"{manifest_file(dataset)} was made with another `prepare.{dataset}.difficult` "
                f"than params.yaml has: {', '.join(differences)}. Runs read the manifest as it is; "
                f"to change it, run `gmpipe prepare --dataset {dataset}`."
            )


def note_unused_overrides(request: Request, variants: Sequence[str]) -> None:
    """Print a note for each `--set` option that runs ignore, or that a variant overrides itself."""
    for key in unread_by_runs(request):
        note(f"runs on {request.dataset} do not read `{key}`, so this --set has no effect.")
    for variant in variants:
        for key in unreached(request, variant):
            why, remedy = why_unreached(request, variant, key)
            own = f"--set train.{request.dataset}.variants.{variant}.{key}=..."
            note(
                f"the variant {variant} {why}, so this --set has no effect on it. "
                f"{remedy or f'Use `{own}`.'}"
            )


def why_unreached(request: Request, variant: str, key: str) -> tuple[str, str]:
    """Why a variant does not take an overridden setting, as the rest of a sentence; and a remedy.

    Args:
        key: one of those that `unreached` gives.

    Returns:
        the reason, and what to do; empty if the variant has the setting and can change it.
    """
    settings = request.variant(variant)
    head = settings.network.head
    if key == "network.head":
        return f"has the head `{head}`", "Choose a variant of the other head."
    if key in flat(settings.model_dump()):
        return f"sets `{key}` itself", ""
    kind = (
        f"the head `{head}`" if key.startswith("network.") else f"the loss `{settings.loss.name}`"
    )
    return (
        f"has {kind}, which has no setting `{key}`",
        "Leave the option out, or choose another variant.",
    )
