"""pipeline.datasets.scenes: labels follow from the rules, and from nothing else in an image.

A leak is tested with a classifier that is trained to find it: without a leak, its average
precision (AP) on fresh scenes stays within `NOISE` standard deviations of what the same scores
reach on shuffled labels, which is the prior. Each such test has a control with a leak, which the
same classifier must find.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from sklearn.decomposition import PCA
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score
from sklearn.pipeline import make_pipeline

from pipeline.datasets import scenes
from pipeline.datasets.manifest import REQUIRED_SPLITS, BoxTable, Manifest, Split, read_manifest
from pipeline.datasets.scenes import KINDS, SceneObject, draw_scene, make_scenes, sample_objects
from pipeline.settings import ScenesSettings
from stages.checkout.params import read_request
from stages.prepare import prepare

Array = NDArray[Any]
Box = tuple[float, float, float, float]
Scene = list[tuple[str, Box]]
"""The kind and the box, xyxy in [0,1], of each object."""

SIZE = 64
NOISE = 4  # standard deviations; one in 30,000 draws of pure noise exceeds them
DETECTED = 10


# --- an oracle: the rules in the module's docstring, from kinds and boxes alone ------------------


def center(box: Box) -> tuple[float, float]:
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2


def side_by_side(a: Box, b: Box) -> bool:
    """Whether the line between the centers is closer to the horizontal than to the vertical."""
    (ax, ay), (bx, by) = center(a), center(b)
    return abs(math.atan2(abs(ay - by), abs(ax - bx))) < math.pi / 4


def oracle(scene: Scene) -> dict[str, bool]:
    """Whether each label holds."""
    count = Counter(kind for kind, _ in scene)
    boxes = dict(scene)
    answer = {kind: count[kind] > 0 for kind in KINDS if kind not in ("disc", "triangle")}
    lit = count["star"] + count["lamp"] > 0
    answer |= {
        "night": lit,
        "moon": count["disc"] > 0 and lit,
        "sun": count["disc"] > 0 and not lit,
        "tent": min(count["triangle"], count["tree"]) > 0,
        "pyramid": count["triangle"] > 0 and count["tree"] == 0,
        "harbour": min(count["boat"], count["house"]) > 0,
        "village": count["house"] > 1,
        "chase": False,
        "catch": False,
    }
    if count["person"] and count["dog"]:
        answer["chase"] = side_by_side(boxes["person"], boxes["dog"])
    if count["boat"] and count["fish"]:
        answer["catch"] = not side_by_side(boxes["boat"], boxes["fish"])
    return answer


# --- the scenes under test -----------------------------------------------------------------------


@dataclass(frozen=True)
class Drawn:
    """A drawn data set with its images and boxes."""

    root: Path
    manifest: Manifest
    boxes: BoxTable
    images: dict[str, Image.Image]

    def scene(self, image_id: str) -> Scene:
        objects = self.boxes.images[image_id]
        kinds = [self.boxes.classes[number - 1] for number in objects.classes]
        return [(k, tuple(b)) for k, b in zip(kinds, objects.boxes.tolist(), strict=True)]

    def pictures(self, split: Split) -> Iterator[tuple[Image.Image, Scene]]:
        for image_id in self.manifest.image_ids(split):
            yield self.images[image_id], self.scene(image_id)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Drawn:
    root = tmp_path_factory.mktemp("scenes")
    settings = ScenesSettings(source="scenes", train=300, test=300, size=SIZE, seed=7)
    manifest, boxes = make_scenes(root / "prepared/images", "prepared/images", "tiny", settings)
    rows = manifest.table.to_pylist()
    images = {row["image_id"]: Image.open(root / row["path"]).convert("RGB") for row in rows}
    return Drawn(root, manifest, boxes, images)


@pytest.fixture(scope="module")
def sampled() -> list[Scene]:
    """Many scenes that are never drawn."""
    rng = np.random.default_rng(11)
    objects = (sample_objects(rng) for _ in range(4000))
    return [[(item.kind, item.box) for item in scene] for scene in objects]


# --- labels -------------------------------------------------------------------------


def test_oracle_predicts_every_label_of_drawn_scenes(drawn: Drawn) -> None:
    for split in REQUIRED_SPLITS:
        truth = drawn.manifest.truth(split)
        answers = [oracle(drawn.scene(key)) for key in drawn.manifest.image_ids(split)]
        for number, label in enumerate(drawn.manifest.vocabulary):
            scores = [float(answer[label]) for answer in answers]
            assert average_precision_score(truth[:, number], scores) == 1.0, label
            assert 0 < truth[:, number].sum() < len(truth), label


def test_oracle_predicts_every_label_of_many_scenes(sampled: list[Scene]) -> None:
    for scene in sampled:
        labels = scenes.scene_labels([SceneObject(kind, box) for kind, box in scene])
        assert labels == {label for label, holds in oracle(scene).items() if holds}


def test_no_label_is_rare_or_on_nearly_every_scene(sampled: list[Scene]) -> None:
    shares = Counter(label for scene in sampled for label, holds in oracle(scene).items() if holds)
    assert set(shares) == set(scenes.VOCABULARY)
    for label, count in shares.items():
        assert 0.15 < count / len(sampled) < 0.75, label


def test_objects_stay_inside_the_scene_and_overlap_little(sampled: list[Scene]) -> None:
    for scene in sampled:
        assert 1 <= len(scene) <= 12
        for index, (kind, a) in enumerate(scene):
            assert 0 <= a[0] < a[2] <= 1, kind
            assert 0 <= a[1] < a[3] <= 1, kind
            for other, b in scene[:index]:
                across = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
                down = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
                areas = [(x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in (a, b)]
                assert across * down <= 0.15 * min(areas) + 1e-9, (kind, other)


# --- leaks ---------------------------------------------------------------------------------------


def forest() -> Any:
    return RandomForestClassifier(60, min_samples_leaf=3, random_state=0, n_jobs=1)


def linear() -> Any:
    return make_pipeline(
        PCA(24, whiten=True, random_state=0), LogisticRegression(C=0.1, max_iter=1000)
    )


@dataclass(frozen=True)
class Verdict:
    """AP on fresh samples, and its distance above the prior in standard deviations."""

    ap: float
    sigmas: float


def judge(model: Any, features: Sequence[Array], truth: Sequence[Sequence[bool]]) -> Verdict:
    """Fit ``model`` on the first of two sets of samples and score the second."""
    model.fit(features[0], truth[0])
    scores = model.predict_proba(features[1])[:, 1]
    order = np.argsort(-scores)
    last_of_tie = np.append(np.flatnonzero(np.diff(scores[order])), len(order) - 1)

    def precision_over_recall(sorted_truth: Array) -> Array:
        hits = sorted_truth.cumsum(-1)[..., last_of_tie]
        gains = np.diff(hits, prepend=0, axis=-1)
        return np.asarray((gains * hits / (last_of_tie + 1)).sum(-1) / hits[..., -1])

    sorted_truth = np.asarray(truth[1])[order]
    ap = float(average_precision_score(truth[1], scores))
    assert precision_over_recall(sorted_truth) == pytest.approx(ap)
    shuffles = np.tile(sorted_truth, (1000, 1))
    by_chance = precision_over_recall(np.random.default_rng(0).permuted(shuffles, axis=1))
    return Verdict(ap, float((ap - by_chance.mean()) / by_chance.std()))


def halves(features: Sequence[Any], truth: Sequence[bool]) -> tuple[list[Array], list[list[bool]]]:
    half = len(truth) // 2
    return (
        [np.asarray(features[:half]), np.asarray(features[half:])],
        [list(truth[:half]), list(truth[half:])],
    )


def crop(picture: Image.Image, box: Box) -> Array:
    """(12, 12, 3) in [0,1]: the image of one object's region."""
    x0, y0, x1, y1 = (value * picture.width for value in box)
    pixels = (math.floor(x0), math.floor(y0), math.ceil(x1), math.ceil(y1))
    small = picture.crop(pixels).resize((12, 12), Image.Resampling.BOX)
    return np.asarray(small, dtype=np.float64) / 255


def describe(patch: Array) -> Array:
    """Colours, and their distances from the colour in the middle, which show the outline."""
    outline = np.abs(patch - patch[5:7, 5:7].mean((0, 1))).mean(2)
    return np.concatenate([patch.ravel(), outline.ravel()])


def crops(
    drawn: Drawn, kinds: Sequence[str], holds: Callable[[str, Scene], bool]
) -> tuple[list[list[Array]], list[list[bool]]]:
    """The crops of all objects of these kinds in train and test, and whether ``holds`` is true."""
    patches: list[list[Array]] = []
    truth: list[list[bool]] = []
    for split in REQUIRED_SPLITS:
        examples = [
            (crop(picture, box), holds(kind, scene))
            for picture, scene in drawn.pictures(split)
            for kind, box in scene
            if kind in kinds
        ]
        patches.append([patch for patch, _ in examples])
        truth.append([bool(answer) for _, answer in examples])
    return patches, truth


def described(patches: Sequence[Sequence[Array]]) -> list[Array]:
    return [np.stack([describe(patch) for patch in part]) for part in patches]


@pytest.mark.parametrize("model", [forest, linear])
@pytest.mark.parametrize(("kind", "label"), [("disc", "moon"), ("triangle", "tent")])
def test_crop_does_not_leak_its_context(
    drawn: Drawn, kind: str, label: str, model: Callable[[], Any]
) -> None:
    patches, truth = crops(drawn, [kind], lambda _, scene: oracle(scene)[label])
    assert judge(model(), described(patches), truth).sigmas < NOISE
    # Control: a tint of one fifth where the label holds is detected.
    tint = np.array([0.0, 0.0, 1.0])
    tinted = [
        [patch * 0.8 + 0.2 * tint if holds else patch for patch, holds in zip(*pair, strict=True)]
        for pair in zip(patches, truth, strict=True)
    ]
    assert judge(model(), described(tinted), truth).sigmas > NOISE


@pytest.mark.parametrize("model", [forest, linear])
def test_crop_shows_its_kind(drawn: Drawn, model: Callable[[], Any]) -> None:
    patches, truth = crops(drawn, ["disc", "triangle"], lambda kind, _: kind == "disc")
    verdict = judge(model(), described(patches), truth)
    assert verdict.ap > 0.95
    assert verdict.sigmas > DETECTED


def backgrounds(drawn: Drawn) -> tuple[list[Array], list[Scene]]:
    """Mean colours of four corners, four edges and the whole image outside of all boxes.

    A patch that boxes cover entirely has the mean of the whole.
    """
    features: list[Array] = []
    seen: list[Scene] = []
    for split in REQUIRED_SPLITS:
        for picture, scene in drawn.pictures(split):
            pixels = np.asarray(picture, dtype=np.float64) / 255
            free = np.ones(pixels.shape[:2], dtype=bool)
            for _, box in scene:
                x0, y0, x1, y1 = (round(value * picture.width) for value in box)
                free[max(0, y0 - 1) : y1 + 1, max(0, x0 - 1) : x1 + 1] = False
            overall = pixels[free].mean(0)
            near, far, whole = slice(0, 6), slice(-6, None), slice(None)
            patches = [(a, b) for a in (near, far) for b in (near, far)]
            patches += [(near, whole), (far, whole), (whole, near), (whole, far)]
            means = [
                pixels[patch][free[patch]].mean(0) if free[patch].any() else overall
                for patch in patches
            ]
            features.append(np.concatenate([overall, *means]))
            seen.append(scene)
    return features, seen


def test_backgrounds_do_not_leak(drawn: Drawn) -> None:
    features, seen = backgrounds(drawn)
    for label in scenes.CONTEXT_LABELS + scenes.UNDRAWN_LABELS:
        truth = [oracle(scene)[label] for scene in seen]
        assert judge(forest(), *halves(features, truth)).sigmas < NOISE, label
    night = [oracle(scene)["night"] for scene in seen]
    darker = [row * 0.7 if dark else row for row, dark in zip(features, night, strict=True)]
    assert judge(forest(), *halves(darker, night)).sigmas > DETECTED


def shape(box: Box) -> list[float]:
    return [*center(box), box[2] - box[0], box[3] - box[1]]


@pytest.mark.parametrize(
    ("label", "pair"), [("chase", ("person", "dog")), ("catch", ("boat", "fish"))]
)
def test_one_box_of_a_pair_does_not_leak_its_label(
    sampled: list[Scene], label: str, pair: tuple[str, str]
) -> None:
    both = [scene for scene in sampled if {kind for kind, _ in scene}.issuperset(pair)]
    truth = [oracle(scene)[label] for scene in both]
    alone = [[shape(dict(scene)[kind]) for scene in both] for kind in pair]
    for kind, features in zip(pair, alone, strict=True):
        assert judge(forest(), *halves(features, truth)).sigmas < NOISE, kind
    together = judge(forest(), *halves(np.hstack(alone).tolist(), truth))
    assert together.ap > 0.95
    assert together.sigmas > DETECTED


@pytest.mark.parametrize(("kind", "label"), [("disc", "moon"), ("triangle", "tent")])
def test_box_does_not_leak_its_context(sampled: list[Scene], kind: str, label: str) -> None:
    having = [scene for scene in sampled if kind in dict(scene)]
    truth = [oracle(scene)[label] for scene in having]
    features = [shape(dict(scene)[kind]) for scene in having]
    assert judge(forest(), *halves(features, truth)).sigmas < NOISE
    # Control: objects that are a little higher where the label holds are detected.
    moved = [[x, y - 0.08 * up, w, h] for (x, y, w, h), up in zip(features, truth, strict=True)]
    assert judge(forest(), *halves(moved, truth)).sigmas > NOISE


# --- drawing ---------------------------------------------------------------------


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_object_fills_its_box(kind: str, mirrored: bool) -> None:
    side = 512
    rng = np.random.default_rng(KINDS.index(kind))
    for _ in range(20):
        box = next(b for _ in iter(int, 1) for k, b in sample_scene(rng) if k == kind)
        canvas = Image.new("RGB", (side, side))
        ink = np.array([250, 250, 250])
        scenes._paint(ImageDraw.Draw(canvas), SceneObject(kind, box), ink, mirrored, side)
        painted = canvas.getbbox()
        assert painted is not None
        # First and last painted pixel, compared with the box in pixels of the enlarged canvas.
        x0, y0, x1, y1 = painted[0], painted[1], painted[2] - 1, painted[3] - 1
        for pixel, edge, outwards in zip(
            (x0, y0, x1, y1), (value * side for value in box), (-1, -1, 1, 1), strict=True
        ):
            assert -2 <= (pixel - edge) * outwards <= 1


def sample_scene(rng: np.random.Generator) -> Scene:
    return [(item.kind, item.box) for item in sample_objects(rng)]


def test_objects_contrast_with_the_background() -> None:
    box = (0.3, 0.3, 0.7, 0.7)
    for seed in range(20):
        behind, before = (
            np.asarray(draw_scene(objects, 64, np.random.default_rng(seed)), dtype=np.float64)
            for objects in ([], [SceneObject("disc", box)])
        )
        middle_of = (slice(28, 36), slice(28, 36))
        contrast = before[middle_of].mean((0, 1)) - behind[middle_of].mean((0, 1))
        assert np.abs(contrast).max() > 40


# --- the data set --------------------------------------------------------------------------------


def draw(folder: Path, train: int = 10, seed: int = 5) -> dict[str, tuple[bytes, Any]]:
    """Each image's bytes and row."""
    settings = ScenesSettings(source="scenes", train=train, test=3, size=64, seed=seed)
    manifest, _ = make_scenes(folder / "images", "images", "tiny", settings)
    return {
        row["image_id"]: ((folder / row["path"]).read_bytes(), row)
        for row in manifest.table.to_pylist()
    }


def test_seed_decides_every_image(tmp_path: Path) -> None:
    once = draw(tmp_path / "once")
    assert draw(tmp_path / "again") == once
    assert len({picture for picture, _ in once.values()}) == 13
    more = draw(tmp_path / "more", train=14)
    assert len(more) == 17
    assert {key: more[key] for key in once} == once
    other = draw(tmp_path / "other", seed=6)
    assert all(other[key][0] != once[key][0] for key in once)


def test_images_match_the_manifest(drawn: Drawn) -> None:
    rows = drawn.manifest.table.to_pylist()
    assert [row["split"] for row in rows] == ["train"] * 300 + ["test"] * 300
    for row in rows[:5] + rows[-5:]:
        with Image.open(drawn.root / row["path"]) as picture:
            assert (picture.format, picture.mode) == ("PNG", "RGB")
            assert picture.size == (row["width"], row["height"]) == (SIZE, SIZE)
    assert set(drawn.boxes.images) == {row["image_id"] for row in rows}


def test_every_setting_changes_the_sources() -> None:
    settings = ScenesSettings(source="scenes")
    changed = [settings.model_copy(update={name: 77}) for name in ("train", "test", "size", "seed")]
    sources = [scenes.scenes_sources(block)["settings"] for block in [settings, *changed]]
    assert len(set(sources)) == 5
    assert scenes.scenes_sources(ScenesSettings(source="scenes"))["settings"] == sources[0]


# --- the stage -----------------------------------------------------------------------------------


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    params = Path(__file__).resolve().parents[2] / "params.yaml"
    (tmp_path / "params.yaml").write_bytes(params.read_bytes())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_prepare(**changes: int) -> str:
    small = {"train": 10, "test": 2, "size": 64, **changes}
    return prepare(read_request("demo", [f"prepare.demo.{k}={v}" for k, v in small.items()]))


def test_prepare_keeps_a_current_data_set(checkout: Path) -> None:
    assert run_prepare().startswith("data/demo/prepared: 10 train, 2 test, 18 labels")
    folder = checkout / "data/demo/prepared"
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert "unchanged" in run_prepare().splitlines()[0]
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "manifest.parquet").unlink(),
        lambda folder: (folder / "manifest.parquet").write_bytes(b"PAR1"),
        lambda folder: (folder / "boxes.parquet").unlink(),
        lambda folder: (folder / "boxes.parquet").write_bytes(b"PAR1"),
        lambda folder: (folder / "images/train-00003.png").unlink(),
    ],
)
def test_prepare_repairs_damage(checkout: Path, damage: Callable[[Path], object]) -> None:
    run_prepare()
    folder = checkout / "data/demo/prepared"
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    damage(folder)
    assert "10 train" in run_prepare()
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_prepare_follows_its_settings(checkout: Path) -> None:
    run_prepare()
    assert "11 train" in run_prepare(train=11)
    assert len(read_manifest(checkout / "data/demo/prepared/manifest.parquet")) == 13
    assert "10 train" in run_prepare()
    assert len(list((checkout / "data/demo/prepared/images").iterdir())) == 12
