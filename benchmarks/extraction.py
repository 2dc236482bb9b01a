"""Images per second of gmpipe's extraction, compared with torchvision's model on tensors in memory.

Both get the same images in the same batches, with the same weights, score threshold and number of
regions. The bare loop gets its images decoded, resized and in float32 before the clock starts, and
drops what it detects. gmpipe decodes the files, detects the regions, pools a feature for each and
writes shards. The two take turns, so that a machine that becomes slower or faster affects both
alike. Each figure is the median over all turns.

    python -m benchmarks.extraction [--images FOLDER] [--help]

The last line is JSON: ``vs_bare_loop`` is gmpipe's rate divided by the bare loop's at a score
threshold of 0.05, torchvision's default; ``parts`` has all rates, including those at 0.0.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, fasterrcnn_resnet50_fpn
from torchvision.ops import FrozenBatchNorm2d

from pipeline.machine import cores
from pipeline.regions.detection import prepare_for_extraction
from pipeline.regions.detector import DetectorDescription
from pipeline.regions.extraction import ShardExtractor, extraction_recipe
from pipeline.regions.plan import ViewJob
from pipeline.regions.transforms import load_image, to_tensor, view_of
from pipeline.settings import ArchitectureSettings, ExtractSettings

THRESHOLDS = (0.05, 0.0)
_SHARDS_AT_ONCE = 3  # as on a worker of `gmpipe extract`: one detects, others decode and write


def draw_photographs(folder: Path, count: int) -> None:
    """Draw JPEGs of 500 x 375 pixels: soft patches of colour with noise, some 60 kB each."""
    rng = np.random.default_rng(0)
    for number in range(count):
        patches = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        soft = np.asarray(patches.resize((500, 375), Image.Resampling.BICUBIC), dtype=float)
        noisy = (soft + rng.normal(0, 8, soft.shape)).clip(0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(folder / f"{number:05d}.jpg", quality=90)


def view(path: Path, settings: ExtractSettings) -> Tensor:
    """The whole image as extraction takes it: (3, S, S) float32."""
    picture = load_image(path)
    return to_tensor(
        view_of(picture, 0, size=settings.size, image_id=path.name, seed=0, flip=False)
    )


def take_statistics(norm: Any, inputs: tuple[Tensor]) -> None:
    """A hook that gives a norm the statistics of its inputs."""
    norm.running_mean.copy_(inputs[0].mean((0, 2, 3)))
    norm.running_var.copy_(inputs[0].var((0, 2, 3)))


@torch.no_grad()
def enliven(
    model: FasterRCNN, views: Tensor, set_norm: Callable[..., None] = take_statistics
) -> None:
    """Make random weights detect something.

    Norms get the statistics of real activations, and the outputs of predictors are spread, so that
    an image has detections of several classes, with scores from 0 to 1.

    Args:
        model: in eval mode.
        views: (B, 3, S, S) float32 in [0, 1].
        set_norm: called with each norm and its inputs, before they pass it.
    """

    def spread_to(deviation: float) -> Any:
        """Return a hook that gives a layer's outputs a mean of 0 and this standard deviation: each
        unit of a linear layer on its own, all of a convolution together."""

        def spread(module: Any, _: Any, output: Tensor) -> Tensor:
            if module in done:
                return output
            done.add(module)
            axis = 0 if output.ndim == 2 else None
            mean, factor = output.mean(axis), deviation / output.std(axis)
            module.weight.mul_(factor[:, None] if output.ndim == 2 else factor)
            module.bias.sub_(mean).mul_(factor)
            return (output - mean) * factor

        return spread

    done: set[nn.Module] = set()
    heads = model.roi_heads
    hooks = [
        module.register_forward_pre_hook(set_norm)
        for module in model.modules()
        if isinstance(module, nn.BatchNorm2d | FrozenBatchNorm2d)
    ]
    for module, deviation in (
        (model.rpn.head.cls_logits, 2.0),
        (model.rpn.head.bbox_pred, 0.3),
        (heads.box_head.fc6, 1.0),
        (heads.box_head.fc7, 1.0),
        (heads.box_predictor.cls_score, 1.2),
        (heads.box_predictor.bbox_pred, 0.5),
    ):
        hooks.append(module.register_forward_hook(spread_to(deviation)))
    model(list(views))
    for hook in hooks:
        hook.remove()


def bare_loop(model: FasterRCNN, views: Tensor, settings: ExtractSettings) -> int:
    """Run torchvision's model on views in memory; return the number of detections."""
    detections = 0
    with torch.inference_mode():
        for batch in views.split(settings.batch_size):
            detections += sum(len(image["scores"]) for image in model(list(batch)))
    return detections


def end_to_end(model: FasterRCNN, paths: Sequence[Path], settings: ExtractSettings) -> int:
    """Extract files to shards as a worker of `gmpipe extract` does; return the number of rows."""
    description = DetectorDescription(
        "file", ArchitectureSettings(norm="batch"), ("background", "thing"), "0" * 64
    )
    recipe = extraction_recipe(description, settings)
    extractor = ShardExtractor(model, settings, threads=cores())
    starts = range(0, len(paths), settings.rows_per_shard)

    with tempfile.TemporaryDirectory() as cache:

        def shard(start: int) -> int:
            some = paths[start : start + settings.rows_per_shard]
            outcome = extractor.extract(
                [ViewJob(path.name, path.name, 0) for path in some],
                np.zeros((len(some), 32), dtype=np.uint8),
                paths[0].parent,
                path=Path(cache) / f"regions-{start:05d}.h5",
                dataset="benchmark",
                recipe=recipe,
            )
            return outcome.rows

        with ThreadPoolExecutor(_SHARDS_AT_ONCE) as pool:
            return sum(pool.map(shard, starts))


def measure(
    paths: Sequence[Path], *, repetitions: int, batch_size: int, regions: int, size: int
) -> dict[str, dict[str, float]]:
    """Medians of images per second, and their ratio, for each threshold."""
    torch.manual_seed(0)
    settings = ExtractSettings(
        size=size, regions=regions, batch_size=batch_size, rows_per_shard=2 * batch_size
    )
    views = torch.stack([view(path, settings) for path in paths])
    theirs = fasterrcnn_resnet50_fpn(
        weights=None,
        weights_backbone=None,
        min_size=size,
        max_size=size,
        box_nms_thresh=settings.nms_threshold,
        box_detections_per_img=regions,
    ).eval()
    enliven(theirs, views[:2])
    ours = prepare_for_extraction(theirs)
    rates: dict[tuple[float, str], list[float]] = {
        (threshold, name): [] for threshold in THRESHOLDS for name in ("bare_loop", "gmpipe")
    }
    for turn in range(repetitions + 1):
        for threshold in THRESHOLDS:
            theirs.roi_heads.score_thresh = ours.roi_heads.score_thresh = threshold
            used = settings.model_copy(update={"score_threshold": threshold})
            started = time.perf_counter()
            detections = bare_loop(theirs, views, used)
            between = time.perf_counter()
            rows = end_to_end(ours, paths, used)
            ended = time.perf_counter()
            if rows != len(paths) or detections < len(paths):
                raise SystemExit(f"{rows} rows and {detections} detections of {len(paths)} images")
            if turn:  # the first warms up
                rates[threshold, "bare_loop"].append(len(paths) / (between - started))
                rates[threshold, "gmpipe"].append(len(paths) / (ended - between))
                print(
                    f"turn {turn}, threshold {threshold}: {between - started:.1f} s and "
                    f"{ended - between:.1f} s, {detections / len(paths):.1f} detections per image",
                    flush=True,
                )
    parts = {}
    for threshold in THRESHOLDS:
        bare, gmpipe = (rates[threshold, name] for name in ("bare_loop", "gmpipe"))
        parts[str(threshold)] = {
            "bare_loop": round(statistics.median(bare), 3),
            "gmpipe": round(statistics.median(gmpipe), 3),
            "ratio": round(statistics.median(gmpipe) / statistics.median(bare), 3),
        }
    return parts


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.extraction",
        description=(__doc__ or "").split("\n", 1)[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--images", type=Path, help="folder of JPEGs; without it, they are drawn")
    parser.add_argument("--count", type=int, default=32, help="number of images")
    parser.add_argument("--repetitions", type=int, default=3, help="number of turns")
    parser.add_argument("--batch-size", type=int, default=8, help="images per batch")
    parser.add_argument("--regions", type=int, default=10, help="m, regions per image")
    parser.add_argument("--size", type=int, default=448, help="side of a view, in pixels")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as drawn:
        folder = options.images or Path(drawn)
        if options.images is None:
            draw_photographs(folder, options.count)
        paths = sorted(folder.glob("*.jpg"))[: options.count]
        if not paths:
            raise SystemExit(f"there is no .jpg in {folder}. Give another folder with --images.")
        parts = measure(
            paths,
            repetitions=options.repetitions,
            batch_size=options.batch_size,
            regions=options.regions,
            size=options.size,
        )
    print()
    print(f"images/s, {len(paths)} images of {options.size} x {options.size}, batches of", end=" ")
    print(f"{options.batch_size}, m = {options.regions}, {torch.get_num_threads()} threads")
    print(f"{'threshold':>10} {'bare loop':>10} {'gmpipe':>10} {'ratio':>7}")
    for threshold, part in parts.items():
        print(f"{threshold:>10} {part['bare_loop']:>10} {part['gmpipe']:>10} {part['ratio']:>7}")
    print(json.dumps({"vs_bare_loop": parts["0.05"]["ratio"], "parts": parts}))


if __name__ == "__main__":
    main()
