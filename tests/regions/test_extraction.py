"""What decides a cache's regions, which rows it has, and how a shard is extracted."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pytest
import torch
from builders import TINY, S, Scenes, draw_scenes, tiny_model
from torchvision.models.detection import FasterRCNN

from pipeline.datasets.manifest import COLUMNS, full_counts
from pipeline.datasets.scenes import KINDS
from pipeline.errors import MissingError
from pipeline.regions import extraction
from pipeline.regions.detection import detect, prepare_for_extraction
from pipeline.regions.detector import DetectorDescription, write_detector
from pipeline.regions.extraction import (
    ShardExtractor,
    ShardOutcome,
    blank_rows,
    extraction_recipe,
    extraction_settings,
    fill_rows,
    load_detector,
)
from pipeline.regions.plan import (
    ViewJob,
    ViewPlan,
    check_readable,
    image_digests,
    rows_digest,
)
from pipeline.regions.transforms import load_image, to_tensor, view_of
from pipeline.settings import ArchitectureSettings, ExtractSettings, Precision
from pipeline.shards.schema import AXES, Recipe, RegionRows, fingerprint, format_recipe
from pipeline.shards.shard import map_shard


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Scenes:
    return draw_scenes(tmp_path_factory.mktemp("scenes"))


# Recipes -----------------------------------------------------------------------------------------

EXTRACT = ExtractSettings(size=S, regions=6, feature_dtype="float32", batch_size=4)
DESCRIPTION = DetectorDescription("fit", TINY, ("background", *KINDS), "0" * 64)


def recipe(
    scenes: Scenes,
    description: DetectorDescription = DESCRIPTION,
    settings: ExtractSettings = EXTRACT,
    **changes: object,
) -> Recipe:
    """The recipe of a whole cache, with the digest of its images."""
    settings = settings.model_copy(update=changes)
    plan = ViewPlan(scenes.manifest, settings.views)
    digests = image_digests(scenes.manifest, scenes.root, contents=settings.hash_images, threads=2)
    images = rows_digest(digests[plan.image], plan.view)
    return {**extraction_recipe(description, settings), "images": images}


def with_column(scenes: Scenes, name: str, row: int, value: object) -> Scenes:
    """The same scenes with one value of the manifest changed."""
    rows = scenes.manifest.table.to_pylist()
    rows[row][name] = value
    table = pa.Table.from_pylist(rows, schema=COLUMNS)
    manifest = replace(scenes.manifest, counts=full_counts(table), table=table)
    return replace(scenes, manifest=manifest)


DECIDES = {
    "size": 96,
    "regions": 7,
    "score_threshold": 0.1,
    "nms_threshold": 0.6,
    "views": 2,
    "precision": "bfloat16",
    "feature_dtype": "float16",
    "hash_images": False,
    "whole": False,
}
DECIDES_CROPS = {"flip": False, "seed": 1}
DECIDES_NOTHING = {"rows_per_shard": 3, "batch_size": 2, "max_failures": 5}
OF_GIVEN_BOXES = {"boxes", "boxes_file"}  # tests/regions/test_given_boxes.py


def test_every_extract_setting_is_known_to_decide_or_not() -> None:
    known = {*DECIDES, *DECIDES_CROPS, *DECIDES_NOTHING, *OF_GIVEN_BOXES}
    assert known == set(ExtractSettings.model_fields)


@pytest.mark.parametrize("name", DECIDES)
def test_what_decides_the_regions_changes_the_recipe(scenes: Scenes, name: str) -> None:
    assert recipe(scenes, **{name: DECIDES[name]}) != recipe(scenes)


def test_a_recipe_without_whole_views_is_that_of_version_1(scenes: Scenes) -> None:
    """Caches that were made before there were such vectors keep their fingerprint."""
    new, former = recipe(scenes), recipe(scenes, whole=False)
    assert (new["format_version"], new["whole"]) == (2, True)
    assert former["format_version"] == 1
    assert "whole" not in former
    assert {**former, "format_version": 2, "whole": True} == new


def test_in_float32_the_fingerprint_is_that_of_caches_without_the_setting() -> None:
    """It was computed before there was a setting of the precision."""
    former = "4bf9a537e4c20e424a2fb0c2f7db4fa29efddc419a3176dc39a5be5d26de4258"
    assert fingerprint(extraction_recipe(DESCRIPTION, EXTRACT)) == former


@pytest.mark.parametrize("precision", get_args(Precision))
def test_the_settings_of_a_recipe_have_its_precision(precision: Precision) -> None:
    stored = extraction_recipe(DESCRIPTION, EXTRACT.model_copy(update={"precision": precision}))
    assert stored["compute_dtype"] == precision
    assert extraction_settings(stored).precision == precision


@pytest.mark.parametrize("whole", [True, False])
def test_the_settings_of_a_recipe_have_the_whole_view_where_it_was_stored(whole: bool) -> None:
    settings = EXTRACT.model_copy(update={"whole": whole})
    stored = extraction_recipe(DESCRIPTION, settings)
    assert extraction_recipe(DESCRIPTION, extraction_settings(stored)) == stored
    assert extraction_settings(stored).whole == whole


@pytest.mark.parametrize("name", DECIDES_CROPS)
def test_how_crops_are_drawn_counts_only_where_there_are_crops(scenes: Scenes, name: str) -> None:
    change = {name: DECIDES_CROPS[name]}
    assert recipe(scenes, **change) == recipe(scenes)
    assert recipe(scenes, views=2, **change) != recipe(scenes, views=2)


@pytest.mark.parametrize("name", DECIDES_NOTHING)
def test_how_the_work_is_divided_does_not_change_the_recipe(scenes: Scenes, name: str) -> None:
    assert recipe(scenes, **{name: DECIDES_NOTHING[name]}) == recipe(scenes)


@pytest.mark.parametrize("name", ArchitectureSettings.model_fields)
def test_every_part_of_the_architecture_changes_the_recipe(scenes: Scenes, name: str) -> None:
    other = {"norm": "frozen", "anchor_sizes": (8, 16, 32, 64, 127)}.get(name, 3)
    architecture = ArchitectureSettings.model_validate({**TINY.model_dump(), name: other})
    assert recipe(scenes, replace(DESCRIPTION, architecture=architecture)) != recipe(scenes)


def test_other_weights_change_the_recipe_and_class_names_do_not(scenes: Scenes) -> None:
    assert recipe(scenes, replace(DESCRIPTION, weights_sha256="1" * 64)) != recipe(scenes)
    assert recipe(scenes, replace(DESCRIPTION, classes=("a",), source="file")) == recipe(scenes)


def test_images_change_the_recipe_and_labels_do_not(tmp_path: Path) -> None:
    scenes = draw_scenes(tmp_path)
    changes: list[tuple[int, str, object]] = [(0, "labels", []), (0, "labels", [3])]
    for row, name, value in (*changes, (0, "width", None)):
        assert recipe(with_column(scenes, name, row, value)) == recipe(scenes)
    assert recipe(with_column(scenes, "image_id", 0, "another")) != recipe(scenes)
    # The same bytes at another path.
    content = (tmp_path / "images" / "train-00000.png").read_bytes()
    (tmp_path / "images" / "copy.png").write_bytes(content)
    assert recipe(with_column(scenes, "path", 0, "images/copy.png")) != recipe(scenes)
    # A test image has one view, a training image has `views`.
    moved = with_column(scenes, "split", 0, "test")
    assert recipe(moved, views=2) != recipe(scenes, views=2)


def test_without_hashes_only_the_sizes_of_files_count(tmp_path: Path) -> None:
    scenes = draw_scenes(tmp_path)
    path = tmp_path / scenes.manifest.table["path"][5].as_py()
    content = bytearray(path.read_bytes())
    before = {hashed: recipe(scenes, hash_images=hashed) for hashed in (True, False)}
    content[-1] ^= 1
    path.write_bytes(content)
    assert recipe(scenes, hash_images=True) != before[True]
    assert recipe(scenes, hash_images=False) == before[False]
    path.write_bytes(content + b"0")
    assert recipe(scenes, hash_images=False) != before[False]


def test_missing_images_are_named_before_anything_is_read(tmp_path: Path) -> None:
    scenes = draw_scenes(tmp_path)
    rows = scenes.manifest.table.to_pylist()
    for row in rows[7:9]:
        (tmp_path / row["path"]).unlink()
    with pytest.raises(
        MissingError,
        match=rf"2 of 14 images of tiny.*'{rows[7]['image_id']}'.*{tmp_path / rows[7]['path']}",
    ):
        recipe(scenes)


def test_unreadable_images_are_named_before_their_regions_are_dropped(tmp_path: Path) -> None:
    scenes = draw_scenes(tmp_path)
    plan = ViewPlan(scenes.manifest, 1)
    check_readable(plan, np.arange(14), tmp_path, threads=2)
    paths = [tmp_path / path for path in plan.paths.to_pylist()]
    for path in (paths[3], paths[5]):  # nobody can read these, not even root
        path.unlink()
        path.mkdir()
    check_readable(plan, np.array([0, 4]), tmp_path, threads=2)
    with pytest.raises(MissingError, match=rf"2 of 4 images.*{paths[3]}"):
        check_readable(plan, np.arange(2, 6), tmp_path, threads=2)


# One shard ---------------------------------------------------------------------------------------


def jobs_of(scenes: Scenes, views: int = 1) -> list[ViewJob]:
    plan = ViewPlan(scenes.manifest, views)
    return plan.jobs(np.arange(len(plan)))


def extract_rows(
    model: FasterRCNN, jobs: list[ViewJob], root: Path, settings: ExtractSettings
) -> RegionRows:
    rows, kept, outcome = ShardExtractor(model, settings, threads=2).detect(jobs, root)
    assert rows is not None
    assert kept.tolist() == list(range(len(jobs)))
    assert (outcome.rows, outcome.failures) == (len(jobs), ())
    assert outcome.busy > 0
    return rows


def test_rows_are_sound_and_do_not_depend_on_the_batch_size(scenes: Scenes) -> None:
    model, jobs = tiny_model(regions=EXTRACT.regions), jobs_of(scenes, 2)[:11]
    counts: list[int] = []
    rows, _, _ = ShardExtractor(model, EXTRACT, threads=3).detect(jobs, scenes.root, counts.append)
    assert rows is not None
    assert counts == [4, 4, 3]
    rows.check()
    assert [name.decode() for name in rows.image_id] == [job.image_id for job in jobs]
    assert rows.view.tolist() == [job.view for job in jobs]
    assert (rows.count == EXTRACT.regions).all()
    single = extract_rows(model, jobs, scenes.root, EXTRACT.model_copy(update={"batch_size": 1}))
    for field in ("boxes", "scores", "features"):
        np.testing.assert_allclose(getattr(single, field), getattr(rows, field), atol=1e-4)
    np.testing.assert_array_equal(single.classes, rows.classes)
    crop = view_of(
        load_image(scenes.root / jobs[1].path),
        1,
        size=S,
        image_id=jobs[1].image_id,
        seed=EXTRACT.seed,
        flip=EXTRACT.flip,
    )
    [alone] = detect(model, to_tensor(crop)[None])
    np.testing.assert_allclose(rows.features[1], alone.features.numpy(), atol=1e-4)


def test_a_row_has_the_vector_of_its_whole_view(scenes: Scenes) -> None:
    """Of crops, too. A detector that finds nothing has that vector as its only region's."""
    model, jobs = tiny_model(regions=EXTRACT.regions), jobs_of(scenes, 2)[:5]
    rows = extract_rows(model, jobs, scenes.root, EXTRACT)
    assert rows.whole is not None
    assert rows.whole.dtype == np.float32
    blind = EXTRACT.model_copy(update={"score_threshold": 0.999})
    alone = extract_rows(tiny_model(0.999, regions=6), jobs, scenes.root, blind)
    np.testing.assert_allclose(rows.whole, alone.features[:, 0], atol=1e-4)
    assert np.ptp(rows.whole, axis=0).max() > 1e-2  # the vectors of different views differ


def test_without_whole_views_the_regions_are_the_same(scenes: Scenes) -> None:
    model, jobs = tiny_model(regions=EXTRACT.regions), jobs_of(scenes)[:5]
    rows = extract_rows(model, jobs, scenes.root, EXTRACT)
    without = EXTRACT.model_copy(update={"whole": False})
    former = extract_rows(model, jobs, scenes.root, without)
    assert former.whole is None
    for field in former.fields:
        np.testing.assert_array_equal(getattr(rows, field), getattr(former, field), field)


def test_views_pass_through_the_backbone_once(scenes: Scenes) -> None:
    model, calls = tiny_model(regions=EXTRACT.regions), []
    model.backbone.register_forward_hook(lambda *_: calls.append(1))
    extract_rows(model, jobs_of(scenes)[:4], scenes.root, EXTRACT)
    assert len(calls) == 1


def test_rows_are_written_while_the_next_batch_is_computed(
    scenes: Scenes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the views of the batch after it are sent to the device before it is finished."""
    order: list[str] = []

    def noting(owner: Any, name: str, said: str) -> None:
        work = getattr(owner, name)

        def noted(*arguments: Any, **options: Any) -> Any:
            order.append(said)
            return work(*arguments, **options)

        monkeypatch.setattr(owner, name, noted)

    noting(ShardExtractor, "_sent", "send")
    noting(extraction, "convolve", "begin")
    noting(extraction, "find", "find")
    noting(extraction._Returning, "fill", "fill")
    extract_rows(tiny_model(regions=EXTRACT.regions), jobs_of(scenes)[:11], scenes.root, EXTRACT)
    first, middle, last = ["begin", "send", "find"], ["begin", "fill", "send", "find"], ["fill"]
    assert order == ["send", *first, *middle, "begin", "fill", "find", *last]


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_new_photographs_get_the_vector_that_the_cache_has(scenes: Scenes, dtype: str) -> None:
    """`predict` fills rows of its own; `extract` those of a shard."""
    settings = EXTRACT.model_copy(update={"feature_dtype": dtype})
    model, jobs = tiny_model(regions=settings.regions), jobs_of(scenes)[:4]
    cached = extract_rows(model, jobs, scenes.root, settings)
    views = [
        view_of(load_image(scenes.root / job.path), 0, size=S, image_id="", seed=0, flip=False)
        for job in jobs
    ]
    rows = blank_rows(4, model, settings)
    fill_rows(rows, model, torch.from_numpy(np.stack(views)))
    np.testing.assert_array_equal(rows.whole, cached.whole)


def test_a_row_without_detections_is_padded(scenes: Scenes) -> None:
    settings = EXTRACT.model_copy(update={"score_threshold": 0.999})
    rows = extract_rows(tiny_model(0.999, regions=6), jobs_of(scenes)[:2], scenes.root, settings)
    rows.check()
    assert rows.count.tolist() == [1, 1]
    assert rows.boxes[0].tolist() == [[0, 0, 1, 1], *[[0] * 4] * 5]


def test_a_detector_folder_extracts_as_the_model_it_was_written_from(
    scenes: Scenes, tmp_path: Path
) -> None:
    model, jobs = tiny_model(regions=EXTRACT.regions), jobs_of(scenes)[:3]
    description = write_detector(
        tmp_path,
        model.state_dict(),
        source="fit",
        architecture=TINY,
        classes=("background", *KINDS),
    )
    extractor = ShardExtractor(
        load_detector(tmp_path, description, EXTRACT).cpu(), EXTRACT, threads=2
    )
    common = extraction_recipe(description, EXTRACT)
    digests = image_digests(scenes.manifest, scenes.root, contents=True, threads=2)
    path = tmp_path / "regions-00000.h5"
    outcome = extractor.extract(
        jobs, digests[:3], scenes.root, path=path, dataset="tiny", recipe=common
    )
    assert (outcome.rows, outcome.failures) == (3, ())
    header, stored, _ = map_shard(path)
    images = rows_digest(digests[:3], np.zeros(3, np.int16))
    assert (header.recipe, header.dataset) == ({**common, "images": images}, "tiny")
    expected = extract_rows(prepare_for_extraction(model), jobs, scenes.root, EXTRACT)
    for field in AXES:
        np.testing.assert_array_equal(getattr(stored, field), getattr(expected, field), field)


def test_images_that_can_not_be_decoded_are_left_out_and_named(tmp_path: Path) -> None:
    """The second batch of four loses two images, which no others replace."""
    scenes = draw_scenes(tmp_path)
    model, jobs = tiny_model(regions=EXTRACT.regions), jobs_of(scenes)
    expected = extract_rows(model, jobs, tmp_path, EXTRACT)
    (tmp_path / jobs[4].path).write_bytes(b"broken")
    (tmp_path / jobs[7].path).unlink()
    digests = image_digests(draw_scenes(tmp_path / "again").manifest, tmp_path / "again",
                            contents=True, threads=1)  # fmt: skip
    counts: list[int] = []
    path = tmp_path / "regions-00000.h5"
    outcome = ShardExtractor(model, EXTRACT, threads=2).extract(
        jobs,
        digests,
        tmp_path,
        path=path,
        dataset="tiny",
        recipe=format_recipe(whole=True),
        on_images=counts.append,
    )
    assert counts == [4, 4, 4, 2]
    assert outcome.rows == 12
    assert [failure.image_id for failure in outcome.failures] == ["train-00004", "train-00007"]
    assert outcome.failures[0].path == jobs[4].path
    for failure in outcome.failures:
        assert str(tmp_path / failure.path) in failure.reason
    header, stored, _ = map_shard(path)
    kept = [n for n in range(14) if n not in (4, 7)]
    assert stored.image_id.tolist() == expected.image_id[kept].tolist()
    np.testing.assert_allclose(stored.features, expected.features[kept], atol=1e-4)
    # The digest covers only the rows that were written.
    assert header.recipe["images"] == rows_digest(digests[kept], np.zeros(12, np.int16))


def test_a_shard_of_broken_images_is_not_written(tmp_path: Path) -> None:
    jobs = [ViewJob("a", "a.png", 0), ViewJob("b", "b.png", 0)]
    for job in jobs:
        (tmp_path / job.path).write_bytes(b"")
    outcome = ShardExtractor(tiny_model(regions=6), EXTRACT, threads=1).extract(
        jobs,
        np.zeros((2, 32), np.uint8),
        tmp_path,
        path=tmp_path / "regions-00000.h5",
        dataset="tiny",
        recipe=format_recipe(whole=True),
    )
    assert outcome.rows == 0
    assert len(outcome.failures) == 2
    assert not (tmp_path / "regions-00000.h5").exists()


class Watched(torch.nn.Module):
    """A detector that counts the threads that are in it at once."""

    def __init__(self, model: FasterRCNN) -> None:
        super().__init__()
        self.model, self.inside, self.most = model, 0, 0
        self.transform, self.roi_heads, self.rpn = model.transform, model.roi_heads, model.rpn

    def backbone(self, views: torch.Tensor) -> dict[str, torch.Tensor]:
        self.inside += 1
        self.most = max(self.most, self.inside)
        maps: dict[str, torch.Tensor] = self.model.backbone(views)
        self.inside -= 1
        return maps


def test_threads_take_turns_at_the_detector(scenes: Scenes, tmp_path: Path) -> None:
    """Four shards at once give the same rows as one after the other."""
    model = Watched(tiny_model(regions=EXTRACT.regions))
    extractor = ShardExtractor(model, EXTRACT, threads=2)  # type: ignore[arg-type]
    jobs = jobs_of(scenes)
    parts = [jobs[n::4] for n in range(4)]
    expected = [extractor.detect(part, scenes.root)[0] for part in parts]
    outcomes: dict[int, ShardOutcome] = {}

    def work(number: int) -> None:
        outcomes[number] = extractor.extract(
            parts[number],
            np.zeros((len(parts[number]), 32), np.uint8),
            scenes.root,
            path=tmp_path / f"regions-{number:05d}.h5",
            dataset="tiny",
            recipe=format_recipe(whole=True),
        )

    workers = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert model.most == 1
    for number, rows in enumerate(expected):
        assert rows is not None
        assert outcomes[number].rows == len(rows)
        _, stored, _ = map_shard(tmp_path / f"regions-{number:05d}.h5")
        np.testing.assert_array_equal(stored.features, rows.features)
