"""pipeline.datasets.scenes: the labels follow from the rules, and from nothing else in a picture.

That something does not give a label away is shown with a classifier that is trained to find it:
its average precision (AP) on fresh scenes stays within `NOISE` standard deviations of what the
same scores reach on shuffled labels, which is the prior. Beside each such test stands its
control, where the same classifier finds what is there to be found.
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
from pipeline.datasets.manifest import SPLITS, BoxTable, Manifest, Split, read_manifest
from pipeline.datasets.scenes import KINDS, SceneObject, draw_scene, make_scenes, sample_objects
from pipeline.settings import ScenesSettings
from stages.checkout.params import read_request
from stages.prepare import prepare

Array = NDArray[Any]
Box = tuple[float, float, float, float]
Scene = list[tuple[str, Box]]
"""What is where: a kind and its box, xyxy in [0,1], for each object."""

NOISE = 4  # standard deviations; one in 30,000 draws of pure noise goes beyond
FOUND = 10


# --- the oracle: the rules of the module's docstring, from boxes alone ---------------------------


def middle(box: Box) -> tuple[float, float]:
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2


def lie_flat(one: Box, other: Box) -> bool:
    """Whether the line from one middle to the other is nearer to the horizontal."""
    (ax, ay), (bx, by) = middle(one), middle(other)
    return abs(math.atan2(abs(ay - by), abs(ax - bx))) < math.pi / 4


def oracle(scene: Scene) -> dict[str, bool]:
    """Whether each label holds."""
    count = Counter(kind for kind, _ in scene)
    place = dict(scene)
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
        answer["chase"] = lie_flat(place["person"], place["dog"])
    if count["boat"] and count["fish"]:
        answer["catch"] = not lie_flat(place["boat"], place["fish"])
    return answer


# --- scenes to look at ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Drawn:
    """A drawn data set, and what stands in each of its scenes."""

    root: Path
    manifest: Manifest
    boxes: BoxTable
    images: dict[str, Image.Image]

    def scene(self, image_id: str) -> Scene:
        found = self.boxes.images[image_id]
        kinds = [self.boxes.classes[number - 1] for number in found.classes]
        return [(k, tuple(b)) for k, b in zip(kinds, found.boxes.tolist(), strict=True)]

    def pictures(self, split: Split) -> Iterator[tuple[Image.Image, Scene]]:
        for image_id in self.manifest.image_ids(split):
            yield self.images[image_id], self.scene(image_id)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Drawn:
    root = tmp_path_factory.mktemp("scenes")
    settings = ScenesSettings(source="scenes", train=300, test=300, seed=7)
    manifest, boxes = make_scenes(root / "prepared/images", "prepared/images", "tiny", settings)
    rows = manifest.table.to_pylist()
    images = {row["image_id"]: Image.open(root / row["path"]).convert("RGB") for row in rows}
    return Drawn(root, manifest, boxes, images)


@pytest.fixture(scope="module")
def sampled() -> list[Scene]:
    """Scenes that nobody draws, so there can be many."""
    rng = np.random.default_rng(11)
    objects = (sample_objects(rng) for _ in range(4000))
    return [[(item.kind, item.box) for item in scene] for scene in objects]


# --- what the labels say -------------------------------------------------------------------------


def test_the_oracle_knows_every_label(drawn: Drawn) -> None:
    for split in SPLITS:
        truth = drawn.manifest.truth(split)
        answers = [oracle(drawn.scene(key)) for key in drawn.manifest.image_ids(split)]
        for number, label in enumerate(drawn.manifest.vocabulary):
            scores = [float(answer[label]) for answer in answers]
            assert average_precision_score(truth[:, number], scores) == 1.0, label
            assert 0 < truth[:, number].sum() < len(truth), label


def test_the_oracle_agrees_on_scenes_that_are_not_drawn(sampled: list[Scene]) -> None:
    for scene in sampled:
        found = scenes.scene_labels([SceneObject(kind, box) for kind, box in scene])
        assert found == {label for label, holds in oracle(scene).items() if holds}


def test_each_label_is_neither_rare_nor_common(sampled: list[Scene]) -> None:
    shares = Counter(label for scene in sampled for label, holds in oracle(scene).items() if holds)
    assert set(shares) == set(scenes.VOCABULARY)
    for label, count in shares.items():
        assert 0.15 < count / len(sampled) < 0.75, label


def test_scenes_keep_their_bounds(sampled: list[Scene]) -> None:
    for scene in sampled:
        assert 1 <= len(scene) <= 12
        for place, (kind, a) in enumerate(scene):
            assert 0 <= a[0] < a[2] <= 1, kind
            assert 0 <= a[1] < a[3] <= 1, kind
            for other, b in scene[:place]:
                across = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
                down = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
                areas = [(x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in (a, b)]
                assert across * down <= 0.15 * min(areas) + 1e-9, (kind, other)


# --- what must not give a label away -------------------------------------------------------------


def forest() -> Any:
    return RandomForestClassifier(60, min_samples_leaf=3, random_state=0, n_jobs=1)


def linear() -> Any:
    return make_pipeline(
        PCA(24, whiten=True, random_state=0), LogisticRegression(C=0.1, max_iter=1000)
    )


@dataclass(frozen=True)
class Verdict:
    """AP on fresh samples, and how far it lies above the prior."""

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
    """(12, 12, 3) in [0,1]: one object as its region shows it."""
    x0, y0, x1, y1 = (value * picture.width for value in box)
    place = (math.floor(x0), math.floor(y0), math.ceil(x1), math.ceil(y1))
    small = picture.crop(place).resize((12, 12), Image.Resampling.BOX)
    return np.asarray(small, dtype=np.float64) / 255


def describe(patch: Array) -> Array:
    """Colours, and how far each pixel's is from the middle one's, which shows the outline."""
    outline = np.abs(patch - patch[5:7, 5:7].mean((0, 1))).mean(2)
    return np.concatenate([patch.ravel(), outline.ravel()])


def crops(
    drawn: Drawn, kinds: Sequence[str], holds: Callable[[str, Scene], bool]
) -> tuple[list[list[Array]], list[list[bool]]]:
    """The crops of objects of these kinds in train and test, and what holds of each."""
    patches: list[list[Array]] = []
    truth: list[list[bool]] = []
    for split in SPLITS:
        found = [
            (crop(picture, box), holds(kind, scene))
            for picture, scene in drawn.pictures(split)
            for kind, box in scene
            if kind in kinds
        ]
        patches.append([patch for patch, _ in found])
        truth.append([bool(answer) for _, answer in found])
    return patches, truth


def described(patches: Sequence[Sequence[Array]]) -> list[Array]:
    return [np.stack([describe(patch) for patch in part]) for part in patches]


@pytest.mark.parametrize("model", [forest, linear])
@pytest.mark.parametrize(("kind", "label"), [("disc", "moon"), ("triangle", "tent")])
def test_a_crop_does_not_show_its_context(
    drawn: Drawn, kind: str, label: str, model: Callable[[], Any]
) -> None:
    patches, truth = crops(drawn, [kind], lambda _, scene: oracle(scene)[label])
    assert judge(model(), described(patches), truth).sigmas < NOISE
    # Had the label coloured the object, be it only a fifth, the same test would have seen it.
    tint = np.array([0.0, 0.0, 1.0])
    tinted = [
        [patch * 0.8 + 0.2 * tint if holds else patch for patch, holds in zip(*pair, strict=True)]
        for pair in zip(patches, truth, strict=True)
    ]
    assert judge(model(), described(tinted), truth).sigmas > NOISE


@pytest.mark.parametrize("model", [forest, linear])
def test_a_crop_shows_its_kind(drawn: Drawn, model: Callable[[], Any]) -> None:
    patches, truth = crops(drawn, ["disc", "triangle"], lambda kind, _: kind == "disc")
    verdict = judge(model(), described(patches), truth)
    assert verdict.ap > 0.95
    assert verdict.sigmas > FOUND


def backgrounds(drawn: Drawn) -> tuple[list[Array], list[Scene]]:
    """Mean colours of four corners, four edges and all, of the pixels that no object's box holds.

    A patch that boxes hold wholly has the mean of all.
    """
    features: list[Array] = []
    seen: list[Scene] = []
    for split in SPLITS:
        for picture, scene in drawn.pictures(split):
            pixels = np.asarray(picture, dtype=np.float64) / 255
            free = np.ones(pixels.shape[:2], dtype=bool)
            for _, box in scene:
                x0, y0, x1, y1 = (round(value * picture.width) for value in box)
                free[max(0, y0 - 2) : y1 + 2, max(0, x0 - 2) : x1 + 2] = False
            overall = pixels[free].mean(0)
            near, far, whole = slice(0, 12), slice(-12, None), slice(None)
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
    assert judge(forest(), *halves(darker, night)).sigmas > FOUND


def shape(box: Box) -> list[float]:
    return [*middle(box), box[2] - box[0], box[3] - box[1]]


@pytest.mark.parametrize(
    ("label", "pair"), [("chase", ("person", "dog")), ("catch", ("boat", "fish"))]
)
def test_one_box_of_a_pair_does_not_tell_how_it_stands(
    sampled: list[Scene], label: str, pair: tuple[str, str]
) -> None:
    both = [scene for scene in sampled if {kind for kind, _ in scene}.issuperset(pair)]
    truth = [oracle(scene)[label] for scene in both]
    alone = [[shape(dict(scene)[kind]) for scene in both] for kind in pair]
    for kind, features in zip(pair, alone, strict=True):
        assert judge(forest(), *halves(features, truth)).sigmas < NOISE, kind
    together = judge(forest(), *halves(np.hstack(alone).tolist(), truth))
    assert together.ap > 0.95
    assert together.sigmas > FOUND


@pytest.mark.parametrize(("kind", "label"), [("disc", "moon"), ("triangle", "tent")])
def test_a_box_does_not_tell_its_context(sampled: list[Scene], kind: str, label: str) -> None:
    having = [scene for scene in sampled if kind in dict(scene)]
    truth = [oracle(scene)[label] for scene in having]
    features = [shape(dict(scene)[kind]) for scene in having]
    assert judge(forest(), *halves(features, truth)).sigmas < NOISE
    # Objects that stood a little higher where the label holds would be found out.
    moved = [[x, y - 0.08 * up, w, h] for (x, y, w, h), up in zip(features, truth, strict=True)]
    assert judge(forest(), *halves(moved, truth)).sigmas > NOISE


# --- how objects are painted ---------------------------------------------------------------------


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_an_object_fills_its_box(kind: str, mirrored: bool) -> None:
    side = 512
    rng = np.random.default_rng(KINDS.index(kind))
    for _ in range(20):
        box = next(b for _ in iter(int, 1) for k, b in sample_scene(rng) if k == kind)
        canvas = Image.new("RGB", (side, side))
        ink = np.array([250, 250, 250])
        scenes._paint(ImageDraw.Draw(canvas), SceneObject(kind, box), ink, mirrored, side)
        painted = canvas.getbbox()
        assert painted is not None
        # The first and last painted pixel, and the box's, in pixels of the enlarged canvas.
        x0, y0, x1, y1 = painted[0], painted[1], painted[2] - 1, painted[3] - 1
        for found, edge, outwards in zip(
            (x0, y0, x1, y1), (value * side for value in box), (-1, -1, 1, 1), strict=True
        ):
            assert -2 <= (found - edge) * outwards <= 1


def sample_scene(rng: np.random.Generator) -> Scene:
    return [(item.kind, item.box) for item in sample_objects(rng)]


def test_objects_stand_out_from_what_is_behind_them() -> None:
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


def test_one_seed_draws_one_data_set(tmp_path: Path) -> None:
    once = draw(tmp_path / "once")
    assert draw(tmp_path / "again") == once
    assert len({picture for picture, _ in once.values()}) == 13
    more = draw(tmp_path / "more", train=14)
    assert len(more) == 17
    assert {key: more[key] for key in once} == once
    other = draw(tmp_path / "other", seed=6)
    assert all(other[key][0] != once[key][0] for key in once)


def test_pictures_are_what_the_manifest_says(drawn: Drawn) -> None:
    rows = drawn.manifest.table.to_pylist()
    assert [row["split"] for row in rows] == ["train"] * 300 + ["test"] * 300
    for row in rows[:5] + rows[-5:]:
        with Image.open(drawn.root / row["path"]) as picture:
            assert (picture.format, picture.mode) == ("PNG", "RGB")
            assert picture.size == (row["width"], row["height"]) == (128, 128)
    assert set(drawn.boxes.images) == {row["image_id"] for row in rows}


def test_other_settings_have_other_sources() -> None:
    settings = ScenesSettings(source="scenes")
    changed = [settings.model_copy(update={name: 77}) for name in ("train", "test", "size", "seed")]
    sources = [scenes.scenes_sources(one)["settings"] for one in [settings, *changed]]
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


def test_prepare_leaves_what_is_there(checkout: Path) -> None:
    assert run_prepare().startswith("data/demo/prepared: 10 train, 2 test, 18 labels\n")
    folder = checkout / "data/demo/prepared"
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert run_prepare().splitlines()[0].endswith(": unchanged")
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


@pytest.mark.parametrize(
    "spoil",
    [
        lambda folder: (folder / "manifest.parquet").unlink(),
        lambda folder: (folder / "manifest.parquet").write_bytes(b"PAR1"),
        lambda folder: (folder / "boxes.parquet").unlink(),
        lambda folder: (folder / "boxes.parquet").write_bytes(b"PAR1"),
        lambda folder: (folder / "images/train-00003.png").unlink(),
    ],
)
def test_prepare_mends_what_is_spoilt(checkout: Path, spoil: Callable[[Path], object]) -> None:
    run_prepare()
    folder = checkout / "data/demo/prepared"
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    spoil(folder)
    assert "10 train" in run_prepare()
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_prepare_follows_its_settings(checkout: Path) -> None:
    run_prepare()
    assert "11 train" in run_prepare(train=11)
    assert len(read_manifest(checkout / "data/demo/prepared/manifest.parquet")) == 13
    assert "10 train" in run_prepare()
    assert len(list((checkout / "data/demo/prepared/images").iterdir())) == 12
