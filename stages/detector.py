"""Stage `detector`: leave the data set's detector in data/<dataset>/detector/."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from pipeline.datasets.manifest import Manifest, read_boxes
from pipeline.errors import DamagedError
from pipeline.files import folder_lock, replacing_folder, sha256_file, write_json
from pipeline.regions.detector import (
    DESCRIPTION_FILE,
    DETECTOR_VERSION,
    TORCHVISION_WEIGHTS,
    build_model,
    class_count,
    fit_state,
    load_state,
    torchvision_weights_file,
    write_detector,
)
from pipeline.regions.fitting import FitImage, fit_detector, measure_detector, split_holdout
from pipeline.settings import DetectorSettings, FitSettings
from stages.checkout.layout import boxes_file, data_root, detector_folder, state_file
from stages.checkout.manifests import dataset_manifest
from stages.checkout.params import Request
from stages.checkout.remedies import advising
from stages.checkout.times import record_time
from stages.console.messages import say
from stages.console.progress import progress_bar, shows_bars


def resolve_detector(request: Request) -> str:
    """Resolve or fit the detector and write its weights, description and metrics.

    Returns:
        a line that says which detector it is.
    """
    began = time.monotonic()
    folder = detector_folder(request.dataset)
    chosen = request.detector
    with folder_lock(folder):
        if chosen.source == "imported":
            with replacing_folder(folder) as temporary:
                about = {"version": DETECTOR_VERSION, "source": "imported"}
                write_json(temporary / DESCRIPTION_FILE, about)
                write_json(temporary / "metrics.json", {})
            return f"{folder}: no detector, the regions of {request.dataset} are imported"
        if chosen.source == "fit" and chosen.fit is not None:
            line = _fit(folder, request, chosen, chosen.fit)
            record_time(request.dataset, "detector", began)
            return line
        if chosen.source == "torchvision":
            path = torchvision_weights_file(say, progress=shows_bars())
            classes = tuple(TORCHVISION_WEIGHTS.meta["categories"])
        else:
            path = Path(chosen.weights or "")
            classes = tuple(f"class {n}" for n in range(class_count(load_state(path), path)))
        state = load_state(path)
        model = build_model(  # sizes of views and regions don't touch the weights
            chosen.architecture,
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
                source=chosen.source,
                architecture=chosen.architecture,
                classes=classes,
            )
            write_json(temporary / "metrics.json", {})
        record_time(request.dataset, "detector", began)
        return f"{folder}: {path.name}, sha256 {description.weights_sha256}"


def _fit(folder: Path, request: Request, chosen: DetectorSettings, fit: FitSettings) -> str:
    manifest = dataset_manifest(request.dataset)
    images, classes = _training_images(request.dataset, manifest)
    fitted, held_out = split_holdout(images, fit)
    initial = None
    key: dict[str, Any] = {
        "detector": chosen.model_dump(mode="json"),
        "boxes": sha256_file(boxes_file(request.dataset)),
        "sources": manifest.sources,
    }
    if chosen.weights is not None:
        initial = load_state(Path(chosen.weights)), Path(chosen.weights)
        key["weights"] = sha256_file(initial[1])
    state = state_file("detector", key)
    with progress_bar(total=fit.steps, desc="fit detector", unit="step") as bar:

        def on_step(done: int, loss: float) -> None:
            bar.update(done - bar.n)
            bar.set_postfix(loss=f"{loss:.2f}", refresh=False)

        model = fit_detector(
            fitted,
            len(classes) + 1,
            chosen.architecture,
            fit,
            state_file=state,
            initial=initial,
            on_step=on_step,
        )
    metrics = measure_detector(model, held_out, fit)
    with replacing_folder(folder) as temporary:
        write_detector(
            temporary,
            model.cpu().state_dict(),
            source="fit",
            architecture=chosen.architecture,
            classes=("background", *classes),
        )
        write_json(temporary / "metrics.json", metrics)
    state.unlink(missing_ok=True)
    recalls = ", ".join(f"{value} at {m}" for m, value in metrics["recall_at"].items())
    return (
        f"{folder}: on {metrics['images']} held-out images, IoU 0.5: recall {recalls} regions; "
        f"precision {metrics['precision']}"
    )


def _training_images(dataset: str, manifest: Manifest) -> tuple[list[FitImage], tuple[str, ...]]:
    rows = manifest.rows("train").to_pylist()
    with advising(f"Run `gmpipe prepare --dataset {dataset}`.", DamagedError):
        table = read_boxes(boxes_file(dataset), [row["image_id"] for row in rows])
    images = [
        FitImage(row["image_id"], data_root(dataset) / row["path"], table.images[row["image_id"]])
        for row in rows
    ]
    return images, table.classes
