"""What a user is told about the labels of a data set.

Letters: C labels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from tabulate import tabulate

from pipeline.datasets.difficult import describe_treatments
from pipeline.datasets.label_counts import LabelCounts, label_counts
from pipeline.datasets.manifest import Manifest, Split
from pipeline.datasets.spelling import packed_labels, similar_labels
from pipeline.errors import InputError
from pipeline.formats.text import counted, first_few
from pipeline.labels.vectors import check_label_names
from pipeline.settings import DifficultSettings

_MOST_LABELS = 40  # labels of which all are shown; of more, only the rarest are
_RAREST = 10

_WITHOUT_NEGATIVE: dict[Split, str] = {
    "train": "which can't be learned",
    "val": "whose AP is 100 whatever the scores are",
    "test": "whose AP is 100 whatever the scores are",
}
"""The consequence of a label without a known negative in a split."""


def describe_labels(manifest: Manifest, places: Mapping[str, str] | None = None) -> list[str]:
    """The number of images with each label, notes on labels that may be wrong, and the manifest's.

    Args:
        manifest: the images.
        places: label -> where it stands first, as far as that was read.
    """
    counts = label_counts(manifest)
    notes = [
        f"Note: {title}: {first_few(labels)}"
        for title, labels in _doubtful(manifest, counts, places or {})
        if labels
    ]
    notes += [f"Note: {note}" for note in manifest.notes]
    return [
        *_table(manifest.vocabulary, counts),
        *_difficult(manifest),
        *notes,
        *_unusable(manifest.vocabulary),
    ]


def shown_counts(manifest: Manifest) -> str:
    """The number of images in each split and of labels, e.g. `240 train, 157 test, 20 labels`."""
    splits = [f"{manifest.counts[split]['images']} {split}" for split in manifest.splits]
    return ", ".join([*splits, counted(len(manifest.vocabulary), "label")])


def _table(names: Sequence[str], counts: Mapping[Split, LabelCounts]) -> list[str]:
    """The lines of a table of all labels or, if there are many, of the rarest."""
    shown, more = np.arange(len(names)), []
    if len(names) > _MOST_LABELS:
        having = counts["train"].positive + counts["test"].positive
        rarest = np.argsort(having, kind="stable")
        shown = rarest[:_RAREST]
        least = int(having[rarest[_RAREST]])
        most = f" ({least} or more images each)" if least else ""
        more = [f"and {len(names) - _RAREST} more labels{most}"]
    rows = [
        [names[label], *(of_split.positive[label] for of_split in counts.values())]
        for label in shown.tolist()
    ]
    table = tabulate(rows, ["label", *counts], tablefmt="plain", disable_numparse=[0])
    return [*table.splitlines(), *more]


def _difficult(manifest: Manifest) -> list[str]:
    """A line on what difficult labels count as; a note if a setting asks in vain."""
    counts = manifest.difficult_counts
    if counts:
        parts = ", ".join(f"{count} {split}" for split, count in counts.items())
        return [f"Difficult labels: {parts}; {describe_treatments(manifest.treatments)}"]
    if manifest.difficult != DifficultSettings():
        setting = f"prepare.{manifest.dataset}.difficult"
        return [f"Note: `{setting}` has no effect, since no image has a difficult label."]
    return []


def _doubtful(
    manifest: Manifest, counts: Mapping[Split, LabelCounts], places: Mapping[str, str]
) -> Iterator[tuple[str, list[str]]]:
    """Yield what may be wrong with labels, and the labels of which that is true."""
    names = manifest.vocabulary
    train, test = counts["train"].positive, counts["test"].positive
    yield (
        "Labels without a test image, which get no score",
        [names[label] for label in np.flatnonzero(test == 0)],
    )
    if "val" in counts:
        yield (
            "Labels without a validation image, which the validation mAP leaves out",
            [names[label] for label in np.flatnonzero(counts["val"].positive == 0)],
        )
    rare = [names[label] for label in np.flatnonzero(train < 2)]
    yield (
        "Labels with fewer than 2 training images, which can hardly be learned",
        [f"{name} ({places[name]})" if name in places else name for name in rare],
    )
    for split, of_split in counts.items():
        if manifest.counts[split]["images"] > 1:
            yield (
                f"Labels that every {split} image has or ignores, {_WITHOUT_NEGATIVE[split]}",
                [names[label] for label in np.flatnonzero(of_split.without_negative)],
            )
    yield "Labels that may be two spellings of one label", _spellings(names, train + test, places)


def _unusable(names: Sequence[str]) -> list[str]:
    """A note if no training can use these labels, whatever its label vectors are."""
    try:
        check_label_names(names)
    except InputError as error:
        return [f"Note: no training can use these labels. {error}"]
    return []


def _spellings(names: Sequence[str], counts: np.ndarray, places: Mapping[str, str]) -> list[str]:
    """Pairs of labels that may be one, the rarer with its place.

    Labels that may be several with another separator are left out: most of them look alike.

    Args:
        names: the C labels.
        counts: (C,) the number of images that have each.
        places: label -> where it stands first.
    """
    _, separated = packed_labels(names) or ("", ())
    alone = set(names).difference(separated)
    having = dict(zip(names, counts, strict=True))
    pairs = []
    for pair in similar_labels([name for name in names if name in alone]):
        rarer = min(pair, key=lambda name: int(having[name]))
        pairs.append(
            " and ".join(
                f"{name!r} ({places[name]})" if name == rarer and name in places else repr(name)
                for name in pair
            )
        )
    return pairs
