"""pipeline.api: files by name, a cache as a torch dataset, and the metrics of own scores."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from flows import Flow
from torch.utils.data import DataLoader

from pipeline.api import Prediction, RegionDataset, evaluate, load_run, open_cache
from pipeline.datasets.manifest import read_manifest
from pipeline.errors import GmpipeError, InputError
from pipeline.shards.reader import RegionCache

M = 4


def opened(made: Flow, *arguments: Any, **options: Any) -> RegionDataset:
    return open_cache(made / "cache/tiny", *arguments, **options)


def manifest_of(made: Flow) -> Path:
    return made / "data/tiny/prepared/manifest.parquet"


def test_a_cache_alone_is_all_its_rows(made: Flow) -> None:
    cache, dataset = RegionCache.open(made / "cache/tiny"), opened(made)
    assert len(dataset) == len(cache) == 24 * 2 + 12
    rows = cache.gather(range(len(cache)))
    for row, item in enumerate(dataset):
        assert item.keys() == {
            "image_id", "view", "features", "boxes", "scores", "classes", "mask"
        }  # fmt: skip
        assert item["image_id"] == rows.image_id[row].decode()
        assert item["view"] == rows.view[row]
        assert item["features"].dtype == torch.float32
        for field in ("features", "boxes", "scores", "classes"):
            assert np.array_equal(item[field].numpy(), getattr(rows, field)[row])
        assert item["mask"].tolist() == [i < rows.count[row] for i in range(M)]
    with pytest.raises(IndexError):
        dataset[len(dataset)]


@pytest.mark.parametrize("split", ["train", "test", None])
def test_with_a_manifest_it_has_labels_in_the_manifests_order(made: Flow, split: Any) -> None:
    manifest = read_manifest(manifest_of(made))
    dataset = opened(made, manifest_of(made), split)
    assert dataset.vocabulary == manifest.vocabulary
    expected = []
    for name in ("train", "test"):
        if split in (name, None):
            ids, truth = manifest.image_ids(name), manifest.truth(name)
            views = 2 if name == "train" else 1
            expected += [
                (image_id, view, row.tolist())
                for image_id, row in zip(ids, truth, strict=True)
                for view in range(views)
            ]
    actual = [(item["image_id"], item["view"], item["labels"].tolist()) for item in dataset]
    assert actual == expected


def test_one_view_and_fewer_regions(made: Flow) -> None:
    dataset = opened(made, manifest_of(made), "train", view=1, regions=2)
    assert len(dataset) == 24
    item, whole = dataset[3], opened(made, manifest_of(made), "train")[7]
    assert (item["image_id"], item["view"]) == (whole["image_id"], 1)
    assert item["features"].shape == (2, 8)
    assert torch.equal(item["features"], whole["features"][:2])


@pytest.mark.parametrize("split", ["train", None])
@pytest.mark.parametrize("view", [None, 0, 1])
def test_statistics_are_those_of_gmpipes_own_training(
    made: Flow, split: Any, view: int | None
) -> None:
    dataset = opened(made, manifest_of(made), split, view=view)
    saved = torch.load(made / "runs/tiny/full-s0/checkpoint.pt", weights_only=True)["state"]
    inputs = dataset.standardizer()
    for name in ("feature_mean", "feature_scale", "box_mean", "box_scale"):
        assert torch.equal(inputs.state_dict()[name], saved[f"inputs.{name}"]), name
    whole = opened(made, manifest_of(made), "train", view=0)
    real = torch.cat([item["features"][item["mask"]] for item in whole]).double()
    statistics = dataset.statistics()
    np.testing.assert_allclose(statistics.feature_mean, real.mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        statistics.feature_std, real.std(0, correction=0), rtol=1e-5, atol=1e-6
    )


def test_statistics_are_of_the_regions_that_are_returned(made: Flow) -> None:
    dataset = opened(made, manifest_of(made), "train", view=0, regions=1)
    first = torch.cat([item["features"] for item in dataset]).double()
    np.testing.assert_allclose(dataset.statistics().feature_mean, first.mean(0), rtol=1e-5)
    # Root mean square deviation of all components: less varying ones are divided by half of it.
    deviation = dataset.statistics().feature_std
    least = 0.5 * deviation.square().mean().sqrt()
    scale = dataset.standardizer(least_deviation=0.5).feature_scale
    torch.testing.assert_close(1 / scale, deviation.clamp(min=least))
    assert (deviation < least).any()


def test_statistics_are_never_of_test_images(made: Flow) -> None:
    for dataset in (opened(made), opened(made, manifest_of(made), "test")):
        for call in (dataset.statistics, dataset.standardizer):
            with pytest.raises(ValueError, match=r"training images.*split='train'"):
                call()


def test_evaluate_gives_the_numbers_of_a_run(made: Flow) -> None:
    run = made / "runs/tiny/full-s0"
    dataset = opened(made, manifest_of(made), "test", view=0)
    predictions = pq.read_table(run / "predictions.parquet")
    assert predictions["image_id"].to_pylist() == [item["image_id"] for item in dataset]
    truth = np.stack([item["labels"].numpy() for item in dataset])
    logits = np.array(predictions["logits"].to_pylist())
    metrics = evaluate(logits, truth, dataset.vocabulary or ()).to_json()
    written = json.loads((run / "metrics.json").read_text())
    assert metrics == {name: written[name] for name in metrics}


@pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_worker_processes_give_the_same_batches(made: Flow, context: str) -> None:
    dataset = opened(made, manifest_of(made), "train")
    dataset[0]  # a shard is open in this process when the others start

    def batches(workers: int) -> list[dict[str, Any]]:
        loader = DataLoader(
            dataset,
            batch_size=20,
            shuffle=True,
            generator=torch.Generator().manual_seed(3),
            num_workers=workers,
            multiprocessing_context=context if workers else None,
        )
        return list(loader)

    alone, together = batches(0), batches(2)
    assert [len(batch["image_id"]) for batch in alone] == [20, 20, 8]
    assert alone[0]["image_id"] != sorted(alone[0]["image_id"])
    for one, other in zip(alone, together, strict=True):
        assert one.keys() == other.keys()
        assert one["image_id"] == other["image_id"]
        for name in one.keys() - {"image_id"}:
            assert torch.equal(one[name], other[name]), name


def test_what_cannot_be_opened_says_why(made: Flow, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="manifest"):
        opened(made, split="train")
    for regions in (0, 5):
        with pytest.raises(ValueError, match=rf"regions={regions}\b.* 4\b"):
            opened(made, regions=regions)
    with pytest.raises(ValueError, match=r"split='dev'.*train, val, test"):
        opened(made, manifest_of(made), split="dev")
    with pytest.raises(ValueError, match=r"split='val'.*manifest\.parquet .* train, test$"):
        opened(made, manifest_of(made), split="val")
    with pytest.raises(GmpipeError, match=str(tmp_path)):
        open_cache(tmp_path)
    with pytest.raises(GmpipeError, match=r"manifest\.parquet"):
        opened(made, tmp_path / "manifest.parquet")


@pytest.mark.parametrize(
    ("split", "view", "there"),
    [
        (None, 3, "0, 1"),
        (None, -1, "0, 1"),
        ("train", 2, "0, 1"),
        ("train", -1, "0, 1"),
        ("test", 1, "0"),  # only training images have random crops
    ],
)
def test_a_view_that_no_image_has_names_those_there_are(
    made: Flow, split: Any, view: int, there: str
) -> None:
    for manifest in {None, manifest_of(made)} if split is None else {manifest_of(made)}:
        with pytest.raises(ValueError, match=rf"view={view}\b.*: {there}$"):
            opened(made, manifest, split, view=view)


def test_a_view_that_only_some_images_have_is_those_images(made: Flow) -> None:
    assert len(opened(made, view=1)) == len(opened(made, manifest_of(made), view=1)) == 24


def test_paths_may_be_text(made: Flow, tmp_path: Path) -> None:
    run = load_run(str(made / "runs/tiny/full-s0"), str(made / "data/tiny/detector"))
    photograph = made / "data/tiny/prepared/images/test-00000.png"
    absent = tmp_path / "absent.jpg"
    outcomes = list(run.predict_files([str(photograph), photograph, str(absent)]))
    assert [path for path, _ in outcomes] == [photograph, photograph, absent]
    text, path, missing = (outcome for _, outcome in outcomes)
    assert isinstance(text, Prediction)
    assert isinstance(path, Prediction)
    np.testing.assert_allclose(text.scores, path.scores, atol=1e-6)
    assert isinstance(missing, InputError)
    assert str(absent) in str(missing)
    for single in (str(photograph), photograph):
        with pytest.raises(TypeError, match=re.escape(repr(str(photograph)))):
            list(run.predict_files(single))  # type: ignore[arg-type]
    dataset = open_cache(str(made / "cache/tiny"), str(manifest_of(made)), "test")
    assert len(dataset) == 12
