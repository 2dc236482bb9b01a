"""The numbers that the paper prints, for comparison with our own.

Every number comes from Wu, Liu, Feng, Jin, Lyu, Wu: "GM-MLIC: Graph Matching based Multi-Label
Image Classification" (IJCAI 2021), Tables 1 to 4 and sections 4.2 and 4.3. All are in percent.
Methods have the names that the paper gives them; it quotes those listed before GM-MLIC from their
own papers. Columns are named as `Metrics.number` names them.

The numbers are kept as printed, even where they contradict each other: in Table 1 the mean of
GM-MLIC's AP is 95.2 but its mAP is given as 94.7, and on MS-COCO the harmonic mean of its top-3 CP
and CR, 90.6 and 67.3, is 77.2 but its CF1 is given as 74.9.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.datasets.readers.voc import VOCABULARY
from pipeline.evaluation.metrics import Evaluation

Row = Mapping[str, float | None]
"""Column -> percent; None where the paper prints "-"."""
Table = Mapping[str, Row]
"""Method -> its row."""


def _table(columns: Sequence[str], text: str) -> Table:
    """Read one method per line: its name, then one number per column."""
    rows: dict[str, Row] = {}
    for line in text.strip().splitlines():
        name, *cells = line.rsplit(maxsplit=len(columns))
        values = [None if cell == "-" else float(cell) for cell in cells]
        rows[name] = dict(zip(columns, values, strict=True))
    return rows


TABLE_1 = _table(
    (*VOCABULARY, "mAP"),
    """
HCP           98.6 97.1 98.0 95.6 75.3 94.7 95.8 97.3 73.1 90.2 80.0 97.3 96.1 94.9 96.3 78.3 94.7 76.2 97.9 91.5 90.9
CNN-RNN       96.7 83.1 94.2 92.8 61.2 82.1 89.1 94.2 64.2 83.6 70.0 92.4 91.7 84.2 93.7 59.8 93.2 75.3 99.7 78.6 84.0
ResNet-101    99.5 97.7 97.8 96.4 65.7 91.8 96.1 97.6 74.2 80.9 85.0 98.4 96.5 95.9 98.4 70.1 88.3 80.2 98.9 89.2 89.9
RNN-Attention 98.6 97.4 96.3 96.2 75.2 92.4 96.5 97.1 76.5 92.0 87.7 96.8 97.5 93.8 98.5 81.6 93.7 82.8 98.6 89.3 91.9
ML-GCN        99.6 98.3 97.9 97.6 78.2 92.3 97.4 97.4 79.2 94.4 86.5 97.4 97.9 97.1 98.7 84.6 95.3 83.0 98.6 90.4 93.1
SSGRL         99.5 97.1 97.6 97.8 82.6 94.8 96.7 98.1 78.0 97.0 85.6 97.8 98.3 96.4 98.8 84.9 96.5 79.8 98.4 92.8 93.4
TSGCN         98.9 98.5 96.8 97.3 87.5 94.2 97.4 97.7 84.1 92.6 89.3 98.4 98.0 96.1 98.7 84.9 96.6 87.2 98.4 93.7 94.3
GM-MLIC       99.4 98.7 98.5 97.6 86.3 97.1 98.0 99.4 82.5 98.1 87.7 99.2 98.9 97.5 99.3 87.0 98.3 86.5 99.1 94.9 94.7
""",  # noqa: E501
)
"""VOC 2007: average precision by label, and mAP. The paper shortens some label names."""

_TOP_3 = tuple(f"top-3 {name}" for name in ("CP", "CR", "CF1", "OP", "OR", "OF1"))

TABLE_2 = _table(
    ("mAP", "CP", "CR", "CF1", "OP", "OR", "OF1", *_TOP_3),
    """
CNN-RNN       61.2 -    -    -    -    -    -    66.0 55.6 60.4 69.2 66.4 67.8
ResNet-101    77.3 80.2 66.7 72.8 83.9 70.8 76.8 84.1 59.4 69.7 89.1 62.8 73.6
RNN-Attention -    -    -    -    -    -    -    79.1 58.7 67.4 84.0 63.0 72.0
SRN           77.1 81.6 65.4 71.2 82.7 69.9 75.8 85.2 58.8 67.4 87.4 62.5 72.9
ML-GCN        83.0 85.1 72.0 78.0 85.8 75.4 80.3 89.2 64.1 74.6 90.5 66.5 76.7
SSGRL         83.6 89.5 68.3 76.9 91.2 70.7 79.3 91.9 62.1 73.0 93.6 64.2 76.0
CMA           83.4 82.1 73.1 77.3 83.7 76.3 79.9 87.2 64.6 74.2 89.1 66.7 76.3
TSGCN         83.5 81.5 72.3 76.7 84.9 75.3 79.8 84.1 67.1 74.6 89.5 69.3 78.1
GM-MLIC       84.3 87.3 70.8 78.3 88.6 74.8 80.6 90.6 67.3 74.9 94.0 69.8 77.8
""",
)
"""MS-COCO."""

TABLE_3 = _table(
    ("mAP", "CF1", "OF1", "top-3 CF1", "top-3 OF1"),
    """
CNN-RNN     56.1 -    -    34.7 55.2
SRN         61.8 56.9 73.2 47.7 62.2
MLIC-KD-WSD 60.1 58.7 73.7 53.8 71.1
PLA         -    56.2 -    -    72.3
CMA         61.4 60.5 73.7 55.5 70.0
GM-MLIC     62.2 61.0 74.1 55.3 72.5
""",
)
"""NUS-WIDE."""

TABLE_4_COCO = _table(
    ("mAP", "CP", "CR", "CF1"),
    """
w/o G^l       81.7 85.1 68.3 76.5
w/o G^o       82.9 86.4 67.6 77.2
w/o ILM edges 83.8 86.7 69.2 77.6
GM-MLIC       84.3 87.3 70.8 78.3
""",
)
"""The ablations on MS-COCO."""

TABLE_4_VOC = _table(
    ("mAP",),
    """
w/o G^l       92.8
w/o G^o       93.3
w/o ILM edges 94.2
GM-MLIC       94.7
""",
)
"""The ablations on VOC 2007."""

METHOD = "GM-MLIC"

VARIANT_NAMES = {
    "hcp": "HCP",
    "cnn-rnn": "CNN-RNN",
    "srn": "SRN",
    "ml-gcn": "ML-GCN",
    "ssgrl": "SSGRL",
    "pla": "PLA",
    "cma": "CMA",
    "full": METHOD,
    "without-label-graph": "w/o G^l",
    "without-instance-graph": "w/o G^o",
    "without-matching-edges": "w/o ILM edges",
    "stateless-matching-edges": "w/o ILM edges",
}
"""Our variants -> the paper's rows. A variant stands for a row only if its method is the same. The
paper does not say what is left without matching edges, so two variants stand for that row: one
without any message between instances and labels, and one whose messages read the nodes alone."""

ABLATIONS = (
    "without-label-graph",
    "without-instance-graph",
    "without-matching-edges",
    "stateless-matching-edges",
)
"""Our variants that the paper trains as well, to compare them with its own method."""

NOT_REPRODUCED = {
    "ResNet-101": "it is fine-tuned from end to end. `linear-mean` is the nearest to it: a linear "
    "layer on features that are kept as they are",
    "RNN-Attention": "it moves a window over the feature map without steps, and cached regions are "
    "a fixed choice of windows. `rma-style` follows its idea",
    "TSGCN": "its code is not public, and the sizes of its layers are not known to us",
    "MLIC-KD-WSD": "its student is a network on photographs, which learns from a teacher with "
    "regions. On a cache, both would read the same features. `wsddn` is the teacher alone",
}
"""Method in the paper's tables of which we have no variant -> why."""

PUBLISHED = "-published"
"""Ends the name of the variant with a method's published settings, where ours are others."""


def method_of(variant: str) -> str | None:
    """The paper's row that a variant stands for; None if there is none."""
    return VARIANT_NAMES.get(variant.removesuffix(PUBLISHED))


@dataclass(frozen=True)
class PaperResults:
    """What the paper reports for one data set, and how the results were made.

    Attributes:
        title: the paper's name for the data set.
        source, split: of the data set in params.yaml whose images are the paper's: its `source` and
            the name of its split.
        labels: how many.
        truth: how our labels are read where the paper does not say how it reads its own. What the
            difficult ones count as, each run says.
        tables: the tables that hold its rows. If a row is in several tables, the first one that
            has a column counts.
        images: how many train and test images.
        regions: m.
        beta: of the loss, equation (15).
    """

    title: str
    source: str
    split: str
    labels: int
    truth: str
    tables: tuple[Table, ...]
    images: tuple[int, int]
    regions: int
    beta: float

    @property
    def columns(self) -> list[str]:
        """All columns except the AP of single labels."""
        names = dict.fromkeys(name for table in self.tables for name in table[METHOD])
        return [name for name in names if name not in VOCABULARY]

    @property
    def methods(self) -> dict[str, Row]:
        """Every row of the tables, by method."""
        names = dict.fromkeys(name for table in self.tables for name in table)
        return {name: self._row(name) for name in names}

    @property
    def ap(self) -> Row:
        """AP by label; empty except for VOC 2007."""
        row = self.tables[0][METHOD]
        return {name: row[name] for name in VOCABULARY if name in row}

    def row(self, variant: str) -> Row | None:
        """The numbers for one of our variants; None if the paper has none."""
        return self._row(method_of(variant) or "") or None

    def _row(self, method: str) -> Row:
        row: dict[str, float | None] = {}
        for table in reversed(self.tables):
            row |= table.get(method, {})
        return row


PAPER = {
    "voc2007": PaperResults(
        title="VOC 2007",
        source="voc",
        split="official",
        labels=20,
        truth="a class of which an image shows only objects marked `difficult` is a difficult "
        "label of it",
        tables=(TABLE_1, TABLE_4_VOC),
        images=(5_011, 4_952),
        regions=10,
        beta=0.0,
    ),
    "coco": PaperResults(
        title="MS-COCO",
        source="coco",
        split="train2014/val2014",
        labels=80,
        truth="an image is positive for every category that is annotated in it, including crowds",
        tables=(TABLE_2, TABLE_4_COCO),
        images=(82_081, 40_137),
        regions=35,
        beta=0.4,
    ),
    "nuswide": PaperResults(
        title="NUS-WIDE",
        source="nuswide",
        split="official",
        labels=81,
        truth="all 81 concepts, as the publisher's lists give them",
        tables=(TABLE_3,),
        images=(161_789, 107_859),
        regions=35,
        beta=0.4,
    ),
}
"""By the data set's name in the params.yaml of this project."""


def paper_results(source: str, evaluation: Evaluation) -> PaperResults | None:
    """Find the paper's results on the data set of an evaluation; None if it has none.

    What the data set is called decides only for regions and tables of the user's own, which nothing
    else tells apart: `voc2007`, or a name that begins with `voc2007-`.

    Args:
        source: the data set's `source` in params.yaml.
        evaluation: with its split and its labels. Another split of the same photographs, such as
            COCO's of 2017, has no rows in the paper.
    """
    for name, paper in PAPER.items():
        if source in ("imported", "table"):
            same = evaluation.dataset == name or evaluation.dataset.startswith(f"{name}-")
        else:
            same = (source, evaluation.split) == (paper.source, f"{paper.split}/test")
        if same and len(evaluation.metrics.AP) == paper.labels:
            return paper
    return None
