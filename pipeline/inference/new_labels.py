"""Let a trained run score labels that it was not trained with, by their vectors alone.

New labels are added to the run's own. So with a label graph, a new label reads the labels that the
network knows, as labels did in training; and since these read the new one, their own scores change
a little. How much such scores are worth: docs/guides/new-labels.md.

Letters: C labels of the run, W size of a label vector.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from pipeline.errors import InputError, MismatchError, advising
from pipeline.formats.text import first_few
from pipeline.labels.vectors import LabelVectors, load_label_vectors, normalised
from pipeline.learning.checkpoint import Checkpoint


def new_labels(checkpoint: Checkpoint, names: Sequence[str]) -> list[str]:
    """Those of the names that are not labels of the run, each once."""
    return [name for name in dict.fromkeys(names) if name not in checkpoint.vocabulary]


def with_labels(checkpoint: Checkpoint, names: Sequence[str]) -> Checkpoint:
    """Add labels to a run, which its network then scores, too.

    Args:
        checkpoint: of the run.
        names: labels; those that the run has already are passed over.

    Returns:
        The checkpoint with the new labels after its own, in the order of ``names``. No training
        image is known to have one, so `ratio` is 0, and no decision was fitted on them.

    Raises:
        InputError: two labels are one name in other spellings, the head has weights for each label,
            or a label has no vector.
        MissingError: the source of the run's label vectors does not exist.
        MismatchError: it holds other vectors now than the run was trained with.
    """
    new = new_labels(checkpoint, names)
    if not new:
        return checkpoint
    _check_spellings(checkpoint, new)
    settings = checkpoint.settings
    if not settings.network.scores_new_labels:
        raise InputError(
            f"The run was not trained with {first_few([repr(name) for name in new])}, and its head "
            f"`{settings.network.head}` has weights for each label that it was trained with.",
            "Use a run of a head that reads labels only by their vectors: `gm-mlic`; `ml-decoder` "
            "or `query2label` with `network.queries: vectors`. Or train with these labels.",
        )
    source = settings.label_vectors
    with advising(
        f"The run takes vectors from {source} alone, which it was trained with. Name new labels by "
        "words that have a vector there, or leave them out.",
        InputError,
    ):
        vectors = load_label_vectors((*checkpoint.vocabulary, *new), source)
    own, decisions = len(checkpoint.vocabulary), checkpoint.decisions
    known = LabelVectors(checkpoint.vocabulary, vectors.vectors[:own], vectors.source)
    if known.sha256 != checkpoint.label_vectors_sha256:
        raise MismatchError(
            f"The run was trained with the label vectors {checkpoint.label_vectors_sha256}, but "
            f"{vectors.source} now holds {known.sha256} for its labels.",
            "Restore that source, or train the run again.",
        )
    return replace(
        checkpoint,
        vocabulary=vectors.names,
        label_vectors=torch.from_numpy(vectors.vectors),
        ratio=torch.cat([checkpoint.ratio, checkpoint.ratio.new_zeros(len(new))]),
        label_vectors_sha256=vectors.sha256,
        decisions=decisions and decisions.with_more(len(new)),
    )


def _check_spellings(checkpoint: Checkpoint, new: Sequence[str]) -> None:
    """Refuse a new label that is another one in another spelling, so that both have one vector."""
    known = {normalised(name): name for name in checkpoint.vocabulary}
    for name in new:
        same = known.setdefault(normalised(name), name)
        if same != name:
            raise InputError(
                f"The labels {same!r} and {name!r} are the same name, up to case, Unicode form, "
                "`_`, `-` and blanks.",
                f"Is {same!r} meant? Write it in this way.",
            )
