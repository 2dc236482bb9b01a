"""benchmarks.gpu: it runs on a CPU at tiny sizes, and a section that fails stops no other."""

from __future__ import annotations

import json
import sys
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu_regions import differences
from pipeline.regions.detection import Detections


def run(monkeypatch: pytest.MonkeyPatch, *options: str) -> int:
    """Run the benchmark in this process; return its exit code."""
    monkeypatch.setattr(sys, "argv", ["gpu", *options])
    try:
        with warnings.catch_warnings():
            # PyTorch Geometric calls torch.jit, which is deprecated, while it is imported.
            warnings.filterwarnings("ignore", r"`torch\.jit")
            gpu.main()
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code)
        return end.code if isinstance(end.code, int) else 1
    return 0


def last_line(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    figures: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return figures


def test_a_training_on_a_cpu_has_its_own_curve(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "--device", "cpu", "--quick", "--only", "curve") == 0
    figures = last_line(capsys)
    assert figures["failed"] == []
    assert figures["curve"]["float32"]["deviation"] == 0


@pytest.mark.slow
def test_every_section_runs_on_a_cpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "--device", "cpu", "--quick") == 0
    figures = last_line(capsys)
    assert figures["failed"] == []
    assert figures.keys() == {"device", "torch", "failed", *gpu.SECTIONS}
    for size in ("voc2007", "coco"):
        for precision in gpu.PRECISIONS:
            assert figures[size][precision]["step_ms"] > 0
    # The same numbers, as both are computed on the CPU.
    assert figures["curve"]["float32"]["deviation"] == 0
    assert figures["numbers"]["float32"]["matched"] == 1
    assert figures["numbers"]["float32"]["features"] == 0
    # What the sections changed is as before.
    assert torch.get_float32_matmul_precision() == "highest"
    assert torch.backends.cudnn.allow_tf32


def test_a_section_that_fails_is_shown_and_stops_no_other(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(bench: gpu.Bench) -> gpu.Figures:
        raise RuntimeError("no kernel image")

    monkeypatch.setitem(gpu.SECTIONS, "coco", broken)
    code = run(monkeypatch, "--device", "cpu", "--quick", "--only", "coco", "--only", "rates")
    assert code == 1
    out = capsys.readouterr().out
    assert "RuntimeError: no kernel image" in out
    figures = json.loads(out.splitlines()[-1])
    assert figures["failed"] == ["coco"]
    assert figures["rates"].keys() == set(gpu.PRECISIONS)


def test_without_a_gpu_it_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run(monkeypatch) == 1
    out = capsys.readouterr().out
    assert "gmpipe doctor" in out
    assert "--device cpu --quick" in out


def test_differences_of_regions_by_hand() -> None:
    boxes = torch.tensor([[0.0, 0.0, 0.5, 0.5], [0.5, 0.5, 1.0, 1.0]])
    scores, classes = torch.tensor([0.9, 0.4]), torch.tensor([1, 2])
    features = torch.tensor([[1.0, 2.0], [4.0, 0.0]])
    expected = Detections(boxes, scores, classes, features)
    order = torch.tensor([1, 0])
    swapped = Detections(boxes[order], scores[order], classes[order], features[order])
    assert differences([swapped], [expected]) == {
        "matched": 1.0,
        "boxes": 0.0,
        "scores": 0.0,
        "features": 0.0,
    }
    other = replace(
        expected,
        boxes=boxes + torch.tensor([0.0, 0.0, 0.01, 0.0]),
        classes=torch.tensor([1, 3]),
        features=features + 0.5,
    )
    found = differences([other], [expected])
    assert found["matched"] == 0.5
    assert found["boxes"] == pytest.approx(0.01)
    assert found["features"] == pytest.approx(0.5 / 4)
