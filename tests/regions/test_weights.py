"""Files of weights that other programs saved: what is read, and what others are and need.

Models of torchvision are built without memory; their names are kept and their weights made tiny.
"""

from __future__ import annotations

import argparse
import gzip
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from builders import tiny_model
from refusals import refused
from torch import Tensor, nn
from torchvision.models import detection

from pipeline.errors import InputError, MissingError
from pipeline.regions.detector import class_count, fit_state, load_state

SETTING = "detector.<dataset>.weights"
ANOTHER_SOURCE = "detector.<dataset>.source: torchvision"


def tiny_state(build: Callable[..., nn.Module]) -> dict[str, Tensor]:
    with torch.device("meta"):
        model = build(weights=None)
    return {
        name: torch.zeros([min(side, 2) for side in weight.shape])
        for name, weight in model.state_dict().items()
    }


def without_backbone(build: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    return lambda weights: build(weights=weights, weights_backbone=None)


@pytest.mark.parametrize(
    ("prefix", "entry"),
    [
        ("module.", None),
        ("_orig_mod.", None),
        ("", "model_state_dict"),
        ("", "ema"),
        ("model.", "state_dict"),
        ("module._orig_mod.", "model"),
        ("detector.net.", "state_dict"),
        ("module.", "model_ema"),
    ],
)
def test_wrapped_weights_are_those_of_the_model(
    tmp_path: Path, prefix: str, entry: str | None
) -> None:
    path, state = tmp_path / "w.pt", tiny_model().state_dict()
    content: dict[str, Any] = {f"{prefix}{name}": weight for name, weight in state.items()}
    if entry is not None:
        optimizer = {"state": {0: {"step": torch.zeros(1)}}, "param_groups": [{"lr": 0.1}]}
        losses = {"box": torch.zeros(1)}
        content = {entry: content, "optimizer": optimizer, "epoch": 7, "none": {}, "loss": losses}
    if entry == "model_ema":
        content[entry]["n_averaged"] = torch.tensor(3)  # as torch's AveragedModel has it
    torch.save(content, path)
    loaded = load_state(path)
    assert loaded.keys() == state.keys()
    model = tiny_model()
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    fit_state(model, loaded, path)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, state[name])


def test_modules_beside_the_detector_are_left_out_with_a_note(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, state = tmp_path / "w.pt", tiny_model().state_dict()
    others = {"val_map.x": torch.zeros(1), "criterion.weight": torch.ones(3)}
    torch.save({"state_dict": {f"model.{k}": v for k, v in state.items()} | others}, path)
    loaded = load_state(path)
    assert loaded.keys() == state.keys()
    fit_state(tiny_model(), loaded, path)
    (note,) = [record.getMessage() for record in caplog.records]
    for part in (str(path), "`model.`", "2 others", "`val_map.x`"):
        assert part in note


@pytest.mark.parametrize("prefixes", [("student.", "teacher."), ("", "ema.")])
@pytest.mark.parametrize("entry", ["", "state_dict"])
def test_one_of_several_detectors_has_to_be_chosen(
    tmp_path: Path, prefixes: tuple[str, str], entry: str
) -> None:
    path, state = tmp_path / "w.pt", tiny_model().state_dict()
    both = {f"{prefix}{name}": weight for prefix in prefixes for name, weight in state.items()}
    torch.save({entry: both} if entry else both, path)
    with pytest.raises(InputError) as caught:
        load_state(path)
    for part in (str(path), *map(repr, prefixes), SETTING):
        assert part in str(caught.value)
    (line,) = [part for part in caught.value.remedy.split("`") if "torch.save" in part]
    chosen = tmp_path / "weights.pt"
    exec(line.replace("'weights.pt'", repr(str(chosen))))  # the advice must work
    assert load_state(chosen).keys() == state.keys()


def test_one_of_several_state_dicts_has_to_be_chosen(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    torch.save({name: {"a": torch.zeros(1)} for name in ("model", "ema")}, path)
    with refused(InputError, str(path), "model, ema", "['model']", "torch.save(", SETTING):
        load_state(path)


@pytest.mark.parametrize("name", ["maskrcnn_resnet50_fpn", "keypointrcnn_resnet50_fpn"])
def test_the_box_detector_of_a_network_with_another_head_is_used(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "w.pt"
    torch.save(tiny_state(without_backbone(getattr(detection, name))), path)
    expected = tiny_state(without_backbone(detection.fasterrcnn_resnet50_fpn))
    assert load_state(path).keys() == expected.keys()
    (note,) = [record.getMessage() for record in caplog.records]
    assert str(path) in note
    assert "not used" in note


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("fasterrcnn_resnet50_fpn_v2", "`..._resnet50_fpn_v2`"),
        ("maskrcnn_resnet50_fpn_v2", "`..._resnet50_fpn_v2`"),
        ("fasterrcnn_mobilenet_v3_large_fpn", "`fasterrcnn_mobilenet_v3_large_fpn`"),
        ("retinanet_resnet50_fpn", "RetinaNet"),
        ("fcos_resnet50_fpn", "FCOS"),
        ("ssd300_vgg16", "SSD"),
    ],
)
def test_torchvisions_other_detectors_are_named(
    tmp_path: Path,
    name: str,
    named: str,
    prefix: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = tmp_path / "w.pt"
    state = tiny_state(without_backbone(getattr(detection, name)))
    torch.save({f"{prefix}{key}": weight for key, weight in state.items()}, path)
    with refused(
        InputError, str(path), named, "`fasterrcnn_resnet50_fpn`", ANOTHER_SOURCE, SETTING
    ):
        class_count(load_state(path), path)
    assert not caplog.records


@pytest.mark.parametrize(
    ("names", "named"),
    [
        (["backbone.bottom_up.stem.conv1.weight"], "Detectron2"),
        (["backbone.conv1.weight", "roi_head.bbox_head.fc_cls.weight"], "MMDetection"),
        (["backbone.conv1.weight", "bbox_head.retina_cls.weight"], "MMDetection"),
        (["transformer.encoder.weight"], "`transformer.encoder.weight`"),
    ],
)
def test_detectors_of_other_libraries_are_named(names: list[str], named: str) -> None:
    # Detectron2's classifier has the same name as torchvision's.
    state = {name: torch.zeros(2, 2) for name in names}
    if named == "Detectron2":
        state["roi_heads.box_predictor.cls_score.weight"] = torch.zeros(81, 8)
    with refused(InputError, "w.pt", named, ANOTHER_SOURCE):
        class_count(state, Path("w.pt"))


def test_a_classifier_of_whole_images_is_named() -> None:
    with refused(InputError, "w.pt", "ResNet", "`layer4.0.conv1.weight`", ANOTHER_SOURCE):
        class_count(tiny_state(torchvision.models.resnet50), Path("w.pt"))


def as_torch(content: object) -> Callable[[Path], object]:
    return lambda path: torch.save(content, path)


def as_bytes(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)


def as_npz(path: Path) -> None:
    with path.open("wb") as stream:
        np.savez(stream, a=np.zeros(3))


def as_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("word/document.xml", "<a/>")


def as_tar(path: Path) -> None:
    with tarfile.open(path, "w") as archive:
        archive.addfile(tarfile.TarInfo("w/weights.pt"))


def as_script(path: Path) -> None:
    torch.jit.save(torch.jit.trace(nn.Linear(1, 1), torch.zeros(1, 1)), str(path))


ARRAYS = {"model": {"a": np.zeros(3)}, "__author__": "Detectron2 Model Zoo"}
WHOLE = "weights_only=False"


@pytest.mark.parametrize(
    ("write", "parts"),
    [
        (as_torch({"model": {}, "args": argparse.Namespace()}), ["argparse.Namespace", WHOLE]),
        (as_torch(nn.Linear(1, 1)), ["torch.nn.modules.linear.Linear", WHOLE, ".state_dict()"]),
        (as_torch({"loss": np.float64(1)}), ["numpy._core.multiarray.scalar", WHOLE]),
        (as_torch({"epoch": 1, "optimizer": {"state": {}}}), ["epoch, optimizer", "state_dict()"]),
        (as_torch([torch.zeros(1)]), ["list", "state_dict()"]),
        (as_bytes(pickle.dumps(ARRAYS)), ["Detectron2", ANOTHER_SOURCE]),
        (as_bytes(pickle.dumps(ARRAYS, protocol=2)), ["Detectron2", ANOTHER_SOURCE]),
        (as_bytes(b"\x08" + bytes(7) + b'{"a":{}}'), ["safetensors.torch.load_file(", SETTING]),
        (as_bytes(b"version https://git-lfs.github.com/spec/v1\n"), ["git lfs pull"]),
        (as_bytes(b"<!DOCTYPE html><html>"), ["a web page", "login", SETTING]),
        (as_bytes(b"\n<html><head>"), ["a web page", SETTING]),
        (as_bytes(b""), ["empty", "again"]),
        (as_bytes(gzip.compress(b"x" * 100)), ["gzip -dc ", "w.pt > weights.pt", SETTING]),
        (as_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100)), ["HDF5", ANOTHER_SOURCE]),
        (as_bytes(b"\x08\x07\x12\x07pytorch\x1a\x051.13.1"), ["ONNX", ANOTHER_SOURCE]),
        (as_npz, ["npz", ANOTHER_SOURCE]),
        (as_zip, ["a zip", "word/document.xml", SETTING]),
        (as_tar, ["tar -xf", SETTING]),
        (as_script, ["TorchScript", "torch.jit.load"]),
        (as_bytes(b"\x00\x01\x02"), [SETTING]),
    ],
)
@pytest.mark.filterwarnings("ignore:.torch.jit.*is deprecated:FutureWarning")
def test_a_file_that_is_no_state_dict_is_named_with_what_to_do(
    tmp_path: Path, write: Callable[[Path], object], parts: list[str]
) -> None:
    path = tmp_path / "w.pt"
    write(path)
    with pytest.raises(InputError) as caught:
        load_state(path)
    for part in (str(path), *parts):
        assert part in str(caught.value)
    assert "will likely succeed" not in str(caught.value)  # torch's advice
    if WHOLE in str(caught.value):
        assert "If you trust the file" in str(caught.value)


def test_a_packed_file_is_not_unpacked_into_itself(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    path.write_bytes(gzip.compress(b"x" * 100))
    with refused(InputError, f"`gzip -dc {path} > unpacked.pt`", "name unpacked.pt in"):
        load_state(path)


def test_a_path_from_the_home_folder_is_written_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    with refused(MissingError, "~/w.pt", "`/home/ada/w.pt`", SETTING):
        load_state(Path("~/w.pt"))
