"""The detector's architecture, its weights from outside, and its folder.

The detector is the real architecture made very narrow, with random weights from a seed.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from unittest import mock
from urllib.error import URLError

import pytest
import torch
from builders import CLASSES, TINY, S, tiny_model
from refusals import refused
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, fasterrcnn_resnet50_fpn
from torchvision.ops import FrozenBatchNorm2d

from pipeline.datasets.scenes import KINDS
from pipeline.errors import DamagedError, GmpipeError, InputError, MismatchError, MissingError
from pipeline.files import sha256_file
from pipeline.formats.sealed import read_sealed_json, write_sealed_json
from pipeline.regions import detector as detector_module
from pipeline.regions.detector import (
    DESCRIPTION_FILE,
    DETECTOR_VERSION,
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
from pipeline.settings import ArchitectureSettings
from stages.checkout.models import dataset_detector


@pytest.fixture(scope="module")
def detector() -> FasterRCNN:
    return tiny_model()


# The architecture --------------------------------------------------------------------------------


def test_the_default_architecture_is_torchvisions() -> None:
    with torch.device("meta"):  # shapes only: random weights of the full width take a second
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


# Weights from outside ----------------------------------------------------------------------------


def test_weights_that_are_missing_or_something_else(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    with pytest.raises(MissingError, match=rf"{path}.*detector\.<dataset>\.weights"):
        load_state(path)
    path.write_bytes(b"not a file of torch")
    with pytest.raises(InputError, match=rf"{path}.*detector\.<dataset>\.weights"):
        load_state(path)
    for something in ([torch.zeros(1)], {"model": {"a": 1}}, torch.zeros(1)):
        torch.save(something, path)
        with pytest.raises(InputError, match=rf"{path}.*torch\.save.*state_dict\(\)"):
            load_state(path)
    torch.save(torch.nn.Linear(1, 1), path)  # loading it whole would run code from the file
    with pytest.raises(InputError, match=f"{path}"):
        load_state(path)


CLASSIFIER = "roi_heads.box_predictor.cls_score.weight"
FIRST_NORM = "backbone.body.bn1.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({CLASSIFIER: torch.zeros(91, 8)}, rf"`{CLASSIFIER}`.*\(91, 8\).*\(12, 8\)"),
        ({FIRST_NORM: None}, rf"lacks weights.*\b1\b.*`{FIRST_NORM}`"),
        ({"odd": torch.zeros(1)}, r"architecture lacks.*\b1\b.*`odd`"),
        ({CLASSIFIER: None}, rf"Faster R-CNN.*`{CLASSIFIER}`.*detector\.<dataset>\.weights"),
    ],
    ids=["shape", "missing", "unknown", "no detector"],
)
def test_weights_that_do_not_fit(
    detector: FasterRCNN, change: dict[str, Tensor | None], message: str
) -> None:
    changed = {**detector.state_dict(), **change}
    state = {key: value for key, value in changed.items() if value is not None}
    with pytest.raises(InputError, match=rf"^some/file\.pt.*{message}") as caught:
        fit_state(tiny_model(), state, Path("some/file.pt"))
    assert len(str(caught.value)) < 400


def test_all_keys_that_the_shapes_tell_are_named_at_once(detector: FasterRCNN) -> None:
    other = build_model(
        TINY.model_copy(
            update={"width_per_group": 2, "fpn_channels": 8, "feature_size": 16, "norm": "frozen"}
        ),
        CLASSES, size=S, regions=1, score_threshold=0, nms_threshold=0.5,
    )  # fmt: skip
    with refused(
        InputError,
        "w.pt",
        *("`width_per_group` is 1, not 2", "`fpn_channels` is 4, not 8"),
        *("`feature_size` is 8, not 16", "`norm` is batch, not frozen"),
        "`{width_per_group: 1, fpn_channels: 4, feature_size: 8, norm: batch}`",
        *("`anchor_sizes`", "`proposals`"),
    ):
        fit_state(other, detector.state_dict(), Path("w.pt"))


def test_another_number_of_anchors_is_named(detector: FasterRCNN) -> None:
    state = detector.state_dict()
    for name, sides in (("cls_logits", 1), ("bbox_pred", 4)):
        for kind in ("weight", "bias"):
            key = f"rpn.head.{name}.{kind}"
            state[key] = state[key][:sides].repeat(15, *[1] * (state[key].dim() - 1))
    with refused(InputError, "w.pt", "15 anchors", "3", "`anchor_sizes`"):
        fit_state(tiny_model(), state, Path("w.pt"))


@pytest.mark.parametrize(("weights", "architecture"), [("batch", "frozen"), ("frozen", "batch")])
def test_the_other_kind_of_batch_norm_is_refused(weights: str, architecture: str) -> None:
    state = tiny_model(norm=weights).state_dict()
    fit_state(tiny_model(norm=weights), state, Path("w.pt"))
    with pytest.raises(
        InputError,
        match=rf"`norm` is {weights}, not {architecture}.*detector\.<dataset>\.architecture",
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


def test_torchvisions_weights_without_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_network(url: str, *arguments: object, **options: object) -> None:
        raise URLError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    path = tmp_path / "hub" / "checkpoints" / Path(TORCHVISION_WEIGHTS.url).name
    announced: list[str] = []
    with pytest.raises(
        MissingError,
        match=rf"{path}.*no route to host.*{TORCHVISION_WEIGHTS.url}"
        r".*detector\.<dataset>\.source: file",
    ):
        torchvision_weights_file(announced.append)
    assert len(announced) == 1
    assert "160 MB" in announced[0]
    # What torchvision left there, perhaps cut off: the name tells how its sha256 begins.
    torch.save({"a": torch.zeros(3)}, path)
    with refused(DamagedError, str(path), sha256_file(path), "258fb6c6", TORCHVISION_WEIGHTS.url):
        torchvision_weights_file(announced.append)
    sound = path.with_name(f"weights-{sha256_file(path)[:8]}.pth")
    path.rename(sound)
    published = SimpleNamespace(url=f"https://example.org/{sound.name}")
    monkeypatch.setattr(detector_module, "TORCHVISION_WEIGHTS", published)
    assert torchvision_weights_file(announced.append) == sound
    assert len(announced) == 1


@pytest.mark.parametrize("legacy", [False, True])
def test_weights_in_which_a_bit_changed(tmp_path: Path, legacy: bool) -> None:
    """Files of torch before 1.6 have no checksums; their tensors are loaded as they are."""
    path, weights = tmp_path / "weights.pth", torch.arange(1000.0)
    torch.save({"a": weights}, path, _use_new_zipfile_serialization=not legacy)
    assert torch.equal(load_state(path)["a"], weights)
    stored = bytearray(path.read_bytes())
    stored[stored.index(weights.numpy().tobytes()) + 2002] ^= 1
    path.write_bytes(stored)
    if legacy:
        assert not torch.equal(load_state(path)["a"], weights)
    else:
        with refused(InputError, str(path)):
            load_state(path)


# The detector's folder ---------------------------------------------------------------------------


def write_tiny(folder: Path, model: FasterRCNN) -> DetectorDescription:
    folder.mkdir(exist_ok=True)
    return write_detector(
        folder,
        model.state_dict(),
        source="fit",
        architecture=TINY,
        classes=("background", *KINDS),
    )


def test_the_same_detector_gives_the_same_files_and_is_read_back(
    tmp_path: Path, detector: FasterRCNN
) -> None:
    first = write_tiny(tmp_path / "a", detector)
    again = write_tiny(tmp_path / "b", tiny_model())
    assert first == again
    assert first.weights_sha256 == sha256_file(tmp_path / "b" / WEIGHTS_FILE)
    assert read_description(tmp_path / "a") == first
    assert _of_stage(tmp_path / "a") == first
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == sorted(
        [WEIGHTS_FILE, DESCRIPTION_FILE]
    )


def _of_stage(folder: Path) -> DetectorDescription:
    """What a stage reads for the data set `tiny` whose detector is in ``folder``."""
    with mock.patch("stages.checkout.models.detector_folder", return_value=folder):
        return dataset_detector("tiny")


def edit_description(folder: Path, **changes: object) -> None:
    path = folder / DESCRIPTION_FILE
    write_sealed_json(path, {**read_sealed_json(path), **changes})


@pytest.mark.parametrize(
    ("damage", "kind", "message"),
    [
        (lambda f: (f / WEIGHTS_FILE).write_bytes(b"x"), DamagedError, r"weights\.pt.*sha256"),
        (lambda f: (f / WEIGHTS_FILE).unlink(), MissingError, r"weights\.pt"),
        (lambda f: (f / DESCRIPTION_FILE).unlink(), MissingError, "no detector in {folder}"),
        (
            lambda f: edit_description(f, version=2),
            DamagedError,
            rf"detector\.json.*version 2.*version {DETECTOR_VERSION}",
        ),
        (lambda f: edit_description(f, architecture={"a": 1}), DamagedError, r"detector\.json"),
        (lambda f: (f / DESCRIPTION_FILE).write_text("[]"), DamagedError, r"detector\.json"),
        (lambda f: (f / DESCRIPTION_FILE).write_text("{"), DamagedError, r"detector\.json"),
    ],
    ids=["weights", "no weights", "nothing", "version", "architecture", "list", "cut off"],
)
def test_a_changed_detector_is_refused_and_the_command_that_makes_it_is_named(
    tmp_path: Path,
    detector: FasterRCNN,
    damage: Callable[[Path], object],
    kind: type[GmpipeError],
    message: str,
) -> None:
    write_tiny(tmp_path, detector)
    damage(tmp_path)
    message = message.replace("{folder}", str(tmp_path))
    with pytest.raises(kind, match=f"(?s){message}") as caught:
        read_description(tmp_path)
    assert "gmpipe detector" not in str(caught.value)  # only the stages name commands
    with pytest.raises(kind, match=f"(?s){message}.*gmpipe detector --dataset tiny"):
        _of_stage(tmp_path)


def test_a_data_set_of_imported_regions_has_no_detector(tmp_path: Path) -> None:
    write_sealed_json(
        tmp_path / DESCRIPTION_FILE, {"version": DETECTOR_VERSION, "source": "imported"}
    )
    with pytest.raises(MismatchError, match=r"detector\.json.*imported"):
        read_description(tmp_path)
    with pytest.raises(
        MismatchError,
        match=r"detector\.json.*`detector\.tiny\.source`.*gmpipe detector --dataset tiny",
    ):
        _of_stage(tmp_path)
