"""Measure the pipeline on a GPU: extraction, training, and whether its numbers are the CPU's.

    python -m benchmarks.gpu [--only SECTION] [--help]

It takes a few minutes, reads no data, writes only to a temporary folder, and runs from a checkout
that is not installed. It needs torch, torchvision, numpy, pillow, h5py, pyarrow,
pydantic and tabulate; and, to compare the training step, torch_geometric, without which it measures
only ours. With `--device cpu --quick` it tries all its sections on tiny sizes.

Precisions: `float32` is without TF32 anywhere, `tf32` allows it in matrix products and in
convolutions, and `bfloat16` is autocast, as in training.

- rates: the best rate of plain matrix products in each precision. All shares refer to it.
- voc2007, coco: a training step of 32 images: forward, loss (15), backward, SGD with momentum. Its
  time is the median of several steps, from one synchronisation to the next. `share` is the rate of
  the matrix products that it makes, divided by that of plain ones. `kernels` and `kernels_ms` are
  what the device ran in a step, and for how long: a step that takes much longer is bound by
  launches. Memory is the peak of a first step beyond what existed before it: activations,
  gradients, momentum. PyTorch Geometric's network has the same parameters and inputs.
- loop: epochs of `train_network` over a cache of COCO's size, with everything that a training does
  besides: reading, moving, shuffling, the schedule, the norms. `epoch_s` is its projection to the
  82,081 training images of MS-COCO.
- curve: the loss of each epoch of a small training on the device, compared with the CPU's. Its
  learning rate is low, since differences of rounding grow fast with a high one.
- extraction, numbers: see `benchmarks.gpu_regions`.

The last line is JSON with all figures; `failed` lists the sections that raised an error. The exit
code is 1 if there are any, or if there is no GPU.

Letters: M instances, C labels.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from io import TextIOWrapper
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from tabulate import tabulate
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu_regions import Figures, compare_regions, measure_extraction, show
from benchmarks.networks.costs import product_operations, product_rate, seconds
from benchmarks.networks.sides import CPU, TINY, Side, Size, make_inputs, our_side, their_side
from benchmarks.shards import DATASET, RECIPE, make_rows
from pipeline.labels.vectors import LabelVectors
from pipeline.learning.distributed import Processes
from pipeline.learning.loop import Row
from pipeline.learning.splits import SplitData
from pipeline.learning.training import train_network
from pipeline.settings import GmMlicSettings, TrainSettings
from pipeline.shards.index import write_index
from pipeline.shards.reader import RegionCache
from pipeline.shards.shard import shard_name, write_shard
from pipeline.tensors import computing_in

PRECISIONS = ("float32", "tf32", "bfloat16")
QUICK = Size(2, 4, 5, feature_size=16, vector_size=8, latent_size=16)
COCO_IMAGES = 82_081
"""Training images of MS-COCO 2014 that have a label."""


@dataclass
class Bench:
    """What the sections share.

    Attributes:
        device: that is measured.
        quick: tiny sizes and few repetitions.
        folder: for files, removed at the end.
        rates: precision -> operations per second of plain products; of `product_rates`.
    """

    device: torch.device
    quick: bool
    folder: Path
    rates: dict[str, float] = field(default_factory=dict)


def rates(bench: Bench) -> Figures:
    """Measure the rates of plain products, in TFLOP/s."""
    figures = {name: round(product_rates(bench)[name] / 1e12, 3) for name in PRECISIONS}
    show("TFLOP/s", figures)
    return figures


def product_rates(bench: Bench) -> dict[str, float]:
    """The rates of plain products, measured at the first call."""
    # A square, and the widest product of a training step at COCO's size.
    sizes = ((256,) * 3,) if bench.quick else ((8192,) * 3, (32 * 35 * 80, 512, 1536))
    for precision in PRECISIONS:
        dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
        if precision not in bench.rates:
            with computing_in(precision):
                bench.rates[precision] = product_rate(
                    8, sizes=sizes, device=bench.device, dtype=dtype
                )
    return bench.rates


def training_step(bench: Bench, size: Size) -> Figures:
    """Compare the training step of both networks in each precision."""
    makers = {"gmpipe": our_side}
    if importlib.util.find_spec("torch_geometric") is not None:
        makers["PyTorch Geometric"] = their_side
    else:
        print("PyTorch Geometric is not installed: its network is not measured")
    inputs = make_inputs(size)
    figures: Figures = {}
    print(f"a training step, B = {size.images}, M = {size.instances}, C = {size.labels}")
    for precision in PRECISIONS:
        costs: dict[str, Figures] = {}
        with computing_in(precision):
            for name, make_side in makers.items():
                # Libraries take memory at their first use.
                make_side(TINY, make_inputs(TINY), device=bench.device).train()
                side = make_side(size, inputs, device=bench.device)
                side.half = precision == "bfloat16"
                costs[name] = step_costs(bench, side, product_rates(bench)[precision])
                del side
        figures[precision] = compared(costs)
        show(precision, figures[precision])
    return figures


def step_costs(bench: Bench, side: Side, rate: float) -> Figures:
    """Measure a training step; what only a GPU can tell is left out on a CPU.

    Args:
        side: that has made no step yet.
        rate: of plain products, in operations per second.
    """
    memory = first_step_memory(side, bench.device)
    warm_up, steps = (0, 1) if bench.quick else (3, 10)
    for _ in range(warm_up):
        side.train()
    taken = statistics.median(seconds(side.train, bench.device) for _ in range(steps))
    images = len(side.inputs.truth)
    return {
        "step_ms": round(1e3 * taken, 2),
        "images_per_s": round(images / taken),
        "share": round(product_operations(side.train) / taken / rate, 3),
        "epoch_s": round(COCO_IMAGES / images * taken, 1),
        **({} if memory is None else {"memory_mb": round(memory / 1e6)}),
        **kernels(side.train, bench.device),
    }


def first_step_memory(side: Side, device: torch.device) -> int | None:
    """Make a step, and measure the peak of its memory in bytes; None on a CPU."""
    if device.type != "cuda":
        side.train()
        return None
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    side.train()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def kernels(work: Callable[[], object], device: torch.device) -> Figures:
    """Count the kernels and copies that the device runs for ``work``, and sum their times."""
    if device.type != "cuda":
        return {}
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        work()
        torch.cuda.synchronize(device)
    ran = [event for event in profiler.events() if event.device_type == DeviceType.CUDA]
    microseconds = sum(event.time_range.elapsed_us() for event in ran)
    return {"kernels": len(ran), "kernels_ms": round(microseconds / 1e3, 2)}


def compared(costs: dict[str, Figures]) -> Figures:
    """Our costs, with those of the other network and the ratios, if that was measured."""
    ours, theirs = costs["gmpipe"], costs.get("PyTorch Geometric")
    if theirs is None:
        return ours
    figures = {
        **ours,
        "geometric_step_ms": theirs["step_ms"],
        "speedup": round(theirs["step_ms"] / ours["step_ms"], 2),
    }
    if "memory_mb" in ours:
        figures["geometric_memory_mb"] = theirs["memory_mb"]
        figures["memory_ratio"] = round(ours["memory_mb"] / theirs["memory_mb"], 3)
    return figures


def voc2007(bench: Bench) -> Figures:
    """Compare the training step at VOC's size."""
    return training_step(bench, QUICK if bench.quick else Size(32, instances=10, labels=20))


def coco(bench: Bench) -> Figures:
    """Compare the training step at COCO's size."""
    return training_step(bench, QUICK if bench.quick else Size(32, instances=35, labels=80))


@dataclass(frozen=True)
class Task:
    """Random regions and truth to train on."""

    split: SplitData
    vectors: LabelVectors

    def train(
        self, device: torch.device, settings: TrainSettings, state_file: Path
    ) -> tuple[list[Row], list[float]]:
        """Train with seed 0; return the history, and the seconds of each epoch."""
        ends = [time.perf_counter()]
        training = train_network(
            self.split,
            self.vectors,
            0,
            settings,
            state_file=state_file,
            processes=Processes(rank=0, count=1, on_machine=1, device=device),
            on_epoch=lambda row: ends.append(time.perf_counter()),
        )
        return training.history, np.diff(ends).tolist()


def make_task(folder: Path, images: int, regions: int, labels: int) -> Task:
    """Write a cache of random regions to ``folder``, and draw truth and label vectors."""
    path = folder / shard_name(0)
    write_shard(path, make_rows(0, images, regions), dataset=DATASET, recipe=RECIPE)
    write_index(folder, DATASET, RECIPE, [path])
    rng = np.random.default_rng(0)
    truth = (rng.random((images, labels)) < 0.1).astype(np.int8)
    ids = [f"image_{image:012d}" for image in range(images)]
    names = tuple(f"label {label}" for label in range(labels))
    vectors = rng.standard_normal((labels, 300)).astype(np.float32)
    rows = np.arange(images)[:, None]
    split = SplitData(RegionCache.open(folder), ids, rows, truth, regions)
    return Task(split, LabelVectors(names, vectors, "random"))


def train_settings(bench: Bench, epochs: int, batch_size: int, **changes: Any) -> TrainSettings:
    """The network of the paper, smaller if quick, without dropout."""
    network = GmMlicSettings(latent_size=16 if bench.quick else 512)
    return TrainSettings(network=network, epochs=epochs, batch_size=batch_size, **changes)


def loop(bench: Bench) -> Figures:
    """Measure epochs of a training at COCO's size."""
    images, regions, labels, batch = (8, 3, 4, 4) if bench.quick else (1024, 35, 80, 32)
    task = make_task(bench.folder / "loop", images, regions, labels)
    print(f"train_network, {images} images, B = {batch}, M = {regions}, C = {labels}")
    figures: Figures = {}
    for precision in PRECISIONS:
        settings = train_settings(bench, 3, batch, precision=precision)
        _, taken = task.train(bench.device, settings, bench.folder / "loop.pt")
        rate = images / statistics.median(taken[1:])  # the first epoch warms up
        figures[precision] = {
            "images_per_s": round(rate),
            "step_ms": round(1e3 * batch / rate, 2),
            "epoch_s": round(COCO_IMAGES / rate, 1),
        }
        show(precision, figures[precision])
    return figures


def curve(bench: Bench) -> Figures:
    """Compare the losses of a training's epochs with those on the CPU in float32."""
    images, regions, labels, epochs = (8, 3, 4, 2) if bench.quick else (64, 10, 20, 10)
    task = make_task(bench.folder / "curve", images, regions, labels)
    batch = images // 4

    def losses(device: torch.device, precision: str) -> np.ndarray:
        settings = train_settings(bench, epochs, batch, precision=precision, learning_rate=0.002)
        with computing_in("float32"):
            history, _ = task.train(device, settings, bench.folder / "curve.pt")
        return np.array([row["train_loss"] for row in history])

    expected = losses(CPU, "float32")
    curves = {name: losses(bench.device, name) for name in PRECISIONS}
    names = ["epoch", "CPU", *curves]
    rows = zip(range(1, epochs + 1), expected, *curves.values(), strict=True)
    print(f"training loss after each of {epochs} epochs of {images // batch} steps")
    print(tabulate(rows, headers=names, floatfmt=".5f"))
    return {
        name: {"deviation": float(f"{np.abs(found / expected - 1).max():.2e}")}
        for name, found in curves.items()
    }


def extraction(bench: Bench) -> Figures:
    """Compare extraction with torchvision's model."""
    return measure_extraction(bench.device, bench.folder, quick=bench.quick)


def numbers(bench: Bench) -> Figures:
    """Compare the regions that are found with those on the CPU."""
    return compare_regions(bench.device, quick=bench.quick)


SECTIONS: dict[str, Callable[[Bench], Figures]] = {
    section.__name__: section
    for section in (rates, voc2007, coco, loop, curve, numbers, extraction)
}


def run_sections(bench: Bench, names: list[str]) -> Figures:
    """Run sections; one that fails prints its traceback, and the others still run."""
    figures: Figures = {}
    failed = []
    for name in names:
        print(f"\n== {name}")
        started = time.perf_counter()
        try:
            figures[name] = SECTIONS[name](bench)
        except Exception:  # of any kind: the machine may be lent for minutes
            failed.append(name)
            traceback.print_exc(file=sys.stdout)
        print(f"-- {name}: {time.perf_counter() - started:.1f} s")
    return {**figures, "failed": failed}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=(__doc__ or "").split("\n", 1)[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--device", default="cuda", help="`cpu` tries the benchmark without a GPU")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to try the benchmark")
    parser.add_argument(
        "--only", action="append", choices=list(SECTIONS), help="run this section; repeatable"
    )
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit(
            f"torch {torch.__version__} finds no CUDA device. `gmpipe doctor` says why; to try the "
            "benchmark without one: python -m benchmarks.gpu --device cpu --quick"
        )
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    # Each line at once, also through a pipe: the run may be cut off.
    cast(TextIOWrapper, sys.stdout).reconfigure(line_buffering=True)
    print(f"{card}, torch {torch.__version__}")
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        figures = run_sections(
            Bench(device, options.quick, Path(folder)), options.only or list(SECTIONS)
        )
    print(f"\n{time.perf_counter() - started:.0f} s in all")
    print(json.dumps({"device": card, "torch": torch.__version__, **figures}))
    if figures["failed"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
