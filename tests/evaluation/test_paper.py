"""The paper's tables: each cell is as printed, if the paper's text is available."""

from __future__ import annotations

import re
import statistics
from pathlib import Path

import pytest
from results import make_evaluation, make_metrics

from pipeline.datasets.readers.voc import VOCABULARY
from pipeline.evaluation.paper import (
    ABLATIONS,
    METHOD,
    NOT_REPRODUCED,
    PAPER,
    TABLE_1,
    TABLE_2,
    TABLE_3,
    TABLE_4_COCO,
    TABLE_4_VOC,
    VARIANT_NAMES,
    Table,
    method_of,
    paper_results,
)
from pipeline.settings import (
    GmMlicSettings,
    TrainSettings,
    WeightedLoss,
    head_of_variant,
    variant_names,
)
from stages.checkout.params import load_params

PRINTED_NAMES = {
    r"Our w/o $\mathbb{G}^l$": "w/o G^l",
    r"Our w/o $\mathbb{G}^o$": "w/o G^o",
    "Our w/o ILM edges": "w/o ILM edges",
    "Our GM-MLIC": METHOD,
}


def printed_table(text: str, number: int) -> dict[str, list[float | None]]:
    """The rows above the caption of a table."""
    above = text[: text.index(f"\nTable {number}: ")].rstrip().splitlines()
    rows: dict[str, list[float | None]] = {}
    for line in reversed(above):
        name, *cells = re.sub("</?b>", "", line).split("\t")
        if not re.fullmatch(r"[\d.]+|-", cells[-1] if cells else ""):
            break
        name = PRINTED_NAMES.get(name, re.sub(r" \[.*", "", name))
        rows[name] = [None if cell == "-" else float(cell) for cell in cells]
    return dict(reversed(rows.items()))


def columns(table: Table) -> dict[str, list[float | None]]:
    return {method: list(row.values()) for method, row in table.items()}


def test_every_cell_is_printed(shared: Path) -> None:
    text = (shared / "paper/gm-mlic.md").read_text()
    assert columns(TABLE_1) == printed_table(text, 1)
    assert columns(TABLE_2) == printed_table(text, 2)
    assert columns(TABLE_3) == printed_table(text, 3)
    both = printed_table(text, 4)
    assert columns(TABLE_4_COCO) == {method: row[:4] for method, row in both.items()}
    assert columns(TABLE_4_VOC) == {method: row[4:] for method, row in both.items()}


def test_the_map_of_table_1_is_the_mean_of_its_row_but_for_the_papers_own() -> None:
    for method, row in TABLE_1.items():
        mean = statistics.fmean(row[label] or 0.0 for label in VOCABULARY)
        if method == METHOD:  # so printed
            assert (round(mean, 1), row["mAP"]) == (95.2, 94.7)
        else:
            assert row["mAP"] == pytest.approx(mean, abs=0.051)


def test_the_tables_agree_on_the_papers_own_row() -> None:
    assert TABLE_4_VOC[METHOD]["mAP"] == TABLE_1[METHOD]["mAP"]
    assert TABLE_4_COCO[METHOD].items() <= TABLE_2[METHOD].items()


def test_a_row_is_taken_from_every_table_that_has_it() -> None:
    coco = PAPER["coco"].row("full")
    assert coco is not None
    assert (coco["mAP"], coco["top-3 OF1"]) == (84.3, 77.8)
    assert PAPER["coco"].row("without-label-graph") == {
        "mAP": 81.7,
        "CP": 85.1,
        "CR": 68.3,
        "CF1": 76.5,
    }
    assert PAPER["voc2007"].row("without-instance-graph") == {"mAP": 93.3}
    assert PAPER["nuswide"].row("without-label-graph") is None
    assert PAPER["coco"].row("max-pool") is None


@pytest.mark.parametrize(
    ("source", "dataset", "split", "labels", "found"),
    [
        ("voc", "voc2007", "official", 20, "voc2007"),
        ("voc", "another-name", "official", 20, "voc2007"),
        ("voc", "voc2007", "own", 20, None),  # a vocabulary of one's own
        ("coco", "coco", "train2014/val2014", 80, "coco"),
        ("coco", "photos", "train2014/val2014", 80, "coco"),
        ("coco", "coco2017", "train2017/val2017", 80, None),
        ("coco", "coco", "train2017/val2017", 80, None),
        ("coco", "coco", "train2014/val2014", 3, None),
        ("nuswide", "nuswide", "official", 81, "nuswide"),
        ("nuswide", "nuswide", "csv", 81, None),
        ("nuswide", "nuswide", "multi-hot", 81, None),
        ("imported", "voc2007", "imported", 20, "voc2007"),
        ("imported", "voc2007-official", "imported", 20, "voc2007"),
        ("imported", "imported", "imported", 20, None),
        ("imported", "coco2017", "imported", 80, None),
        ("table", "pets", "own", 20, None),
        ("scenes", "voc2007", "drawn", 20, None),
    ],
)
def test_the_papers_rows_follow_source_and_split(
    source: str, dataset: str, split: str, labels: int, found: str | None
) -> None:
    metrics = make_metrics(1, {str(label): 1.0 for label in range(labels)})
    evaluation = make_evaluation(metrics, dataset=dataset, split=f"{split}/test")
    assert paper_results(source, evaluation) == (None if found is None else PAPER[found])


def test_columns_are_those_of_the_data_set() -> None:
    assert PAPER["voc2007"].columns == ["mAP"]
    assert PAPER["nuswide"].columns == ["mAP", "CF1", "OF1", "top-3 CF1", "top-3 OF1"]
    assert len(PAPER["coco"].columns) == 13
    assert PAPER["voc2007"].ap["tvmonitor"] == 94.9
    assert PAPER["coco"].ap == {}


def test_variants_that_the_paper_has_are_ours() -> None:
    """Every row is one of ours, or there is a reason."""
    rows = {name for paper in PAPER.values() for name in paper.methods}
    assert set(VARIANT_NAMES.values()) | NOT_REPRODUCED.keys() == rows
    assert not set(VARIANT_NAMES.values()) & NOT_REPRODUCED.keys()
    assert {*ABLATIONS, "full"} <= set(variant_names())
    assert {name for name in VARIANT_NAMES if head_of_variant(name) == "gm-mlic"} == {
        *ABLATIONS,
        "full",
    }
    unknown = VARIANT_NAMES.keys() - set(variant_names())
    assert unknown <= {"hcp", "cnn-rnn", "srn", "ml-gcn", "ssgrl", "pla", "cma"}


def test_the_variant_with_published_settings_stands_for_the_same_row() -> None:
    assert method_of("ml-gcn") == method_of("ml-gcn-published") == "ML-GCN"
    assert method_of("max-pool") is None
    assert PAPER["coco"].row("ssgrl-published") == PAPER["coco"].methods["SSGRL"]


def test_the_presets_are_the_papers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    params = load_params()
    for dataset, paper in PAPER.items():
        assert params.extract[dataset].regions == paper.regions
        assert params.extract[dataset].size == 448
        train = params.train[dataset]
        assert train == TrainSettings(
            network=GmMlicSettings(latent_size=512, modules=2, node_norm=False),
            label_vectors="data/glove/glove.6B.zip/glove.6B.300d.txt",
            loss=WeightedLoss(beta=paper.beta),
            epochs=train.epochs,
            batch_size=train.batch_size,
        )


def test_the_preset_of_cocos_other_split_has_the_same_settings(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    params = load_params()
    for section in (params.detector, params.extract, params.train):
        assert section["coco2017"] == section["coco"]
    other = params.prepare["coco"].model_copy(update={"train": "train2017", "test": "val2017"})
    assert params.prepare["coco2017"] == other
