"""Bundles: folders with all that a trained run needs to label new photographs, and nothing else.

A bundle is used without the checkout that it was made in. It holds

    bundle.json             version, data set and name of the run, and the sha256 of the other files
    checkpoint.pt           the run's: network, vocabulary, and the settings of both stages
    detector/detector.json  the description and
    detector/weights.pt     the weights of the detector whose regions the run was trained on

The three files are copies. So the same run always gives the same bytes, and its checkpoint keeps
its sha256.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from pipeline.errors import DamagedError, GmpipeError, InputError, MissingError, advising
from pipeline.files import exists, folder_lock, replacing, replacing_folder, sha256_file
from pipeline.formats.sealed import read_sealed_json, write_sealed_json
from pipeline.inference.trained import TrainedRun, attach_detector, detector_of
from pipeline.learning import CHECKPOINT_FILE
from pipeline.learning.checkpoint import load_checkpoint
from pipeline.regions.detector import DESCRIPTION_FILE, WEIGHTS_FILE

BUNDLE_FILE = "bundle.json"
BUNDLE_VERSION = 1

_DETECTOR = "detector"
_FILES = (CHECKPOINT_FILE, f"{_DETECTOR}/{DESCRIPTION_FILE}", f"{_DETECTOR}/{WEIGHTS_FILE}")
_COPY_AGAIN = "Copy the bundle again, or export the run again."


def is_bundle(folder: Path) -> bool:
    """Whether ``folder`` is a bundle, intact or not."""
    return exists(folder / BUNDLE_FILE)


def write_bundle(folder: Path, run: str | Path, detector: str | Path | None = None) -> None:
    """Write the bundle of a run, whole or not at all. A former bundle is replaced, if it is intact.

    Args:
        folder: to write.
        run, detector: as `load_run` takes them. That they fit is not checked here.

    Raises:
        InputError: there is something else at ``folder``.
        BusyError: another process is writing to ``folder``.
        AccessError: the system refuses to read or write.
    """
    run = Path(run).absolute()
    dataset = load_checkpoint(run / CHECKPOINT_FILE).dataset
    _check_replaceable(folder)
    sources = (run, *2 * [detector_of(run, dataset, detector)])
    with folder_lock(folder), replacing_folder(folder) as temporary:
        for name, source in zip(_FILES, sources, strict=True):
            with replacing(temporary / name) as copy:
                shutil.copyfile(source / Path(name).name, copy)
        write_sealed_json(
            temporary / BUNDLE_FILE,
            {
                "version": BUNDLE_VERSION,
                "dataset": dataset,
                "run": run.name,
                "files": {name: sha256_file(temporary / name) for name in _FILES},
            },
        )


def _check_replaceable(folder: Path) -> None:
    """Check that at most a bundle, and no file of somebody, would be lost.

    Raises:
        InputError: there is something else.
    """
    if not exists(folder):
        return
    try:
        read_sealed_json(folder / BUNDLE_FILE)
        problem = ""
    except (GmpipeError, OSError):
        problem = f"it has no intact {BUNDLE_FILE}"
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*")}
    if others := found - {BUNDLE_FILE, _DETECTOR, *_FILES}:
        problem = f"{min(others)} is no file of a bundle"
    if problem:
        raise InputError(
            f"{folder} is not a bundle, and would be replaced: {problem}.",
            "Choose another name for the bundle, or move this away.",
        )


def load_bundle(folder: str | Path) -> TrainedRun:
    """Load a bundle: the same as `load_run` gives for the run that it was made of.

    Raises:
        MissingError: there is no bundle in ``folder``.
        DamagedError: a file of it is missing or was changed, or it has another version.
    """
    folder = Path(folder)
    detector = check_bundle(folder)
    return attach_detector(load_checkpoint(folder / CHECKPOINT_FILE), folder, detector)


def check_bundle(folder: Path) -> Path:
    """Check that a bundle is whole, before anything of it is used.

    Returns:
        the folder of its detector.

    Raises:
        MissingError, DamagedError: as `load_bundle`.
    """
    path = folder / BUNDLE_FILE
    try:
        with advising(_COPY_AGAIN, DamagedError):
            content = read_sealed_json(path)
    except (FileNotFoundError, NotADirectoryError):
        raise MissingError(
            f"{folder} is not a bundle: it has no {BUNDLE_FILE}.", "Name the folder of a bundle."
        ) from None
    if (version := content.get("version")) != BUNDLE_VERSION:
        raise DamagedError(
            f"{path} has version {version}, but this release of gmpipe reads version "
            f"{BUNDLE_VERSION}.",
            "Export the run again with this release.",
        )
    digests = content["files"]
    for name in _FILES:
        if not exists(folder / name):
            raise DamagedError(f"The bundle {folder} lacks {name}.", _COPY_AGAIN)
        if (digest := sha256_file(folder / name)) != digests[name]:
            raise DamagedError(
                f"{folder / name} has sha256 {digest}, but {BUNDLE_FILE} expects "
                f"{digests[name]}: the file was changed or damaged.",
                _COPY_AGAIN,
            )
    return folder / _DETECTOR
