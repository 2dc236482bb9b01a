"""Difficult labels: those that the files give as neither positive nor negative for an image.

In VOC, they are the classes of which the image shows only objects marked `difficult`; in an npz of
regions, the labels coded 0. Published results treat them in several ways, so the setting
`prepare.<dataset>.difficult` says for each split what they count as.
"""

from __future__ import annotations

from collections.abc import Mapping

import pyarrow as pa

from pipeline.settings import Treatment

_WORK = {"train": "training", "val": "validation", "test": "testing"}
"""Split -> what its images are for."""


def treated(rows: pa.Table, treatment: Treatment) -> pa.Table:
    """Let the difficult labels of some images count as one treatment says.

    Args:
        rows: with the columns of `manifest.COLUMNS`, whose `ignored` holds the difficult labels.
    """
    if treatment == "ignored":
        return rows
    labels, difficult = (rows.column(name).to_pylist() for name in ("labels", "ignored"))
    if treatment == "positive":
        labels = [
            sorted([*own, *more]) if more else own
            for own, more in zip(labels, difficult, strict=True)
        ]
    for name, lists in (("labels", labels), ("ignored", [[] for _ in labels])):
        number = rows.schema.get_field_index(name)
        field = rows.schema.field(number)
        rows = rows.set_column(number, field, pa.array(lists, field.type))
    return rows


def describe_treatments(treatments: Mapping[str, str]) -> str:
    """Say what difficult labels count as, e.g. `positive in training, ignored in testing`.

    Args:
        treatments: split -> treatment, as `Manifest.treatments`.
    """
    parts = []
    for treatment in dict.fromkeys(treatments.values()):
        *works, last = (_WORK[split] for split, own in treatments.items() if own == treatment)
        where = f"{', '.join(works)} and {last}" if works else last
        parts.append(f"{treatment} in {where}")
    return ", ".join(parts)
