"""Command `export`: a run's network as an ONNX file."""

from __future__ import annotations

from pathlib import Path

from pipeline.inference.export import export_onnx
from pipeline.learning.checkpoint import load_checkpoint
from stages.checkout.layout import CHECKPOINT_FILE


def export(run_folder: Path, output: Path | None) -> str:
    """Write the network of a run.

    Args:
        run_folder: of the run.
        output: file to write; None: <dataset>-<run>.onnx in the current folder. (Not in the run's:
            `gmpipe runs prune` takes a folder with a foreign file for no run of ours.)

    Returns:
        a line that says where it is.

    Raises:
        GmpipeError: there is no such run, or the packages that write ONNX are not installed.
    """
    checkpoint = load_checkpoint(run_folder / CHECKPOINT_FILE)
    path = output or Path(f"{checkpoint.dataset}-{run_folder.absolute().name}.onnx")
    export_onnx(checkpoint, path)
    return (
        f"{path}: {path.stat().st_size / 1e6:.1f} MB, {len(checkpoint.vocabulary)} labels, "
        f"regions with {checkpoint.feature_size} features"
    )
