"""Stage `detector`: fit or copy the data set's detector to data/<dataset>/detector/."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from pipeline.datasets.manifest import Manifest, read_boxes
from pipeline.errors import DamagedError, InputError, MismatchError, advising
from pipeline.files import (
    check_writable,
    folder_lock,
    remove_temporaries,
    replacing_folder,
    sha256_file,
    tidy,
    write_json,
)
from pipeline.formats.sealed import write_sealed_json
from pipeline.formats.text import counted
from pipeline.interrupts import Interrupted
from pipeline.regions.detector import (
    DESCRIPTION_FILE,
    DETECTOR_VERSION,
    TORCHVISION_WEIGHTS,
    build_model,
    check_described,
    class_count,
    described_beside,
    fit_state,
    load_state,
    torchvision_weights_file,
    write_detector,
)
from pipeline.regions.fitting import (
    CONFIDENT,
    FitImage,
    fit_detector,
    measure_detector,
    split_holdout,
)
from pipeline.settings import DetectorSettings, FitSettings
from stages.checkout.layout import (
    boxes_file,
    data_root,
    detector_folder,
    prepared_folder,
    state_file,
)
from stages.checkout.manifests import dataset_manifest
from stages.checkout.params import Request
from stages.checkout.times import record_time
from stages.console.messages import note, say, stopped
from stages.console.progress import progress_bar, progress_phase, shows_bars

_FEWEST = 2  # images of a fit: one to learn from, and one to measure on
_METRICS_FILE = "metrics.json"  # recall and precision of a detector that was fitted here


def resolve_detector(request: Request) -> str:
    """Fit the detector or take it from its weights; write weights, description and metrics.

    Returns:
        a line that says which detector it is, and where.
    """
    began = time.monotonic()
    folder = detector_folder(request.dataset)
    settings = request.detector
    with folder_lock(folder):
        check_writable(folder.parent)  # before a fit, which takes long
        tidy(folder)
        if settings.source == "imported":
            return _record_imported(folder, request.dataset)
        if settings.source == "fit" and settings.fit is not None:
            prepared = prepared_folder(request.dataset)
            again = f"Delete {prepared}, and run `gmpipe prepare --dataset {request.dataset}`."
            with advising(again, MismatchError):  # the boxes are of other photographs
                line = _fit(folder, request, settings, settings.fit)
        else:
            line = _copy(folder, request, settings)
    record_time(request.dataset, "detector", began)
    return line


def _record_imported(folder: Path, dataset: str) -> str:
    with replacing_folder(folder) as temporary:
        write_sealed_json(
            temporary / DESCRIPTION_FILE, {"version": DETECTOR_VERSION, "source": "imported"}
        )
        write_json(temporary / _METRICS_FILE, {})
    return f"{folder}: no detector, since the regions of {dataset} are imported"


def _copy(folder: Path, request: Request, settings: DetectorSettings) -> str:
    """Check torchvision's weights or those of a file, and write them to ``folder``."""
    origin = None
    if settings.source == "torchvision":
        path = torchvision_weights_file(say, progress=shows_bars())
        state = load_state(path)
        classes = tuple(TORCHVISION_WEIGHTS.meta["categories"])
    else:
        path = Path(settings.weights or "")
        state = load_state(path)
        classes = tuple(f"class {number}" for number in range(class_count(state, path)))
        described = described_beside(path)
        if described is not None:
            # More or fewer proposals can be chosen for any weights, but must not be forgotten.
            check_described(settings.architecture, described, path, {"proposals"})
            classes = described.classes
            if described.has_seen_coco:
                origin = described.origin_sha256 or origin
    model = build_model(  # the sizes of views and regions do not affect the weights
        settings.architecture,
        len(classes),
        size=request.extract.size,
        regions=1,
        score_threshold=0,
        nms_threshold=0.5,
    )
    fit_state(model, state, path)
    with replacing_folder(folder) as temporary:
        description = write_detector(
            temporary,
            model.state_dict(),
            source=settings.source,
            architecture=settings.architecture,
            classes=classes,
            origin_sha256=origin or sha256_file(path),
        )
        write_json(temporary / _METRICS_FILE, {})
    return f"{folder}: {path.name}, sha256 {description.weights_sha256}"


def _fit(folder: Path, request: Request, settings: DetectorSettings, fit: FitSettings) -> str:
    """Fit on the training split's boxes, measure on its held-out part, write to ``folder``."""
    manifest = dataset_manifest(request.dataset)
    images, classes = _training_images(request.dataset, manifest)
    fitted, held_out = split_holdout(images, fit)
    initial = None
    key: dict[str, Any] = {
        "dataset": request.dataset,
        "detector": settings.model_dump(mode="json"),
        "boxes": sha256_file(boxes_file(request.dataset)),
        "sources": manifest.sources,
        "images": manifest.train_sha256,
    }
    if settings.weights is not None:
        initial = load_state(Path(settings.weights)), Path(settings.weights)
        described = described_beside(initial[1])
        if described is not None:
            other = {"anchor_sizes", "proposals"}  # a fit can learn to use others
            check_described(settings.architecture, described, initial[1], other)
        key["weights"] = sha256_file(initial[1])
    state = state_file("detector", request.dataset, key)
    remove_temporaries(state.parent, state.name)
    with progress_bar(total=fit.steps, desc="fit detector", unit="step") as bar:

        def on_step(done: int, loss: float) -> None:
            bar.update(done - bar.n)
            bar.set_postfix(loss=f"{loss:.2f}", refresh=False)

        try:
            model = fit_detector(
                fitted,
                len(classes) + 1,
                settings.architecture,
                fit,
                state_file=state,
                initial=initial,
                on_start=bar.resume,
                on_step=on_step,
            )
        except Interrupted as interrupted:
            raise stopped(interrupted, fit.steps) from None
    with progress_phase("measure detector", len(held_out), "image") as on_images:
        metrics = measure_detector(model, held_out, fit, on_images)
    with replacing_folder(folder) as temporary:
        write_detector(
            temporary,
            model.cpu().state_dict(),
            source="fit",
            architecture=settings.architecture,
            classes=("background", *classes),
            origin_sha256=key.get("weights"),
        )
        write_json(temporary / _METRICS_FILE, metrics)
    state.unlink(missing_ok=True)
    recalls = ", ".join(f"{value} at {m}" for m, value in metrics["recall_at"].items())
    return (
        f"{folder}: on {counted(metrics['images'], 'held-out image')} at IoU 0.5: recall {recalls} "
        f"regions; precision {metrics['precision']} of those with a score of {CONFIDENT} or more"
    )


def _training_images(dataset: str, manifest: Manifest) -> tuple[list[FitImage], tuple[str, ...]]:
    """The training images whose boxes are complete, and the names of the boxes' classes."""
    rows = manifest.rows("train").to_pylist()
    with advising(f"Run `gmpipe prepare --dataset {dataset}`.", DamagedError):
        table = read_boxes(boxes_file(dataset), [row["image_id"] for row in rows])
    complete = [row for row in rows if row["image_id"] not in table.incomplete]
    if len(complete) < len(rows):
        found = (
            f"{len(rows) - len(complete)} of {len(rows)} training images have objects without a "
            "box, or boxes whose place is unknown"
        )
        check = f"`gmpipe prepare --check --dataset {dataset}` says which, and what to do"
        if len(complete) < _FEWEST:
            raise InputError(
                f"{found}, which leaves {len(complete)} to fit a detector on, expected {_FEWEST} "
                "or more.",
                f"{check}.",
            )
        note(f"{found}. The detector is fitted without them. {check}.")
    images = [
        FitImage(
            row["image_id"],
            data_root(dataset) / row["path"],
            table.images[row["image_id"]],
            None if row["width"] is None else (row["width"], row["height"]),
        )
        for row in complete
    ]
    return images, table.classes
