"""Stage `report`: runs, regions and photographs -> reports/<dataset>/, a page that opens from disk.

`pipeline.report.assemble` makes the page; here its inputs are read from the checkout.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path

from ruamel.yaml import YAML

from pipeline.doubts.listing import DoubtList, read_doubts
from pipeline.errors import DamagedError, GmpipeError, MismatchError, advising
from pipeline.evaluation.runs import Runs
from pipeline.files import exists, folder_lock, matching, replacing_folder
from pipeline.learning.prediction import NotFinite
from pipeline.regions.detector import DetectorDescription, detector_of_regions
from pipeline.report.assemble import write_page
from pipeline.report.folder import PAGE
from pipeline.report.inputs import PageInputs, check_same_regions
from pipeline.report.sweeps import Sweep, read_sweep
from pipeline.shards.failures import Failure, read_failures
from pipeline.shards.index import read_index
from pipeline.shards.reader import RegionCache
from pipeline.shards.schema import Recipe
from stages.checkout.caches import advising_on_cache, open_cache
from stages.checkout.layout import (
    DOUBTS_FILE,
    SWEEP_FILE,
    SWEEP_RESULTS_FILE,
    SWEEPS,
    cache_folder,
    data_root,
    detector_folder,
    doubts_folder,
    report_folder,
    runs_folder,
    sweep_folder,
)
from stages.checkout.manifests import dataset_manifest, given_classes
from stages.checkout.params import Request, changes_of_variant
from stages.checkout.plans import refill_command
from stages.checkout.results import load_entries, load_runs, load_scores
from stages.checkout.times import read_times
from stages.console.messages import note
from stages.console.progress import progress_phase


def report(
    request: Request, variants: Sequence[str], seeds: Sequence[int], *, images: int
) -> tuple[str, Path]:
    """Write the page of variants x seeds.

    Args:
        images: how many test images the gallery shows at most; of more, it shows a random sample.

    Returns:
        the tables, and the path of the page.

    Raises:
        MissingError, DamagedError, MismatchError: as `load_runs`, `load_scores` and
            `load_entries`, or the cache is not the one that the runs were trained on.
        NotFinite: a score that a run computes for the gallery is nan or infinite.
    """
    inputs = _read_inputs(request, variants, seeds, images)
    folder = report_folder(request.dataset)
    again = (
        "Restore its checkpoint, or train and evaluate it again: `gmpipe train` and `gmpipe "
        "evaluate`. If that does not help, check the regions: `gmpipe cache verify --dataset "
        f"{request.dataset}`."
    )
    with (
        advising(again, NotFinite),
        folder_lock(folder),
        replacing_folder(folder) as temporary,
    ):
        text = write_page(temporary, inputs, _phase)
    return text, folder / PAGE


def _phase(
    name: str, total: int | None, unit: str
) -> AbstractContextManager[Callable[[int], object]]:
    return progress_phase(f"report, {name}", total, unit)


def _read_inputs(
    request: Request, variants: Sequence[str], seeds: Sequence[int], images: int
) -> PageInputs:
    runs = load_runs(request, variants, seeds)
    recipe = next(iter(runs.values()))[0].recipe
    manifest = dataset_manifest(request.dataset)
    entries, scores = load_entries(request, load_scores(request, runs))
    return PageInputs(
        manifest=manifest,
        source=request.prepare.source,
        root=data_root(request.dataset),
        detector=_detector(request.dataset, recipe),
        cache=_open_cache(request.dataset, runs),
        failures=_failures(request.dataset),
        runs=runs,
        scores=scores,
        sweeps=_finished_sweeps(request.dataset),
        doubts=_doubts(request.dataset),
        times=_times(request.dataset, runs),
        settings=_settings(request, list(runs)),
        images=images,
        given_classes=given_classes(request, manifest, recipe),
        entries=entries,
    )


def _detector(dataset: str, recipe: Recipe) -> DetectorDescription | None:
    with advising(f"Run `gmpipe detector --dataset {dataset}`.", DamagedError):
        return detector_of_regions(detector_folder(dataset), recipe)


def _open_cache(dataset: str, runs: Runs) -> RegionCache:
    """Open the cache that the runs, which share one, were evaluated on."""
    run = next(iter(runs.values()))[0]
    cache = open_cache(dataset)
    with advising(
        "Train and evaluate again, or restore the regions with the settings used at that time: "
        f"`{refill_command(run.recipe, dataset)} --replace`.",
        MismatchError,
    ):
        check_same_regions(run, cache)
    return cache


def _failures(dataset: str) -> dict[str, Failure]:
    with advising_on_cache(dataset):
        return read_failures(cache_folder(dataset))


def _finished_sweeps(dataset: str) -> list[Sweep]:
    """The sweeps that have their numbers; one that was killed has none yet.

    Raises:
        DamagedError: the numbers of a sweep can't be read, or are those of another one.
    """
    sweeps = []
    for folder in matching(runs_folder(dataset) / SWEEPS, "[!.]*"):
        path = folder / SWEEP_FILE
        if not exists(path):
            if exists(folder / SWEEP_RESULTS_FILE):
                note(f"{folder} has no {SWEEP_FILE}, so the page leaves it out. {_again(folder)}")
            continue
        with advising(_again(folder), DamagedError):
            sweep = read_sweep(path)
            if sweep_folder(sweep.dataset, sweep.variant, sweep.setting) != folder:
                raise DamagedError(
                    f"{path} is of another sweep: {sweep.setting} of {sweep.variant} on "
                    f"{sweep.dataset}."
                )
        try:
            check_sweep(sweep)
        except MismatchError as error:
            note(f"{error.problem} The page leaves it out. {error.remedy}")
            continue
        sweeps.append(sweep)
    return sweeps


def check_sweep(sweep: Sweep) -> None:
    """Check that a sweep's runs have the regions and labels that the checkout has now.

    A manifest or a cache that can't be read is not compared: its own check says what is wrong.

    Raises:
        MismatchError: the sweep has other ones.
    """
    folder = sweep_folder(sweep.dataset, sweep.variant, sweep.setting)
    _check_current(sweep, folder, _again(folder))


def _doubts(dataset: str) -> DoubtList | None:
    """The list of doubtful labels, if there is one of the labels and regions of today.

    Raises:
        DamagedError: it can't be read.
    """
    path = doubts_folder(dataset) / DOUBTS_FILE
    if not exists(path):
        return None
    with advising(
        f"Delete {path}. `gmpipe doubts`, with the same options, makes it again.", DamagedError
    ):
        found = read_doubts(path)
    try:
        check_doubts(found)
    except MismatchError as error:
        note(f"{error.problem} The page leaves it out. {error.remedy}")
        return None
    return found


def check_doubts(found: DoubtList) -> None:
    """Check that a list of doubtful labels is of the labels and regions that the checkout has now.

    Raises:
        MismatchError: as `check_sweep`.
    """
    folder = doubts_folder(found.dataset)
    options = f"--dataset {found.dataset} --variant {found.variant}"
    options += f" --folds {found.folds} --seed {found.seed}"
    _check_current(found, folder, f"Run `gmpipe doubts {options}` again.")


def _check_current(found: Sweep | DoubtList, folder: Path, remedy: str) -> None:
    """Check that something was made of the regions and labels that the checkout has now.

    Raises:
        MismatchError: it was made of other ones.
    """
    today: dict[str, str] = {}
    with suppress(GmpipeError, OSError):
        today["fingerprint"] = read_index(cache_folder(found.dataset)).fingerprint
    with suppress(GmpipeError, OSError):
        manifest = dataset_manifest(found.dataset)
        today |= {"train_sha256": manifest.train_sha256, "test_sha256": manifest.test_sha256}
    for name, expected in today.items():
        if (made_of := getattr(found, name)) != expected:
            raise MismatchError(
                f"{folder} is out of date: it was made with the {name} {made_of}, but the checkout "
                f"now has {expected}.",
                remedy,
            )


def _again(folder: Path) -> str:
    return f"Run that sweep again with `gmpipe sweep`, or delete {folder}."


def _times(dataset: str, runs: Runs) -> list[list[str]]:
    """For each stage of the data set and of these runs: stage, what of, seconds, when it ended."""
    names = {run.name for seeds in runs.values() for run in seeds}
    return [
        [
            time.stage,
            time.run or (f"{time.rows:,} rows" if time.rows is not None else dataset),
            f"{time.seconds:,.1f}",
            time.finished,
        ]
        for time in read_times(dataset)
        if not time.run or time.run in names
    ]


def _settings(request: Request, variants: Sequence[str]) -> str:
    """The data set's settings as YAML, with what each of the variants changes."""
    blocks = {
        "prepare": request.prepare,
        "detector": request.detector,
        "extract": request.extract,
        "train": request.train,
    }
    shown = {name: block.model_dump(mode="json") for name, block in blocks.items()}
    del shown["train"]["variants"]
    shown["variants"] = {name: changes_of_variant(request.train, name) for name in variants}
    yaml = YAML()
    yaml.default_flow_style = False
    stream = io.StringIO()
    yaml.dump(shown, stream)
    return stream.getvalue()
