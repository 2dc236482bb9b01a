"""Command `verify`: whether what lies in a checkout is sound, and of one piece.

Nothing is changed. A thing is damaged if its bytes are not those that were written, and out of date
if it is sound, but was made from something else than what params.yaml or the checkout has now.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar

from pipeline.datasets.manifest import Manifest, read_boxes
from pipeline.errors import AccessError, DamagedError, GmpipeError, MismatchError, MissingError
from pipeline.evaluation.metrics import Evaluation, read_evaluation
from pipeline.evaluation.predictions import read_logits
from pipeline.evaluation.tables import as_csv
from pipeline.files import access_error, read_bytes
from pipeline.formats.sealed import read_sealed_json
from pipeline.labels.vectors import load_label_vectors
from pipeline.learning.checkpoint import Checkpoint, load_checkpoint
from pipeline.machine import cores
from pipeline.regions.detector import DESCRIPTION_FILE
from pipeline.regions.plan import PlannedImages, ViewPlan, image_digests
from pipeline.report.sweeps import read_sweep
from pipeline.shards.failures import FAILURES_NAME, read_failures
from pipeline.shards.index import INDEX_NAME, Index, read_index
from pipeline.shards.schema import IMAGES
from pipeline.shards.shard import read_header
from pipeline.tensors import load_state
from stages.checkout.caches import advising_on_cache
from stages.checkout.layout import (
    CHECKPOINT_FILE,
    HISTORY_FILE,
    LAST_GOOD_FILE,
    METRICS_FILE,
    PREDICTIONS_FILE,
    SETTINGS_FILE,
    SUMMARY_FILE,
    SWEEP_FILE,
    SWEEP_RESULTS_FILE,
    SWEEPS,
    boxes_file,
    cache_folder,
    data_root,
    detector_folder,
    manifest_file,
    report_folder,
    runs_folder,
    settings_folder,
    times_file,
)
from stages.checkout.manifests import dataset_manifest
from stages.checkout.models import dataset_detector
from stages.checkout.params import Request, has_variant, variant_settings
from stages.checkout.remedies import advising
from stages.checkout.resolved import outdated_variant_settings, read_run_settings
from stages.checkout.times import damaged_lines, read_times
from stages.commands.cache import verify as verify_cache
from stages.console.progress import progress_bar

Status = Literal["sound", "damaged", "unreadable", "out of date", "missing"]

_T = TypeVar("_T")

_LINES = 10  # of a list of damages
_BAD: tuple[Status, ...] = ("damaged", "unreadable")


@dataclass(frozen=True)
class Finding:
    """What was found about a thing: its path, its status, and why, with the next step."""

    thing: Path
    status: Status
    about: str

    def __str__(self) -> str:
        return f"{self.thing}: {self.status}{f': {self.about}' if self.about else ''}"


def verify(request: Request, *, images: bool) -> tuple[str, bool]:
    """Look at everything that was made for a data set.

    Args:
        request: of the data set.
        images: also hash the photographs, and compare them with the cache.

    Returns:
        a line for each thing and one for all of them; and whether nothing is damaged.
    """
    findings: list[Finding] = []
    with progress_bar(desc="verify", unit="thing") as bar:
        for finding in _findings(request, images=images):
            findings.append(finding)
            bar.update()
    count = {status: sum(one.status == status for one in findings) for status in _ORDER}
    said = ", ".join(f"{number} {status}" for status, number in count.items() if number)
    lines = [*map(str, findings), f"{request.dataset}: {said}"]
    return "\n".join(lines), not any(count[status] for status in _BAD)


_ORDER: tuple[Status, ...] = ("sound", "out of date", "missing", *_BAD)


def _look(thing: Path, check: Callable[[], str]) -> Finding:
    """Check a thing; ``check`` says what it is, or raises what is wrong with it."""
    try:
        return Finding(thing, "sound", check())
    except MissingError as error:
        return Finding(thing, "missing", _brief(error))
    except MismatchError as error:
        return Finding(thing, "out of date", _brief(error))
    except AccessError as error:
        return Finding(thing, "unreadable", _brief(error))
    except GmpipeError as error:
        return Finding(thing, "damaged", _brief(error))
    except OSError as error:
        return Finding(thing, "unreadable", _brief(access_error(error)))


def _brief(error: GmpipeError) -> str:
    """An error in one line."""
    first, *others = error.problem.splitlines()
    if len(others) > _LINES:
        others[_LINES:] = [f"and {len(others) - _LINES} more"]
    return " ".join([*map(str.strip, [first, *others]), error.remedy]).strip()


def _findings(request: Request, *, images: bool) -> Iterator[Finding]:
    dataset = request.dataset
    yield from _prepared(request)
    folder = detector_folder(dataset)
    if request.detector.source != "imported":
        yield _look(folder, lambda: f"sha256 {dataset_detector(dataset).weights_sha256}")
    elif _there(folder):
        yield _look(folder, lambda: _no_detector(folder))
    yield from _cached(request, images=images)
    today, runs = _Today(dataset), runs_folder(dataset)
    yield from _each(runs, lambda run: _RunFiles(request, today, run).findings())
    yield from _each(runs / SWEEPS, _of_sweep)
    yield from _each(Path(".state"), _of_state)
    if _there(times_file(dataset)):
        yield _look(times_file(dataset), lambda: _times(dataset))
    page = report_folder(dataset)
    if _there(page):
        yield _look(page, lambda: _readable(page))


def _there(path: Path) -> bool:
    """Whether there is something, be it a broken link or something that can't be looked at."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True
    return True


def _each(folder: Path, look: Callable[[Path], Iterator[Finding]]) -> Iterator[Finding]:
    """Look at each entry of a folder, if there is one."""
    try:
        entries = sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        yield Finding(folder, "unreadable", _brief(access_error(error)))
        return
    for entry in entries:
        if not entry.name.startswith("."):  # locks
            yield from look(entry)


# What is made of the data set --------------------------------------------------------------------


def _prepared(request: Request) -> Iterator[Finding]:
    dataset = request.dataset

    def manifest() -> str:
        found = dataset_manifest(dataset)
        return f"{len(found)} images, {len(found.vocabulary)} labels"

    yield _look(manifest_file(dataset), manifest)
    prepare = f"Run `gmpipe prepare --dataset {dataset}`."
    boxes = boxes_file(dataset)
    if _there(boxes):

        def of_boxes() -> str:
            with advising(prepare, GmpipeError):
                return f"{len(read_boxes(boxes, []).classes)} classes"

        yield _look(boxes, of_boxes)
    folder = settings_folder(dataset)
    if _there(folder):

        def settings() -> str:
            if paths := outdated_variant_settings(request):
                raise MismatchError(
                    f"{len(paths)} files are not what params.yaml describes, the first is "
                    f"{paths[0].name}.",
                    prepare,
                )
            return "as params.yaml describes them"

        yield _look(folder, settings)


def _cached(request: Request, *, images: bool) -> Iterator[Finding]:
    dataset = request.dataset
    folder = cache_folder(dataset)
    yield _look(folder, lambda: verify_cache(request, repair=False).removeprefix(f"{folder}: "))
    if _there(folder / FAILURES_NAME):

        def failures() -> str:
            with advising_on_cache(dataset):
                return f"{len(read_failures(folder))} images without regions"

        yield _look(folder / FAILURES_NAME, failures)
    if images and _there(folder / INDEX_NAME) and request.detector.source != "imported":
        yield _look(data_root(dataset), lambda: _photographs(request))


def _photographs(request: Request) -> str:
    """Compare the photographs with those that the shards were extracted from."""
    dataset = request.dataset
    manifest, index = dataset_manifest(dataset), read_index(cache_folder(dataset))
    with progress_bar(total=len(manifest), desc="hash images", unit="image") as bar:
        digests = image_digests(
            manifest,
            data_root(dataset),
            contents=request.extract.hash_images,
            threads=cores(),
            on_images=bar.update,
        )
    wanted = PlannedImages(ViewPlan(manifest, request.extract.views), digests)
    changed = [
        shard.name
        for number, shard in enumerate(index.shards)
        if not _of_these_images(cache_folder(dataset) / shard.name, index, number, wanted)
    ]
    if changed:
        raise MismatchError(
            f"{len(changed)} of {len(index.shards)} shards are of other photographs, the first is "
            f"{changed[0]}.",
            "Restore the photographs, or extract their regions again: "
            f"`gmpipe extract --dataset {dataset} --replace`.",
        )
    return f"{len(manifest)} photographs, those of the cache"


def _of_these_images(path: Path, index: Index, number: int, wanted: PlannedImages) -> bool:
    rows = index.shard == number
    numbers = wanted.numbers([stored.decode() for stored in index.image_ids[rows].tolist()])
    recorded: object = read_header(path).recipe[IMAGES]
    return bool((numbers >= 0).all()) and wanted.digest(numbers, index.views[rows]) == recorded


# Runs --------------------------------------------------------------------------------------------


class _RunFiles:
    """The files of a run, which belong together."""

    def __init__(self, request: Request, today: _Today, folder: Path) -> None:
        self.request = request
        self.today = today
        self.folder = folder
        # Read once, when the first file asks for them.
        self.settings: Callable[[], Mapping[str, Any]] = cache(lambda: read_run_settings(folder))
        self.checkpoint: Callable[[], Checkpoint] = cache(
            lambda: load_checkpoint(folder / CHECKPOINT_FILE)
        )
        self.evaluation: Callable[[], Evaluation] = cache(
            lambda: read_evaluation(folder / METRICS_FILE)
        )

    def findings(self) -> Iterator[Finding]:
        """Yield a finding for each file that is there, and for a checkpoint that is not."""
        checks: Sequence[tuple[str, Callable[[], str], tuple[str, ...]]] = (
            (SETTINGS_FILE, self._settings, ("train",)),
            (CHECKPOINT_FILE, self._checkpoint, ("train", "evaluate")),
            (HISTORY_FILE, self._history, ("train",)),
            (METRICS_FILE, self._metrics, ("evaluate",)),
            (SUMMARY_FILE, self._summary, ("evaluate",)),
            (PREDICTIONS_FILE, self._predictions, ("evaluate",)),
            (LAST_GOOD_FILE, self._last_good, ("train",)),
        )
        if not any(_there(self.folder / name) for name, _, _ in checks):
            return
        for name, check, commands in checks:
            path = self.folder / name
            if _there(path) or name == CHECKPOINT_FILE:
                yield _look(path, self._advising(check, commands))

    def _advising(self, check: Callable[[], str], commands: tuple[str, ...]) -> Callable[[], str]:
        def advised() -> str:
            with advising(self._again(commands), GmpipeError):
                return check()

        return advised

    def _again(self, commands: tuple[str, ...]) -> str:
        """The commands that make a file of this run again."""
        stem, _, seed = self.folder.name.partition("-s")
        options = f"--dataset {self.request.dataset} --variant {stem} --seed {seed}"
        more = ""
        if "-" in seed:  # the hash of settings that differ from params.yaml
            options = f"--dataset {self.request.dataset} --variant {stem} --seed {seed[:-9]}"
            more = " with the same `--set` options"
        return f"Run {' and '.join(f'`gmpipe {name} {options}`' for name in commands)}{more}."

    def _settings(self) -> str:
        used = self.settings()
        return f"{used['variant']}, seed {used['seed']}"

    def _checkpoint(self) -> str:
        found = self.checkpoint()
        if _there(self.folder / SETTINGS_FILE):
            used = self.settings()
            trained = {
                "dataset": found.dataset,
                "variant": found.variant,
                "seed": found.seed,
                "settings": found.settings.model_dump(mode="json", exclude={"variants"}),
                "views": found.views,
            }
            if different := [name for name in trained if used.get(name) != trained[name]]:
                raise MismatchError(
                    f"it was trained with another `{different[0]}` than {SETTINGS_FILE} says."
                )
        self._check_inputs(found)
        return f"{len(found.history)} epochs, {found.trained_images} images"

    def _check_inputs(self, found: Checkpoint) -> None:
        """Compare what a checkpoint was trained on with what the checkout has now, if it has it."""
        manifest, index = self.today.manifest, self.today.index
        pairs: list[tuple[str, object, object]] = []
        if manifest is not None:
            pairs.append(("vocabulary", found.vocabulary, manifest.vocabulary))
            pairs.append(("training rows", found.train_sha256, manifest.labels_sha256("train")))
        if index is not None:
            pairs.append(("regions", dict(found.recipe), dict(index.recipe)))
        if (vectors := self.today.vectors_sha256(found)) is not None:
            pairs.append(("label vectors", found.label_vectors_sha256, vectors))
        train, views = self.request.train, self.request.extract.views
        if "-" not in self.folder.name.partition("-s")[2] and has_variant(train, found.variant):
            described = variant_settings(train, found.variant)
            pairs.append(("settings", (found.settings, found.views), (described, views)))
        if different := [name for name, used, today in pairs if used != today]:
            raise MismatchError(
                f"it was trained on other {' and other '.join(different)} than there are now."
            )

    def _history(self) -> str:
        text = read_bytes(self.folder / HISTORY_FILE).decode("utf-8", "replace")
        try:
            rows = [
                {name: float(value) for name, value in row.items()}
                for row in csv.DictReader(text.splitlines())
            ]
        except (AttributeError, TypeError, ValueError, csv.Error):
            rows = []
        expected = [dict(row) for row in self.checkpoint().history]
        if rows != expected:
            raise DamagedError(f"it is not the history that {CHECKPOINT_FILE} has.")
        return f"{len(rows)} epochs"

    def _metrics(self) -> str:
        found, checkpoint = self.evaluation(), self.checkpoint()
        if found.checkpoint_sha256 != checkpoint.sha256:
            raise MismatchError(f"they are of another checkpoint, {found.checkpoint_sha256}.")
        manifest = self.today.manifest
        if manifest is not None and found.test_sha256 != manifest.labels_sha256("test"):
            raise MismatchError("the test split had other images or labels.")
        return f"mAP {found.metrics.mAP:.2f}"

    def _summary(self) -> str:
        try:
            found = json.loads(read_bytes(self.folder / SUMMARY_FILE))
        except (ValueError, RecursionError):
            found = None
        if found != self.evaluation().metrics.summary():
            raise DamagedError(f"its numbers are not those of {METRICS_FILE}.")
        return f"as {METRICS_FILE}"

    def _predictions(self) -> str:
        checkpoint = self.checkpoint()
        image_ids, _ = read_logits(
            self.folder / PREDICTIONS_FILE,
            checkpoint_sha256=checkpoint.sha256,
            labels=len(checkpoint.vocabulary),
        )
        manifest = self.today.manifest
        if manifest is not None and not set(image_ids) <= set(manifest.image_ids("test")):
            raise MismatchError("the test split had other images.")
        return f"{len(image_ids)} images"

    def _last_good(self) -> str:
        found = load_checkpoint(self.folder / LAST_GOOD_FILE)
        return f"what a diverged training kept, {len(found.history)} epochs"


class _Today:
    """What runs are compared with: None where it is missing or damaged, which its own line says."""

    def __init__(self, dataset: str) -> None:
        self.manifest: Manifest | None = _sound(lambda: dataset_manifest(dataset))
        self.index: Index | None = _sound(lambda: read_index(cache_folder(dataset)))
        self._vectors: dict[tuple[object, ...], str | None] = {}

    def vectors_sha256(self, checkpoint: Checkpoint) -> str | None:
        """Of the label vectors that a run like this would be trained with."""
        names, source = checkpoint.vocabulary, checkpoint.settings.label_vectors
        if (names, source) not in self._vectors:
            found = _sound(lambda: load_label_vectors(names, source))
            self._vectors[names, source] = None if found is None else found.sha256
        return self._vectors[names, source]


def _sound(read: Callable[[], _T]) -> _T | None:
    try:
        return read()
    except (GmpipeError, OSError):
        return None


# All else ----------------------------------------------------------------------------------------


def _no_detector(folder: Path) -> str:
    read_sealed_json(folder / DESCRIPTION_FILE)
    return "none, since the regions are imported"


def _of_state(path: Path) -> Iterator[Finding]:
    def state() -> str:
        load_state(path)
        return "a run that was killed resumes from it"

    if path.suffix == ".pt":
        yield _look(path, state)


def _times(dataset: str) -> str:
    if lines := damaged_lines(dataset):
        raise DamagedError(
            f"{len(lines)} lines do not have their crc32, the first is line {lines[0]}.",
            "Delete them, or the file: nothing but the page's table of times is made from it.",
        )
    return f"{len(read_times(dataset))} stages and runs"


def _of_sweep(folder: Path) -> Iterator[Finding]:
    path, table = folder / SWEEP_FILE, folder / SWEEP_RESULTS_FILE

    def sweep() -> str:
        with advising("Run the same `gmpipe sweep` again.", DamagedError):
            if _there(path):
                results = read_sweep(path)
                if _there(table) and read_bytes(table) != as_csv(results.rows()).encode():
                    raise DamagedError(f"{SWEEP_RESULTS_FILE} is not the table of {SWEEP_FILE}.")
            return _readable(folder)

    if _there(path) or _there(table):
        yield _look(folder, sweep)


def _readable(folder: Path) -> str:
    """Read every file of a folder whose files have no digests."""

    def stop(error: OSError) -> None:
        raise error

    files = [
        Path(parent, name)
        for parent, _, names in os.walk(folder, onerror=stop)
        for name in sorted(names)
    ]
    for path in files:
        read_bytes(path)
    return f"{len(files)} files can be read"
