"""Command `export`: write the network of a run as an ONNX file."""

from __future__ import annotations

from pathlib import Path

from pipeline.formats.text import counted
from pipeline.inference.export import export_onnx
from stages.checkout.models import open_checkpoint
from stages.console.progress import progress_phase


def export(run_folder: Path, output: Path | None) -> str:
    """Write the network of a run.

    Args:
        run_folder: folder of the run.
        output: file to write; None for <dataset>-<run>.onnx in the current folder. (Not in the
            run's: a folder with another file is no run to `gmpipe runs prune`.)

    Returns:
        a line that says what was written, and where.

    Raises:
        MissingError: there is no such run, or the packages that write ONNX are not installed.
        DamagedError: its checkpoint can't be read, or holds weights that are not finite.
        InputError: its head computes something that can't be translated to ONNX.
    """
    checkpoint = open_checkpoint(run_folder)
    path = output or Path(f"{checkpoint.dataset}-{run_folder.absolute().name}.onnx")
    export_onnx(checkpoint, path, lambda name: progress_phase(f"export, {name}"))
    return (
        f"{path}: {path.stat().st_size / 1e6:.1f} MB, "
        f"{counted(len(checkpoint.vocabulary), 'label')}, "
        f"regions with {checkpoint.feature_size} features"
    )
