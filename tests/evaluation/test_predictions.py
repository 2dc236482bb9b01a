"""predictions.parquet: what is written is read again, and what is not whole is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import DamagedError, MismatchError, MissingError
from pipeline.evaluation.predictions import read_scores, write_predictions

IDS = ["b", "a", "c"]
SCORES = np.random.default_rng(0).random((3, 2), np.float32)


def test_scores_come_back_with_their_images(tmp_path: Path) -> None:
    path = tmp_path / "predictions.parquet"
    regions = np.arange(6, dtype=np.int16).reshape(3, 2)
    write_predictions(path, IDS, SCORES, regions)
    for image_ids in (None, IDS):
        read_ids, scores = read_scores(path, image_ids)
        assert read_ids == IDS
        assert scores.dtype == np.float32
        np.testing.assert_array_equal(scores, SCORES)
    assert pq.read_table(path).column("regions").to_pylist() == regions.tolist()


@pytest.mark.parametrize("others", [["a", "b", "c"], IDS[:2]])
def test_other_images_are_refused(tmp_path: Path, others: list[str]) -> None:
    path = tmp_path / "predictions.parquet"
    write_predictions(path, IDS, SCORES, np.zeros((3, 2), np.int16))
    with pytest.raises(MismatchError, match=r"predictions\.parquet"):
        read_scores(path, others)


def test_a_file_that_is_missing_or_damaged_is_named(tmp_path: Path) -> None:
    path = tmp_path / "predictions.parquet"
    with pytest.raises(MissingError, match=r"predictions\.parquet"):
        read_scores(path)
    path.write_bytes(b"damaged")
    with pytest.raises(DamagedError, match=r"predictions\.parquet"):
        read_scores(path)
    pq.write_table(pa.table({"image_id": IDS}), path)
    with pytest.raises(DamagedError, match=r"predictions\.parquet.*scores"):
        read_scores(path)
