"""Splits: which rows and labels they have, how many regions, and the parts that are cut off.

`toys` describes the toy problem and its letters.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from builders import make_rows
from toys import N_TRAIN, VECTORS, VIEWS, C, M, Toy

from pipeline.errors import GmpipeError, InputError
from pipeline.learning.splits import (
    instance_batch,
    label_set,
    open_split,
    split_validation,
    training_part,
)


def test_an_opened_split_has_every_view_in_the_order_of_the_manifest(toy: Toy) -> None:
    split = toy.train
    assert len(split) == N_TRAIN
    assert split.image_ids == [f"image-{n}" for n in range(N_TRAIN)]
    for view in range(VIEWS):
        rows = toy.cache.gather(split.rows[:, view])
        assert [name.decode() for name in rows.image_id] == split.image_ids
        assert set(rows.view.tolist()) == {view}
    assert split.truth[4].tolist() == [0, -1, 0]
    np.testing.assert_array_equal(split.truth, toy.manifest.truth("train"))
    with pytest.raises(GmpipeError, match="no view 2 of image 'image-0'"):
        open_split(toy.cache, toy.manifest, "train", VIEWS + 1)


def test_instances_come_from_the_requested_views(toy: Toy) -> None:
    split = toy.train
    images, views = np.array([7, 2, 30]), np.array([1, 0, 1])
    batch = split.instances(images, views)
    for number, (image, view) in enumerate(zip(images, views, strict=True)):
        stored = toy.cache.gather([split.rows[image, view]])
        np.testing.assert_array_equal(batch.features[number], stored.features[0])
    taken = split.take(images)
    assert taken.image_ids == ["image-7", "image-2", "image-30"]
    np.testing.assert_array_equal(taken.truth, split.truth[images])
    assert torch.equal(taken.instances(np.arange(3), views).features, batch.features)


@pytest.mark.parametrize("regions", [1, 2, M])
def test_a_split_can_use_only_the_best_regions(toy: Toy, regions: int) -> None:
    split = open_split(toy.cache, toy.manifest, "test", regions=regions)
    stored = toy.cache.gather(split.rows[:, 0])
    batch = split.instances(np.arange(len(split)))
    assert batch.mask.shape == (len(split), regions)
    assert batch.mask.sum(1).tolist() == [min(count, regions) for count in stored.count]
    for name in ("features", "boxes", "scores", "classes"):
        np.testing.assert_array_equal(getattr(batch, name), getattr(stored, name)[:, :regions])
    assert split.take(np.arange(2)).regions == regions


def test_more_regions_than_the_cache_holds_are_an_error(toy: Toy) -> None:
    with pytest.raises(
        InputError,
        match=r"train\.toy\.regions is 4\b.*\btoy\b.* 3 .*Lower .* to 3\b.*extract\.toy\.regions",
    ):
        open_split(toy.cache, toy.manifest, "train", regions=4)


def test_an_instance_batch_masks_padding() -> None:
    rows = make_rows(5, regions=3)
    batch = instance_batch(rows)
    assert batch.mask.tolist() == [
        [True, False, False],
        [True, True, False],
        [True, True, True],
        [True, False, False],
        [True, True, False],
    ]
    assert batch.features.dtype == torch.float16  # as stored
    for name in ("features", "boxes", "scores", "classes"):
        np.testing.assert_array_equal(getattr(batch, name).numpy(), getattr(rows, name))


def test_an_instance_batch_has_the_vectors_of_whole_views() -> None:
    rows = make_rows(4)
    assert instance_batch(rows).whole is None
    whole = np.arange(20, dtype=np.float16).reshape(4, 5)
    batch = instance_batch(replace(rows, whole=whole), regions=1)
    assert batch.whole is not None
    np.testing.assert_array_equal(batch.whole.numpy(), whole)
    assert batch.whole.dtype == torch.float16  # as stored


# Labels ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_statistics_of_the_labels_are_counted_by_plain_loops(toy: Toy, seed: int) -> None:
    """Ignored labels count as absent. No image has label 1."""
    truth = np.random.default_rng(seed).integers(-1, 2, (N_TRAIN, C)).astype(np.int8)
    truth[:, 1] = np.minimum(truth[:, 1], 0)
    assert set(truth[:, 0].tolist()) == {-1, 0, 1}
    known = label_set(replace(toy.train, truth=truth), VECTORS, conditional=True)
    assert known.conditional is not None
    assert known.ratio.dtype == known.conditional.dtype == known.vectors.dtype == torch.float32
    np.testing.assert_array_equal(known.vectors.numpy(), VECTORS.vectors)
    for i in range(C):
        images = [row for row in truth.tolist() if row[i] == 1]
        assert known.ratio[i].item() == pytest.approx(len(images) / N_TRAIN)
        for j in range(C):
            both = len([row for row in images if row[j] == 1])
            expected = 0 if i == j or not images else both / len(images)
            assert known.conditional[i, j].item() == pytest.approx(expected), (i, j)
    assert not known.conditional[1].any()
    assert not known.conditional[:, 1].any()
    assert known.conditional[0, 2] != known.conditional[2, 0]


def test_co_occurrence_is_counted_only_for_heads_that_read_it(toy: Toy) -> None:
    assert label_set(toy.train, VECTORS, conditional=False).conditional is None


def test_what_is_known_of_the_labels_moves_to_a_device(toy: Toy) -> None:
    for conditional in (True, False):
        known = label_set(toy.train, VECTORS, conditional=conditional).to(torch.device("meta"))
        assert known.vectors.device == known.ratio.device == torch.device("meta")
        assert (known.conditional is not None) == conditional
        assert known.conditional is None or known.conditional.is_meta


# Parts -------------------------------------------------------------------------------------------


def test_validation_is_disjoint_and_seeded(toy: Toy) -> None:
    split = toy.train
    kept, held_out = split_validation(split, 0.25, seed=1)
    assert len(held_out) == round(0.25 * N_TRAIN)
    assert sorted([*kept.image_ids, *held_out.image_ids]) == sorted(split.image_ids)
    for part in (kept, held_out):
        indices = [split.image_ids.index(name) for name in part.image_ids]
        assert indices == sorted(indices)
        np.testing.assert_array_equal(part.truth, split.truth[indices])
        np.testing.assert_array_equal(part.rows, split.rows[indices])
    assert split_validation(split, 0.25, seed=1)[1].image_ids == held_out.image_ids
    assert split_validation(split, 0.25, seed=2)[1].image_ids != held_out.image_ids
    for share in (0.0001, 0.9999):
        assert min(map(len, split_validation(split, share, seed=0))) == 1


@pytest.mark.parametrize("seed", range(3))
def test_the_images_of_a_smaller_share_are_among_those_of_a_larger_one(toy: Toy, seed: int) -> None:
    split = replace(toy.train, left_out=5)
    before: list[str] = []
    for share, size in ((1e-9, 1), (0.05, 2), (0.1, 4), (0.5, 21), (0.99, 42), (1.0, N_TRAIN)):
        part = training_part(split, share, seed)
        assert len(part) == size
        assert set(before) < set(part.image_ids) or len(before) == size == N_TRAIN
        indices = [split.image_ids.index(name) for name in part.image_ids]
        assert indices == sorted(set(indices))
        np.testing.assert_array_equal(part.truth, split.truth[indices])
        np.testing.assert_array_equal(part.rows, split.rows[indices])
        assert part.left_out == 5
        before = list(part.image_ids)
    assert before == split.image_ids


def test_the_images_of_a_share_are_drawn_by_the_seed(toy: Toy) -> None:
    drawn = [training_part(toy.train, 0.25, seed).image_ids for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    # Not the first ones, and not those that the same share would validate on.
    assert drawn[0] != toy.train.image_ids[: len(drawn[0])]
    assert drawn[0] != split_validation(toy.train, 0.25, seed=0)[1].image_ids
