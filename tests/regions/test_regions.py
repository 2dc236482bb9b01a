"""Images -> regions: torchvision's detector re-used faithfully, views, weights, fitting, recipes.

The detector is the real architecture made very narrow, with random weights from a seed; a score
threshold of 0 lets it find regions all the same.

Letters: B images of a batch, S side of a view in pixels, n regions found.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch
from builders import CLASSES, TINY, S, Scenes, draw_scenes, tiny_model
from PIL import Image
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, fasterrcnn_resnet50_fpn
from torchvision.ops import FrozenBatchNorm2d

from pipeline.datasets.manifest import ImageBoxes
from pipeline.datasets.scenes import KINDS
from pipeline.errors import GmpipeError
from pipeline.files import sha256_file
from pipeline.regions import fitting
from pipeline.regions.detection import Detections, detect
from pipeline.regions.detector import (
    DESCRIPTION_FILE,
    TORCHVISION_WEIGHTS,
    WEIGHTS_FILE,
    DetectorDescription,
    build_model,
    class_count,
    fit_state,
    load_state,
    read_description,
    torchvision_weights_file,
    write_detector,
)
from pipeline.regions.fitting import (
    fit_detector,
    match_detections,
    measure_detector,
    split_holdout,
)
from pipeline.regions.transforms import load_image, to_tensor, view_of
from pipeline.settings import ArchitectureSettings, FitSettings


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Scenes:
    return draw_scenes(tmp_path_factory.mktemp("scenes"))


@pytest.fixture(scope="module")
def detector() -> FasterRCNN:
    return tiny_model()


# The model ---------------------------------------------------------------------------------------


def test_the_default_architecture_is_torchvisions() -> None:
    ours = build_model(
        ArchitectureSettings(), 91, size=S, regions=5, score_threshold=0, nms_threshold=0.5
    )
    theirs = fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=91)

    def shapes(model: nn.Module) -> dict[str, torch.Size]:
        # Random weights of torchvision's own have BatchNorm2d, its COCO weights are frozen.
        state = model.state_dict()
        return {k: v.shape for k, v in state.items() if not k.endswith("num_batches_tracked")}

    assert shapes(ours) == shapes(theirs)
    assert list(ours.state_dict()) == list(shapes(theirs))
    norms = [m for m in ours.modules() if isinstance(m, FrozenBatchNorm2d)]
    assert len(norms) == 53
    assert {norm.eps for norm in norms} == {0.0}
    assert not any(isinstance(m, nn.BatchNorm2d) for m in ours.modules())
    assert (ours.rpn.anchor_generator.sizes, ours.rpn.anchor_generator.aspect_ratios) == (
        theirs.rpn.anchor_generator.sizes,
        theirs.rpn.anchor_generator.aspect_ratios,
    )
    assert ours.rpn._pre_nms_top_n == theirs.rpn._pre_nms_top_n
    assert ours.rpn._post_nms_top_n == theirs.rpn._post_nms_top_n


# Detection ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 5])
def test_detect_is_the_models_own_forward(detector: FasterRCNN, scenes: Scenes, batch: int) -> None:
    seen: set[int] = set()
    for views in scenes.views[:10].split(batch):
        with torch.inference_mode():
            expected = detector(list(views))
        found = detect(detector, views)
        assert len(found) == len(views)
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.boxes.shape == theirs["boxes"].shape
            assert (ours.boxes * S - theirs["boxes"]).abs().max() < 0.05
            torch.testing.assert_close(ours.scores, theirs["scores"], atol=1e-6, rtol=1e-5)
            assert torch.equal(ours.classes, theirs["labels"])
            seen |= set(ours.classes.tolist())
    assert len(seen) > 3


def test_regions_are_sound_and_features_belong_to_their_boxes(
    detector: FasterRCNN, scenes: Scenes
) -> None:
    views = scenes.views[:4]
    heads = detector.roi_heads
    for found in (detect(detector, views), detect(tiny_model(0.999), views)):
        with torch.inference_mode():
            images, _ = detector.transform(list(views))
            pooled = heads.box_roi_pool(
                detector.backbone(images.tensors),
                [image.boxes * S for image in found],
                images.image_sizes,
            )
            expected = heads.box_head(pooled).split([len(image.boxes) for image in found])
        for image, features in zip(found, expected, strict=True):
            assert image.features.shape == (len(image.scores), TINY.feature_size)
            error = (image.features - features).norm(dim=1)
            assert (error <= 1e-3 * features.norm(dim=1)).all()
            assert (features.norm(dim=1) > 0).all()
            assert (image.scores[1:] <= image.scores[:-1]).all()
            assert ((image.boxes >= 0) & (image.boxes <= 1)).all()
            assert (image.boxes[:, 2:] > image.boxes[:, :2]).all()


def test_where_nothing_is_found_the_whole_view_stands_in(scenes: Scenes) -> None:
    for found in detect(tiny_model(score_threshold=0.999), scenes.views[:3]):
        assert found.boxes.tolist() == [[0, 0, 1, 1]]
        assert found.scores.tolist() == [0]
        assert found.classes.tolist() == [0]


def test_a_stand_in_leaves_the_batchs_other_images_alone(scenes: Scenes) -> None:
    model, views = tiny_model(), scenes.views[:4]
    plain = detect(model, views)
    best = sorted(image.scores[0].item() for image in plain)
    model.roi_heads.score_thresh = (best[1] + best[2]) / 2
    mixed = detect(model, views)
    empty = [image.scores[0].item() == 0 for image in mixed]
    assert sum(empty) == 2
    for image, before, stands_in in zip(mixed, plain, empty, strict=True):
        if not stands_in:
            n = len(image.scores)
            torch.testing.assert_close(image.boxes, before.boxes[:n])
            torch.testing.assert_close(image.features, before.features[:n], atol=1e-5, rtol=1e-4)


def test_views_of_another_size_are_refused(detector: FasterRCNN) -> None:
    with pytest.raises(ValueError, match="for a model of size"):
        detect(detector, torch.zeros(1, 3, S, 2 * S))
    with pytest.raises(ValueError, match="for a model of size"):
        detect(detector, torch.zeros(1, 3, 2 * S, 2 * S))


def test_no_more_regions_than_asked_for_and_the_best_ones(
    detector: FasterRCNN, scenes: Scenes
) -> None:
    views = scenes.views[:2]
    for few, many in zip(
        detect(tiny_model(regions=3), views), detect(detector, views), strict=True
    ):
        assert len(many.scores) > 3
        torch.testing.assert_close(few.scores, many.scores[:3])


# Views -------------------------------------------------------------------------------------------


def ramps(width: int = 240, height: int = 120) -> Image.Image:
    """Red is x, green is y: a crop shows where it was taken from."""
    red, green = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray(np.stack([red, green, np.zeros_like(red)], axis=2).astype(np.uint8))


def view(image: Image.Image, number: int, key: str = "a", seed: int = 0, flip: bool = True) -> Any:
    return view_of(image, number, size=S, image_id=key, seed=seed, flip=flip)


def test_view_0_is_the_plain_resize() -> None:
    image = ramps()
    expected = np.asarray(image.resize((S, S), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(view(image, 0), expected)
    np.testing.assert_array_equal(view(image, 0, key="b", seed=9), expected)


def test_other_views_depend_on_seed_image_and_number_alone() -> None:
    image = ramps()
    first = view(image, 1)
    np.random.default_rng(1).random()
    torch.manual_seed(7)
    np.testing.assert_array_equal(view(image.copy(), 1), first)
    others = [view(image, 0), view(image, 2), view(image, 1, key="b"), view(image, 1, seed=1)]
    for place, other in enumerate(others):
        for another in [first, *others[:place]]:
            assert (other != another).any()


def crop_of(found: np.ndarray) -> tuple[float, float, float, float, bool]:
    """Left, top, width, height in pixels of `ramps`, and whether mirrored."""
    row, column = found[S // 2, :, 0].astype(float), found[:, S // 2, 1].astype(float)
    mirrored = bool(row[0] > row[-1])
    if mirrored:
        row = row[::-1]
    # From a quarter to three quarters of the view: its ends are averaged with less.
    quarter, rest = S // 4, 3 * S // 4
    width = (row[rest] - row[quarter]) * S / (rest - quarter)
    height = (column[rest] - column[quarter]) * S / (rest - quarter)
    left = row[quarter] + 0.5 - width * (quarter + 0.5) / S
    top = column[quarter] + 0.5 - height * (quarter + 0.5) / S
    return left, top, width, height, mirrored


def test_crops_have_half_to_all_of_each_side_and_half_are_mirrored() -> None:
    image = ramps()
    crops = np.array([crop_of(view(image, 1 + n % 3, key=f"image-{n}")) for n in range(300)])
    left, top, width, height, mirrored = crops.T
    for start, side, full in ((left, width, 240), (top, height, 120)):
        slack = 4.0  # what rounding to 8 bits leaves uncertain
        assert side.min() >= full / 2 - slack
        assert side.max() <= full + slack
        assert start.min() >= -slack
        assert (start + side).max() <= full + slack
        # Not only inside these bounds, but all over them.
        assert side.min() < 0.55 * full
        assert side.max() > 0.95 * full
        assert start.min() < 0.05 * full
        assert (start + side).max() > 0.95 * full
    assert abs(np.corrcoef(width / 240, height / 120)[0, 1]) < 0.25
    assert 0.4 < mirrored.mean() < 0.6


def test_without_flip_nothing_is_mirrored_and_crops_are_the_same() -> None:
    image = ramps()
    for n in range(60):
        plain = view(image, 1, key=f"image-{n}", flip=False)
        assert not crop_of(plain)[4]
        flipped = view(image, 1, key=f"image-{n}")
        same = flipped[:, ::-1] if crop_of(flipped)[4] else flipped
        np.testing.assert_array_equal(same, plain)


def test_to_tensor_scales_and_puts_channels_first() -> None:
    found = to_tensor(np.array([[[0, 51, 255], [102, 0, 0]]], dtype=np.uint8))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.tensor([[[0.0, 0.4]], [[0.2, 0.0]], [[1.0, 0.0]]]))


def turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """What a viewer shows of stored pixels (H, W, 3), by the EXIF standard's table."""
    swapped = pixels.transpose(1, 0, 2)
    return {
        1: pixels,
        2: pixels[:, ::-1],
        3: pixels[::-1, ::-1],
        4: pixels[::-1],
        5: swapped,
        6: swapped[:, ::-1],
        7: swapped[::-1, ::-1],
        8: swapped[::-1],
    }[orientation]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int) -> None:
    pixels = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3) * 10
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    np.testing.assert_array_equal(
        np.asarray(load_image(tmp_path / "turned.png")), turned(pixels, orientation)
    )


@pytest.mark.parametrize(
    ("mode", "suffix", "expected"),
    [
        ("L", "png", (92, 92, 92)),
        ("LA", "png", (92, 92, 92)),
        ("1", "png", (255, 255, 255)),
        ("P", "png", (200, 40, 60)),
        ("P", "gif", (200, 40, 60)),
        ("RGBA", "png", (200, 40, 60)),
        ("CMYK", "tif", (200, 40, 60)),
        ("CMYK", "jpg", (200, 40, 60)),
    ],
)
def test_every_kind_of_image_becomes_rgb(
    tmp_path: Path, mode: str, suffix: str, expected: tuple[int, ...]
) -> None:
    source = Image.new("RGB", (16, 8), (200, 40, 60))
    if mode == "1":
        source = Image.new("RGB", (16, 8), (255, 255, 255))
    if mode == "P":
        source = source.quantize(4)
    path = tmp_path / f"image.{suffix}"
    source.convert(mode).save(path)
    with Image.open(path) as stored:
        assert stored.mode == mode
    found = load_image(path)
    assert (found.mode, found.size) == ("RGB", (16, 8))
    assert np.abs(np.asarray(found, dtype=int) - expected).max() <= 4


def test_a_missing_image_is_named(tmp_path: Path) -> None:
    with pytest.raises(GmpipeError, match=f"no image at {tmp_path / 'absent.png'}"):
        load_image(tmp_path / "absent.png")


@pytest.mark.parametrize("damage", ["no image", "cut off", "empty", "folder"])
def test_a_broken_image_is_named(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "broken.png"
    ramps().save(path)
    content = path.read_bytes()
    path.unlink()
    if damage == "folder":
        path.mkdir()
    else:
        path.write_bytes({"no image": b"text", "empty": b""}.get(damage, content[:200]))
    with pytest.raises(GmpipeError, match=f"{path} can't be decoded .*Replace the file"):
        load_image(path)


# Weights -----------------------------------------------------------------------------------------


def test_weights_that_are_missing_or_something_else(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    with pytest.raises(GmpipeError, match=f"no detector weights at {path}.*detector.<dataset>"):
        load_state(path)
    path.write_bytes(b"not a file of torch")
    with pytest.raises(GmpipeError, match=f"{path} is not a state dict"):
        load_state(path)
    for something in ([torch.zeros(1)], {"model": {"a": torch.zeros(1)}}, torch.zeros(1)):
        torch.save(something, path)
        with pytest.raises(GmpipeError, match=f"{path} is not a state dict"):
            load_state(path)
    torch.save(torch.nn.Linear(1, 1), path)  # loading it whole would run code from the file
    with pytest.raises(GmpipeError, match=f"{path} is not a state dict"):
        load_state(path)


CLASSIFIER = "roi_heads.box_predictor.cls_score.weight"
FIRST_NORM = "backbone.body.bn1.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({CLASSIFIER: torch.zeros(91, 8)}, rf"{CLASSIFIER}` has shape \(91, 8\).*\(12, 8\)"),
        ({FIRST_NORM: None}, f"lacks weights .*: 1, the first is `{FIRST_NORM}`"),
        ({"odd": torch.zeros(1)}, "has weights that the architecture lacks: 1, .*`odd`"),
        ({CLASSIFIER: None}, f"no `{CLASSIFIER}`: these are not a Faster R-CNN's weights"),
    ],
    ids=["shape", "missing", "unknown", "no detector"],
)
def test_weights_that_do_not_fit(
    detector: FasterRCNN, change: dict[str, Tensor | None], message: str
) -> None:
    changed = {**detector.state_dict(), **change}
    state = {key: value for key, value in changed.items() if value is not None}
    with pytest.raises(GmpipeError, match=rf"^some/file\.pt.*{message}") as caught:
        fit_state(tiny_model(), state, Path("some/file.pt"))
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(("weights", "architecture"), [("batch", "frozen"), ("frozen", "batch")])
def test_the_other_kind_of_batch_norm_is_refused(weights: str, architecture: str) -> None:
    state = tiny_model(norm=weights).state_dict()
    fit_state(tiny_model(norm=weights), state, Path("w.pt"))
    with pytest.raises(
        GmpipeError,
        match=rf"^w\.pt holds weights with norm `{weights}`, the architecture has "
        rf"`{architecture}`.*detector\.<dataset>\.architecture",
    ):
        fit_state(tiny_model(norm=architecture), state, Path("w.pt"))


def test_weights_with_the_names_of_older_torchvision_releases_fit() -> None:
    """The published COCO file has them."""
    state = tiny_model(norm="frozen").state_dict()
    older = {}
    for key, value in state.items():
        key = re.sub(r"^(backbone\.fpn\.\w+_blocks\.\d)\.0", r"\1", key)
        older[key.replace("rpn.head.conv.0.0.", "rpn.head.conv.")] = value
    assert {"rpn.head.conv.weight", "backbone.fpn.inner_blocks.3.bias"} <= older.keys()
    model = tiny_model(norm="frozen")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    fit_state(model, older, Path("w.pt"))
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key])


def test_class_count(detector: FasterRCNN) -> None:
    assert class_count(detector.state_dict(), Path("w.pt")) == CLASSES


def write_tiny(folder: Path, model: FasterRCNN) -> DetectorDescription:
    folder.mkdir(exist_ok=True)
    return write_detector(
        folder,
        model.state_dict(),
        source="fit",
        architecture=TINY,
        classes=("background", *KINDS),
    )


def test_a_detector_is_written_alike_and_read_back(tmp_path: Path, detector: FasterRCNN) -> None:
    first = write_tiny(tmp_path / "a", detector)
    again = write_tiny(tmp_path / "b", tiny_model())
    assert first == again
    assert first.weights_sha256 == sha256_file(tmp_path / "b" / WEIGHTS_FILE)
    assert read_description(tmp_path / "a", "tiny") == first
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == sorted(
        [WEIGHTS_FILE, DESCRIPTION_FILE]
    )


def edit_description(folder: Path, **changes: object) -> None:
    path = folder / DESCRIPTION_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / WEIGHTS_FILE).write_bytes(b"x"), r"weights\.pt has sha256 .*changed or"),
        (lambda f: (f / WEIGHTS_FILE).unlink(), r"lacks weights\.pt"),
        (lambda f: (f / DESCRIPTION_FILE).unlink(), "there is no detector in"),
        (lambda f: edit_description(f, version=2), r"detector\.json has version 2.* reads 1"),
        (lambda f: edit_description(f, architecture={"a": 1}), r"detector\.json is damaged"),
        (lambda f: (f / DESCRIPTION_FILE).write_text("[]"), r"detector\.json is damaged"),
        (lambda f: (f / DESCRIPTION_FILE).write_text("{"), r"detector\.json is damaged"),
    ],
    ids=["weights", "no weights", "nothing", "version", "architecture", "list", "cut off"],
)
def test_a_changed_detector_is_refused(
    tmp_path: Path, detector: FasterRCNN, damage: Callable[[Path], object], message: str
) -> None:
    write_tiny(tmp_path, detector)
    damage(tmp_path)
    with pytest.raises(GmpipeError, match=rf"(?s){message}.*gmpipe detector --dataset tiny"):
        read_description(tmp_path, "tiny")


def test_torchvisions_weights_without_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_network(url: str, *arguments: object, **options: object) -> None:
        raise URLError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    place = tmp_path / "hub" / "checkpoints" / Path(TORCHVISION_WEIGHTS.url).name
    said: list[str] = []
    with pytest.raises(
        GmpipeError,
        match=f"{place}.*no route to host.*Put the file there.*{TORCHVISION_WEIGHTS.url}",
    ):
        torchvision_weights_file(said.append)
    assert len(said) == 1
    assert "160 MB" in said[0]
    place.write_bytes(b"weights")
    assert torchvision_weights_file(said.append) == place
    assert len(said) == 1


# Fitting -----------------------------------------------------------------------------------------

FIT = FitSettings(size=S, steps=6, batch_size=2, sampled_proposals=16, holdout=0.25, seed=3)


class Killed(Exception):
    """Stands for the end of a process."""


def fit(
    scenes: Scenes, state_file: Path, settings: FitSettings = FIT, killed_after: int = 0
) -> tuple[FasterRCNN, list[int]]:
    """The fitted model, and the steps that were done in this attempt."""
    steps: list[int] = []

    def on_step(done: int, loss: float) -> None:
        assert np.isfinite(loss)
        steps.append(done)
        if done == killed_after:
            raise Killed

    model = fit_detector(
        scenes.annotated, CLASSES, TINY, settings, state_file=state_file, on_step=on_step
    )
    return model, steps


def test_a_killed_fit_ends_as_an_undisturbed_one(
    scenes: Scenes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fitting, "_SAVE_EVERY", 2)
    whole, steps = fit(scenes, tmp_path / "a.pt")
    assert steps == [1, 2, 3, 4, 5, 6]
    assert not whole.training
    with pytest.raises(Killed):
        fit(scenes, tmp_path / "b.pt", killed_after=5)
    torch.manual_seed(99)
    resumed, steps = fit(scenes, tmp_path / "b.pt")
    assert steps == [5, 6]
    for key, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[key], value), key
    start = tiny_model().state_dict()
    assert not torch.equal(start[CLASSIFIER], whole.state_dict()[CLASSIFIER])


def test_fitting_from_given_weights_starts_there(scenes: Scenes, tmp_path: Path) -> None:
    initial = tiny_model().state_dict()
    still = FIT.model_copy(update={"steps": 1, "learning_rate": 1e-12, "weight_decay": 0.0})
    model = fit_detector(
        scenes.annotated,
        CLASSES,
        TINY,
        still,
        state_file=tmp_path / "state.pt",
        initial=(initial, Path("w.pt")),
    )
    torch.testing.assert_close(model.state_dict()[CLASSIFIER], initial[CLASSIFIER])


def test_weights_of_another_vocabulary_give_all_but_the_class_predictor(
    scenes: Scenes, tmp_path: Path
) -> None:
    initial = tiny_model().state_dict()
    still = FIT.model_copy(update={"steps": 1, "learning_rate": 1e-12, "weight_decay": 0.0})
    model = fit_detector(
        scenes.annotated,
        CLASSES + 1,
        TINY,
        still,
        state_file=tmp_path / "other.pt",
        initial=(initial, Path("w.pt")),
    )
    fitted = model.state_dict()
    assert len(fitted[CLASSIFIER]) == CLASSES + 1
    for key, value in fitted.items():
        same = "box_predictor" not in key and "running" not in key and "tracked" not in key
        if same:
            torch.testing.assert_close(value, initial[key])
    assert not torch.equal(fitted[CLASSIFIER][:CLASSES], initial[CLASSIFIER])


def test_mirrored_objects_move_with_their_images(scenes: Scenes) -> None:
    images, device = scenes.annotated[:8], torch.device("cpu")
    mirrored = 0
    for image in images:
        plain = to_tensor(np.asarray(load_image(image.path)))
        for step in range(4):
            [found], [target] = fitting._batch([image], step, FIT, device)
            boxes = torch.from_numpy(image.objects.boxes) * S
            if not torch.equal(found, plain):
                mirrored += 1
                assert torch.equal(found, plain.flip(-1))
                boxes = torch.stack([S - boxes[:, 2], boxes[:, 1], S - boxes[:, 0], boxes[:, 3]], 1)
            torch.testing.assert_close(target["boxes"], boxes)
            assert target["labels"].tolist() == image.objects.classes.tolist()
    assert 4 < mirrored < 28


def test_every_epoch_takes_every_image_once() -> None:
    taken = [n for step in range(5) for n in fitting._batch_numbers(step, 4, 10, seed=1)]
    assert sorted(taken[:10]) == sorted(taken[10:]) == list(range(10))
    assert taken[:10] != taken[10:]
    assert taken[:4] != fitting._batch_numbers(0, 4, 10, seed=2)


def test_holdout_is_disjoint_and_seeded(scenes: Scenes) -> None:
    images = scenes.annotated
    kept, held = split_holdout(images, FIT)
    assert len(held) == 3
    names = [image.image_id for image in images]
    for part in (kept, held):
        places = [names.index(image.image_id) for image in part]
        assert places == sorted(places)
    assert sorted(image.image_id for image in kept + held) == names
    assert [i.image_id for i in split_holdout(images, FIT)[1]] == [i.image_id for i in held]
    others = {
        tuple(i.image_id for i in split_holdout(images, FIT.model_copy(update={"seed": n}))[1])
        for n in range(5)
    }
    assert len(others) > 1
    for share in (0.001, 0.999):
        parts = split_holdout(images, FIT.model_copy(update={"holdout": share}))
        assert min(map(len, parts)) == 1


def detections(*rows: tuple[float, int, Sequence[float]]) -> Detections:
    """Score, class, box of each."""
    return Detections(
        boxes=torch.tensor([box for _, _, box in rows], dtype=torch.float32).reshape(-1, 4),
        scores=torch.tensor([score for score, _, _ in rows]),
        classes=torch.tensor([number for _, number, _ in rows], dtype=torch.int64),
        features=torch.zeros(len(rows), 1),
    )


def objects(*rows: tuple[int, Sequence[float]]) -> ImageBoxes:
    """Class, box of each."""
    return ImageBoxes(
        np.array([number for number, _ in rows], dtype=np.int64),
        np.array([box for _, box in rows], dtype=np.float32).reshape(-1, 4),
    )


def test_detections_that_find_an_object() -> None:
    first, second = (0.0, 0.0, 0.4, 0.4), (0.5, 0.5, 0.9, 0.9)
    found = detections(
        (0.9, 1, first),
        (0.8, 1, first),  # the object is taken
        (0.7, 1, second),  # another class
        (0.6, 2, (0.5, 0.5, 0.9, 0.5 + 0.4 * 0.49)),  # IoU 0.49
        (0.5, 2, (0.5, 0.5, 0.9, 0.5 + 0.4 * 0.51)),  # IoU 0.51
        (0.4, 2, second),  # better, but later
    )
    there = objects((1, first), (2, second))
    expected = [True, False, False, False, True, False]
    assert match_detections(found, there).tolist() == expected
    assert match_detections(found, there, iou=0.52).tolist() == [True, *[False] * 4, True]
    assert match_detections(found, objects()).tolist() == [False] * 6
    assert match_detections(detections(), there).tolist() == []


def test_a_second_detection_takes_the_neighbour_that_is_free() -> None:
    box, beside = (0.0, 0.0, 0.4, 0.4), (0.0, 0.0, 0.4, 0.3)
    found = detections((0.9, 1, box), (0.8, 1, box), (0.7, 1, box))
    assert match_detections(found, objects((1, beside), (1, box))).tolist() == [True, True, False]


def test_measures_of_a_detector(scenes: Scenes, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stub that finds one object surely, has one sure mistake, then finds the rest unsurely."""
    images = scenes.annotated
    given = iter(images)

    def stub(model: nn.Module, views: Tensor) -> list[Detections]:
        answers = []
        for _ in views:
            there = next(given).objects
            rows = list(zip(there.classes.tolist(), there.boxes.tolist(), strict=True))
            found = [(0.4, number, box) for number, box in rows]
            found[0] = (0.9, *rows[0])
            # An object of no class stands nowhere.
            answers.append(detections(found[0], (0.6, 99, (0, 0, 1, 1)), *found[1:]))
        return answers

    monkeypatch.setattr(fitting, "detect", stub)
    measured = measure_detector(nn.Linear(1, 1), images, FIT)  # type: ignore[arg-type]
    sizes = [len(image.objects.classes) for image in images]
    assert max(sizes) > 4  # or recall at 5 would be 100
    assert measured["images"] == len(images)
    assert measured["objects"] == sum(sizes)
    for m in (5, 10, 20, 35):
        hits = sum(min(size, m - 1) for size in sizes)
        assert measured["recall_at"][str(m)] == round(100 * hits / sum(sizes), 2)
    assert measured["precision"] == 50.0
