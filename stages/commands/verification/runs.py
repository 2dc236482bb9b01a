"""What `verify` finds about the files of a run.

A file is judged by its own content, and compared only with files that are sound.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from pipeline.datasets.manifest import Manifest
from pipeline.errors import DamagedError, InputError, MismatchError, MissingError, advising
from pipeline.evaluation.entries import EntryEvaluation
from pipeline.evaluation.metrics import Evaluation, read_evaluation, shown
from pipeline.evaluation.predictions import read_logits
from pipeline.files import read_bytes
from pipeline.formats.text import counted
from pipeline.labels.vectors import load_label_vectors
from pipeline.learning.checkpoint import Checkpoint, load_checkpoint
from pipeline.shards.index import Index, read_index
from pipeline.shards.schema import recipe_differences
from stages.checkout.keys import shown_differences
from stages.checkout.layout import (
    CHECKPOINT_FILE,
    HISTORY_FILE,
    LAST_GOOD_FILE,
    METRICS_FILE,
    PREDICTIONS_FILE,
    SETTINGS_FILE,
    SUMMARY_FILE,
    cache_folder,
    run_of_folder,
)
from stages.checkout.manifests import changed_treatment, dataset_manifest
from stages.checkout.params import Request, has_variant, variant_settings
from stages.checkout.plans import differing_settings
from stages.checkout.resolved import read_run_settings
from stages.commands.verification.findings import Finding, csv_rows, look, sound, there


class Today:
    """What runs and photographs are compared with; None where it is not sound."""

    def __init__(self, dataset: str) -> None:
        self.manifest: Manifest | None = sound(lambda: dataset_manifest(dataset))
        self.index: Index | None = sound(lambda: read_index(cache_folder(dataset)))
        self._vectors: dict[tuple[object, ...], str | None] = {}

    def vectors_sha256(self, checkpoint: Checkpoint) -> str | None:
        """Of the label vectors that a run like this would be trained with."""
        names, source = checkpoint.vocabulary, checkpoint.settings.label_vectors
        if (names, source) not in self._vectors:
            found = sound(lambda: load_label_vectors(names, source))
            self._vectors[names, source] = None if found is None else found.sha256
        return self._vectors[names, source]


def check_summary(path: Path, evaluation: Evaluation | EntryEvaluation | None) -> None:
    """Check that summary.json has the numbers of metrics.json, if these are known.

    Raises:
        DamagedError: it is not JSON.
        MismatchError: it has other numbers.
    """
    try:
        found = json.loads(read_bytes(path))
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"it is not JSON ({error}).") from error
    if evaluation is not None and found != evaluation.metrics.summary():
        raise MismatchError(
            f"its numbers are not those of {METRICS_FILE}. An evaluation that was killed "
            "leaves such a file."
        )


class RunFiles:
    """The files of a run, which belong together.

    Attributes:
        request: of the data set.
        today: what the checkout has now.
        folder: of the run.
        name: what the name of the folder says; None if it is no run's.
    """

    def __init__(self, request: Request, today: Today, folder: Path) -> None:
        self.request = request
        self.today = today
        self.folder = folder
        self.name = run_of_folder(folder.name)
        # Read once, when the first file asks for them.
        self._read_checkpoint: Callable[[], Checkpoint] = cache(
            lambda: load_checkpoint(folder / CHECKPOINT_FILE)
        )
        self._read_evaluation: Callable[[], Evaluation] = cache(
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
        if not any(there(self.folder / name) for name, _, _ in checks):
            return
        for name, check, commands in checks:
            path = self.folder / name
            if there(path) or name == CHECKPOINT_FILE:
                yield look(path, self._advising(check, commands))

    def _advising(self, check: Callable[[], str], commands: tuple[str, ...]) -> Callable[[], str]:
        """Name the commands that make a file of this run again, for errors of its check."""
        if self.name is None:
            return check
        variant, seed, hashed = self.name
        options = f"--dataset {self.request.dataset} --variant {variant} --seed {seed}"
        again = " and ".join(f"`gmpipe {command} {options}`" for command in commands)
        more = " with the same `--set` options" if hashed else ""

        def advised() -> str:
            with advising(
                f"Run {again}{more}.", MissingError, DamagedError, MismatchError, InputError
            ):
                return check()

        return advised

    def _settings(self) -> str:
        used: Mapping[str, Any] = read_run_settings(self.folder)
        self._check_checkpoint(used.get("checkpoint_sha256"))
        return f"{used['variant']}, seed {used['seed']}"

    def _check_checkpoint(self, sha256: str | None) -> None:
        """Check that a file names the checkpoint that is there."""
        checkpoint = sound(self._read_checkpoint)
        if checkpoint is not None and sha256 != checkpoint.sha256:
            raise MismatchError(f"it is of another checkpoint, {sha256}.")

    def _checkpoint(self) -> str:
        found = self._read_checkpoint()
        identity = (found.variant, found.seed)
        if found.dataset != self.request.dataset or (
            self.name is not None and identity != (self.name.variant, self.name.seed)
        ):
            raise MismatchError(
                f"it is the checkpoint of another run: {found.variant}, seed {found.seed}, on "
                f"{found.dataset}."
            )
        self._check_inputs(found)
        return f"{counted(len(found.history), 'epoch')}, {counted(found.trained_images, 'image')}"

    def _check_inputs(self, found: Checkpoint) -> None:
        """Compare what a checkpoint was trained on with what the checkout has now, if it has it."""
        manifest, index = self.today.manifest, self.today.index
        different: list[str] = []
        if manifest is not None:
            if found.vocabulary != manifest.vocabulary:
                different.append("vocabulary")
            if found.train_sha256 != manifest.train_sha256:
                changed = changed_treatment(manifest, "train_sha256", found.train_sha256)
                different.append(f"training rows{f' ({changed})' if changed else ''}")
        if index is not None and (changes := recipe_differences(found.recipe, index.recipe)):
            different.append(f"regions ({changes})")
        if self.today.vectors_sha256(found) not in (None, found.label_vectors_sha256):
            different.append("label vectors")
        train, views = self.request.train, self.request.extract.views
        hashed = self.name is not None and self.name.hashed
        if not hashed and has_variant(train, found.variant):
            described = variant_settings(train, found.variant)
            if settings := differing_settings(found, described, views):
                different.append(f"settings ({shown_differences(settings)})")
        if different:
            raise MismatchError(
                f"it was trained on other {' and other '.join(different)} than there are now."
            )

    def _history(self) -> str:
        try:
            rows = [
                {name: float(value) for name, value in row.items()}
                for row in csv_rows(self.folder / HISTORY_FILE)
            ]
        except ValueError as error:
            raise DamagedError(f"it holds something else than numbers ({error}).") from error
        checkpoint = sound(self._read_checkpoint)
        if checkpoint is not None and rows != [dict(row) for row in checkpoint.history]:
            raise MismatchError(
                f"it is not the history of {CHECKPOINT_FILE}. A training that diverged or was "
                "killed leaves such a file."
            )
        return counted(len(rows), "epoch")

    def _metrics(self) -> str:
        found = self._read_evaluation()
        self._check_checkpoint(found.checkpoint_sha256)
        manifest = self.today.manifest
        if manifest is not None and found.test_sha256 != manifest.test_sha256:
            changed = changed_treatment(manifest, "test_sha256", found.test_sha256)
            reason = f": {changed}" if changed else ""
            raise MismatchError(f"the test split had other images or labels{reason}.")
        return f"mAP {shown(found.metrics.mAP)}"

    def _summary(self) -> str:
        evaluation = sound(self._read_evaluation)
        check_summary(self.folder / SUMMARY_FILE, evaluation)
        return f"as {METRICS_FILE}" if evaluation else ""

    def _predictions(self) -> str:
        path, checkpoint = self.folder / PREDICTIONS_FILE, sound(self._read_checkpoint)
        if checkpoint is None:
            # The content is checked first, and then refused for its checkpoint, whatever that is.
            with suppress(MismatchError):
                read_logits(path, checkpoint_sha256="", labels=0)
            return ""
        image_ids, _ = read_logits(
            path, checkpoint_sha256=checkpoint.sha256, labels=len(checkpoint.vocabulary)
        )
        manifest = self.today.manifest
        if manifest is not None and not set(image_ids) <= set(manifest.image_ids("test")):
            raise MismatchError("the test split had other images.")
        return counted(len(image_ids), "image")

    def _last_good(self) -> str:
        found = load_checkpoint(self.folder / LAST_GOOD_FILE)
        return f"what a diverged training kept, {counted(len(found.history), 'epoch')}"
