"""Command `doubts`: list the labels of a data set that are most likely to be wrong.

Networks are trained on the cached regions without a fold of the training split each, and score the
images of that fold; all of them score the other splits, on which nothing is trained. A copy of a
training image in another split is scored by the network of that image's fold alone. Labels and
scores are then compared (`pipeline.doubts.ranking`).

Letters: N images, C labels, k folds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.special import expit

from pipeline.datasets.check import find_duplicates
from pipeline.datasets.manifest import Manifest
from pipeline.doubts.folds import divide, score_fold, without_choice
from pipeline.doubts.listing import (
    DoubtList,
    Given,
    across_splits,
    copies_of,
    doubt_table,
    read_doubts,
    write_csv,
    write_doubts,
)
from pipeline.doubts.ranking import FEWEST, Thresholds, find_doubtful, judged
from pipeline.errors import DamagedError, InputError, advising
from pipeline.files import exists, folder_lock, sha256_json, tidy
from pipeline.formats.text import counted, first_few, markdown_table
from pipeline.interrupts import Interrupted
from pipeline.labels.vectors import LabelVectors
from pipeline.learning.distributed import alone
from pipeline.learning.loop import steps_per_epoch
from pipeline.learning.splits import SplitData, open_split
from pipeline.learning.training import with_precision
from pipeline.settings import TrainSettings
from pipeline.tensors import load_state, save_tensors
from stages.checkout.caches import advising_on_cache
from stages.checkout.layout import (
    DOUBTS_FILE,
    DOUBTS_TABLE_FILE,
    data_root,
    doubts_folder,
    state_file,
)
from stages.checkout.params import Request
from stages.checkout.plans import RunPlan, check_run_regions, open_inputs, plan_run
from stages.console.messages import note, stopped
from stages.console.progress import progress_bar

_KINDS: tuple[tuple[Given, str], ...] = (
    ("present", "Given, but the photograph looks as if the label were absent"),
    ("absent", "Not given, but the photograph looks as if the label were present"),
)


@dataclass(frozen=True)
class _Inputs:
    """What the networks are trained on, and what they score.

    Attributes:
        manifest, vectors: of the data set.
        settings: of every network.
        split: the training split, N images.
        others: the other splits.
        fold: (N,) of each image of the training split; copies share one.
        groups: ids of images whose files have the same content.
        key: all that decides the scores, as JSON.
    """

    manifest: Manifest
    vectors: LabelVectors
    settings: TrainSettings
    split: SplitData
    others: Sequence[SplitData]
    fold: np.ndarray
    groups: list[list[str]]
    key: dict[str, Any]


def doubts(request: Request, variant: str, seed: int, *, folds: int, top: int) -> tuple[str, str]:
    """Find the doubtful labels, and write them to runs/<dataset>/doubts/.

    Folds that are finished are kept until all are. A list that nothing has changed for is read.

    Args:
        request: for the data set.
        variant: which is trained.
        seed: of the folds and the networks.
        folds: k.
        top: how many labels of each kind the tables show.

    Returns:
        the tables; and what was written where.

    Raises:
        InputError: the scores of the variant are no probabilities, or there are too few images.
        GmpipeError: an input is missing or damaged, or a training diverged.
    """
    run = plan_run(request, variant, seed)
    if not (run.settings.ranks and run.settings.decides):
        raise InputError(
            f"The scores of the variant `{variant}` (head `{run.settings.network.head}`, loss "
            f"`{run.settings.loss.name}`) are no probabilities that an image has a label, so "
            "labels can't be judged by them.",
            "Choose another one, e.g. `--variant max-pool`.",
        )
    folder = doubts_folder(run.dataset)
    with folder_lock(folder):
        tidy(folder)
        inputs = _open(run, folds)
        path, table = folder / DOUBTS_FILE, folder / DOUBTS_TABLE_FILE
        key = sha256_json({**inputs.key, "test": inputs.manifest.test_sha256})
        found = _kept(path, key)
        if found is None:
            found = _find(run, inputs, folds, key)
            write_doubts(path, found)
        write_csv(table, found)
        for number in range(folds):
            _fold_file(run.dataset, inputs, number).unlink(missing_ok=True)
    if found.not_judged:
        note(
            f"labels that are not judged, since fewer than {FEWEST} training images have or lack "
            f"them: {first_few(found.not_judged)}."
        )
    return _tables(found, top), _summary(found, table)


def _open(run: RunPlan, folds: int) -> _Inputs:
    # Before the key is made, as in `train`: `auto` is another precision on another machine.
    settings = with_precision(without_choice(run.settings), alone())
    manifest, cache, vectors = open_inputs(run.dataset, settings)
    check_run_regions([run], cache)
    with advising_on_cache(run.dataset):
        split = open_split(cache, manifest, "train", run.views, settings.regions)
        others = [
            open_split(cache, manifest, name, regions=settings.regions)
            for name in manifest.splits
            if name != "train"
        ]
    if not judged(split.truth).any():
        raise InputError(
            f"No label of {run.dataset} can be judged: for that, at least {FEWEST} training images "
            f"must have it, and {FEWEST} must lack it.",
            "Label more images.",
        )
    groups = find_duplicates(manifest, data_root(run.dataset))
    first = {image_id: group[0] for group in groups for image_id in group}
    groups_of_split = [first.get(image_id, image_id) for image_id in split.image_ids]
    if len(set(groups_of_split)) < folds:
        raise InputError(
            f"The training split of {run.dataset} has {len(set(groups_of_split))} different "
            f"images, which can't be divided into {folds} folds.",
            "Give a lower number with `--folds`.",
        )
    key = {
        "seed": run.seed,
        "folds": folds,
        "settings": settings.model_dump(mode="json"),
        "views": run.views,
        "cache": cache.fingerprint,
        "vectors": vectors.sha256,
        "labels": manifest.train_sha256,
        "images": sha256_json([list(one.image_ids) for one in (split, *others)]),
        "groups": sha256_json(groups),
    }
    fold = divide(groups_of_split, folds, run.seed)
    return _Inputs(manifest, vectors, settings, split, others, fold, groups, key)


def _kept(path: Path, key: str) -> DoubtList | None:
    """The list of an earlier call, if all that decides it is the same."""
    if not exists(path):
        return None
    with advising(f"Delete {path}, and run the same command again.", DamagedError):
        found = read_doubts(path)
    return found if found.key == key else None


def _fold_file(dataset: str, inputs: _Inputs, number: int) -> Path:
    return state_file("fold", dataset, {**inputs.key, "fold": number})


def _find(run: RunPlan, inputs: _Inputs, folds: int, key: str) -> DoubtList:
    labels, split = inputs.manifest.vocabulary, inputs.split
    _train_missing(run, inputs, folds)
    probabilities = _probabilities(run, inputs, folds)
    thresholds = Thresholds.of(probabilities[0], split.truth)
    scores_of_all = np.concatenate(probabilities)
    truth = np.concatenate([split.truth, *(other.truth for other in inputs.others)])
    known = judged(split.truth)
    by_id = {row["image_id"]: row for row in inputs.manifest.table.to_pylist()}
    rows = [by_id[one] for part in (split, *inputs.others) for one in part.image_ids]
    entries = find_doubtful(scores_of_all, truth, thresholds)
    copies = copies_of(inputs.groups)
    return DoubtList(
        dataset=run.dataset,
        variant=run.variant,
        seed=run.seed,
        folds=folds,
        key=key,
        fingerprint=split.cache.fingerprint,
        train_sha256=inputs.manifest.train_sha256,
        test_sha256=inputs.manifest.test_sha256,
        judged=int((truth[:, known] >= 0).sum()),
        not_judged=[labels[label] for label in np.flatnonzero(~known)],
        across=across_splits(inputs.groups, inputs.manifest),
        table=doubt_table(rows, labels, copies, scores_of_all, truth, entries),
    )


def _train_missing(run: RunPlan, inputs: _Inputs, folds: int) -> None:
    """Train the networks of the folds that no earlier call has finished, and keep their scores."""
    held_out = [inputs.fold == number for number in range(folds)]
    files = [_fold_file(run.dataset, inputs, number) for number in range(folds)]
    epochs, batch_size = inputs.settings.epochs, inputs.settings.batch_size
    steps = [epochs * steps_per_epoch(int((~one).sum()), batch_size) for one in held_out]
    before = sum(own for own, file in zip(steps, files, strict=True) if exists(file))
    with progress_bar(total=sum(steps), desc="doubts", unit="step") as bar:
        bar.resume(before)
        for number, file in enumerate(files):
            if exists(file):
                continue
            state = state_file("training", run.dataset, {**inputs.key, "fold": number})
            try:
                scores = score_fold(
                    inputs.split,
                    held_out[number],
                    inputs.others,
                    inputs.vectors,
                    run.seed,
                    inputs.settings,
                    state_file=state,
                    name=f"{run.variant}, fold {number + 1} of {folds},",
                    on_step=partial(_show, bar, before),
                )
            except Interrupted as interrupted:
                raise stopped(Interrupted(before + interrupted.steps), sum(steps)) from None
            save_tensors(file, {"logits": [torch.from_numpy(one) for one in scores]})
            state.unlink(missing_ok=True)
            before += steps[number]


def _show(bar: Any, before: int, done: int) -> None:
    bar.update(before + done - bar.n)


def _probabilities(run: RunPlan, inputs: _Inputs, folds: int) -> list[np.ndarray]:
    """Presence of each label in the images of the training split, and in those of the others.

    Returns:
        (N, C) by the network that was not trained on the image; and for each other split an array
        (N', C), the mean over the networks that were not trained on the image or a copy of it.
    """
    own = np.zeros(inputs.split.truth.shape)
    others = [np.zeros(other.truth.shape) for other in inputs.others]
    fold_of_copy = _folds_of_copies(inputs)
    shares = [_shares(other, folds, fold_of_copy) for other in inputs.others]
    for number in range(folds):
        stored = load_state(_fold_file(run.dataset, inputs, number))["logits"]
        held_out, *further = (expit(logits.double().numpy()) for logits in stored)
        own[inputs.fold == number] = held_out
        for total, share, scores in zip(others, shares, further, strict=True):
            total += share[:, [number]] * scores
    return [own, *others]


def _folds_of_copies(inputs: _Inputs) -> dict[str, int]:
    """Image with a copy in the training split -> the fold of its copies, which are all in one."""
    fold_of = dict(zip(inputs.split.image_ids, inputs.fold.tolist(), strict=True))
    return {
        image_id: fold_of[trained]
        for group in inputs.groups
        for trained in group
        if trained in fold_of
        for image_id in group
    }


def _shares(other: SplitData, folds: int, fold_of_copy: Mapping[str, int]) -> np.ndarray:
    """The share of each network in the mean for each image of a split without training: (N', k).

    An image with copies in the training split gets only the network of their fold, which alone was
    trained on none of them.
    """
    shares = np.full((len(other), folds), 1 / folds)
    for row, image_id in enumerate(other.image_ids):
        if image_id in fold_of_copy:
            shares[row] = np.arange(folds) == fold_of_copy[image_id]
    return shares


# What is printed ----------------------------------------------------------------------------------


def _tables(found: DoubtList, top: int) -> str:
    """A table of each kind, and what else to know."""
    parts = []
    for given, title in _KINDS:
        rows = [
            [
                str(row["rank"]),
                row["image_id"],
                row["split"],
                row["label"],
                f"{row['score']:.3f}",
                first_few(row["duplicate_of"]),
            ]
            for row in found.of(given, top)
        ]
        headers = ["rank", "image", "split", "label", "score", "duplicate of"]
        parts.append(f"{title}: {found.count(given)}\n\n{markdown_table(headers, rows)}")
    if found.across:
        groups = [" = ".join(group) for group in found.across]
        parts.append(f"Equal photographs in different splits: {first_few(groups, '; ')}")
    return "\n\n".join(parts)


def _summary(found: DoubtList, table: Path) -> str:
    counts = " and ".join(f"{found.count(given)} {given}" for given, _ in _KINDS)
    return (
        f"{table}: {counted(len(found), 'doubtful label')} of {found.judged}, by "
        f"{counted(found.folds, 'network')} ({found.variant}); given: {counts}"
    )
