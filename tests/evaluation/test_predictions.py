"""predictions.parquet: what is written is read again, and what is not whole is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import DamagedError, MismatchError, MissingError
from pipeline.evaluation.predictions import probabilities, read_logits, write_predictions

IDS = ["b", "a", "c"]
LOGITS = np.random.default_rng(0).normal(0, 20, (3, 2)).astype(np.float32)
REGIONS = np.arange(6, dtype=np.int16).reshape(3, 2)
REGIONS[1, 0] = -1  # none: the image as a whole


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_predictions(tmp_path / "predictions.parquet", IDS, LOGITS, REGIONS, checkpoint_sha256="c")
    return tmp_path / "predictions.parquet"


def test_logits_come_back_with_their_images(path: Path) -> None:
    for image_ids in (None, IDS):
        read_ids, logits = read_logits(path, checkpoint_sha256="c", labels=2, image_ids=image_ids)
        assert read_ids == IDS
        assert logits.dtype == np.float32
        np.testing.assert_array_equal(logits, LOGITS)
    table = pq.read_table(path)
    assert table.column("regions").to_pylist() == REGIONS.tolist()
    assert table.column("logits").to_pylist() == LOGITS.tolist()


@pytest.mark.parametrize("others", [["a", "b", "c"], IDS[:2]])
def test_other_images_are_refused(path: Path, others: list[str]) -> None:
    with pytest.raises(MismatchError, match=r"predictions\.parquet"):
        read_logits(path, checkpoint_sha256="c", labels=2, image_ids=others)


def test_predictions_of_another_network_are_refused(path: Path) -> None:
    with pytest.raises(MismatchError, match=r"predictions\.parquet.* c, expected d"):
        read_logits(path, checkpoint_sha256="d", labels=2)


def test_a_file_that_is_missing_or_damaged_is_named(path: Path) -> None:
    with pytest.raises(DamagedError, match=r"predictions\.parquet.* 3 finite logits"):
        read_logits(path, checkpoint_sha256="c", labels=3)
    LOGITS_WITH_NAN = np.where(REGIONS == 3, np.float32("nan"), LOGITS)
    write_predictions(path, IDS, LOGITS_WITH_NAN, REGIONS, checkpoint_sha256="c")
    with pytest.raises(DamagedError, match="finite"):
        read_logits(path, checkpoint_sha256="c", labels=2)
    path.write_bytes(b"damaged")
    with pytest.raises(DamagedError, match=r"predictions\.parquet"):
        read_logits(path, checkpoint_sha256="c", labels=2)
    pq.write_table(pa.table({"image_id": IDS}), path)
    with pytest.raises(DamagedError, match=r"predictions\.parquet"):
        read_logits(path, checkpoint_sha256="c", labels=2)
    path.unlink()
    with pytest.raises(MissingError, match=r"predictions\.parquet"):
        read_logits(path, checkpoint_sha256="c", labels=2)


def test_probabilities_keep_what_float32_would_lose() -> None:
    logits = np.array([17.5, 18.5, 30.0, -200.0, 0.0], np.float32)
    expected = [1 / (1 + np.exp(-x)) for x in logits.astype(float)]
    np.testing.assert_allclose(probabilities(logits), expected, rtol=1e-15)
    assert len(set(probabilities(logits))) == 5
    assert len(set(probabilities(logits).astype(np.float32))) == 3
