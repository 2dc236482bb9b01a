"""What the files of a data set say -> its manifest.

An adapter (`voc`, `coco`, `nuswide`, `table`) reads one layout of files into a `Listing`. What all
of them have in common happens here: which images are there, which are left out, and how many.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import pyarrow as pa

from pipeline.datasets.manifest import BoxTable


@dataclass(frozen=True)
class Listing:
    """Every image that a data set's files list, before any of them is looked for.

    Attributes:
        vocabulary: the C label names, in the data set's order.
        split_name: which division into train and test this is, e.g. ``official``.
        sources: what the listing was read from, file (or ``settings``) -> sha256.
        table: a row an image, with the columns of `manifest.COLUMNS`; paths relative to the data
            set's root.
        boxes: the annotated objects, where the files have any.
    """

    vocabulary: tuple[str, ...]
    split_name: str
    sources: dict[str, str]
    table: pa.Table = field(repr=False)
    boxes: BoxTable | None = field(default=None, repr=False)
