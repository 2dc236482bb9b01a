"""Command `export`: write the network of a run as an ONNX file, or a run as a bundle."""

from __future__ import annotations

from pathlib import Path

from pipeline.errors import InputError
from pipeline.formats.text import counted
from pipeline.inference.bundle import is_bundle, write_bundle
from pipeline.inference.export import export_onnx
from stages.checkout.disk import shown_bytes
from stages.checkout.models import open_checkpoint, open_run
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


def export_bundle(run_folder: Path, detector: Path | None, output: Path) -> str:
    """Write a run with its detector as a bundle.

    Args:
        run_folder, detector: as `open_run` takes them.
        output: folder to write.

    Returns:
        a line that says what was written, and where.

    Raises:
        GmpipeError: as `open_run`; a run on imported regions has no detector.
        InputError: ``run_folder`` is a bundle, or as `write_bundle`.
        AccessError, BusyError: as `write_bundle`.
    """
    if is_bundle(run_folder):
        raise InputError(f"{run_folder} is a bundle already.", "Copy its folder.")
    run = open_run(run_folder, detector)
    write_bundle(output, run_folder, detector)
    size = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    return f"{output}: {shown_bytes(size)}, {counted(len(run.vocabulary), 'label')}"
