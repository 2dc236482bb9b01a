"""Compare the matching network with the same network in PyTorch Geometric, by time and memory.

    python -m benchmarks.matching [--quick] [--help]

The other network (`benchmarks.networks.geometric`) has the same parameters. Its graphs are built
before the clock starts, while ours finds its neighbours within the measured time, and they hold no
padding. Before anything is timed, both must give equal scores and equal gradients.

What is measured, on random inputs in which every instance is real:

- forward: logits of the images, without gradients. Training step: forward, loss (15), backward,
  SGD with momentum. Both networks take turns; a ratio is the median over the turns. Everything is
  measured in float32, and again with the scores under autocast to bfloat16 in both networks.
- memory of a training step, each network in a process of its own: the peak of the resident set
  (VmHWM) minus the resident set once network and inputs exist and a tiny network of the same kind
  has made a step. So it holds activations, gradients, the optimiser's state and what the allocator
  wastes, but not parameters, inputs and libraries.
- matmul_share: floating-point operations per second of all matrix products that our step really
  makes, as a share of the best rate of a plain product (`RATE_SIZES`) of that precision in the same
  run. Where our network computes wide float32 products with oneDNN
  (`pipeline.heads.matching.products`), that is oneDNN's rate. The other network uses torch's own.
- labels: our training step with many labels, of which each reads a fixed number of others and, for
  contrast, all others. Linear means that time and memory per label stay what they are at the
  smallest number. `growth` compares what one further label costs in the last interval with what it
  costs in the first; what does not depend on the labels cancels out.

The last line is JSON: `forward_speedup` and `train_speedup` are PyTorch Geometric's time over ours,
`memory_ratio` is our memory over its.

Letters: B images, M instances, C labels.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from tabulate import tabulate

from benchmarks.networks.costs import product_operations, product_rate, seconds, step_memory
from benchmarks.networks.sides import (
    Side,
    Size,
    make_inputs,
    our_side,
    require_close,
    require_equal,
    their_side,
)
from pipeline.machine import cores


def compare(size: Size, *, turns: int, threads: int, half: bool = False) -> dict[str, float]:
    """Measure both networks for one size, print the table, and return the ratios.

    ``half`` is that of `Side`.
    """
    inputs = make_inputs(size)
    sides = {"gmpipe": our_side(size, inputs), "PyTorch Geometric": their_side(size, inputs)}
    sides = {name: replace(side, half=half) for name, side in sides.items()}
    ours, theirs = sides.values()
    theirs.network.load_state_dict(ours.network.state_dict())
    if half:
        require_close(sides.values())
    operations = {
        "forward": product_operations(ours.forward),
        "train": product_operations(ours.train),
    }
    theirs.forward()
    times, rate = _in_turn(sides, list(operations), turns)
    state = 2 * 4 * sum(parameter.numel() for parameter in ours.network.parameters())
    del sides, ours, theirs
    memory = {
        name: step_memory(whose, size, threads, half=half)
        for name, whose in (("gmpipe", "ours"), ("PyTorch Geometric", "theirs"))
    }

    def speedup(kind: str) -> float:
        pairs = zip(times["PyTorch Geometric", kind], times["gmpipe", kind], strict=True)
        return round(statistics.median(their / our for their, our in pairs), 2)

    def share(kind: str) -> float:
        return round(operations[kind] / statistics.median(times["gmpipe", kind]) / rate, 3)

    table = [
        (
            name,
            *(f"{statistics.median(times[name, kind]):.3f}" for kind in operations),
            f"{memory[name]:.0f}",
        )
        for name in memory
    ]
    sizes = f"B = {size.images}, M = {size.instances}, C = {size.labels}, {threads} threads"
    print(f"\n{sizes}, {'bfloat16' if half else 'float32'}")
    print(tabulate(table, headers=["median of", "forward, s", "training step, s", "memory, MB"]))
    print(f"{state / 1e6:.0f} MB of each are gradients and momentum")
    print(
        f"matrix products of gmpipe: {operations['forward'] / 1e9:.1f} GFLOP forward, "
        f"{operations['train'] / 1e9:.1f} in a training step; "
        f"share of {rate / 1e9:.1f} GFLOP/s: {share('forward')} and {share('train')}",
        flush=True,
    )
    return {
        "forward_speedup": speedup("forward"),
        "train_speedup": speedup("train"),
        "memory_ratio": round(memory["gmpipe"] / memory["PyTorch Geometric"], 3),
        "matmul_share": share("train"),
        "matmul_share_forward": share("forward"),
    }


def _in_turn(
    sides: Mapping[str, Side], kinds: Sequence[str], turns: int
) -> tuple[dict[tuple[str, str], list[float]], float]:
    """Time both networks in turn.

    Returns:
        Seconds by network and kind, and the best rate of plain products in their precision.
    """
    times: dict[tuple[str, str], list[float]] = {
        (name, kind): [] for name in sides for kind in kinds
    }
    half = any(side.half for side in sides.values())
    rate = 0.0
    for turn in range(turns):
        rate = max(rate, product_rate(dtype=torch.bfloat16 if half else torch.float32))
        for kind in kinds:
            # Each goes first as often as the other.
            for name in list(sides) if turn % 2 else reversed(sides):
                times[name, kind].append(seconds(getattr(sides[name], kind)))
    return times, rate


def many_labels(
    counts: Sequence[int], neighbors: int | None, *, turns: int, threads: int
) -> dict[str, Any]:
    """Measure our training step for several C, print the table, and return costs per label.

    They are relative to those for the first C.
    """
    sizes = [Size(2, 10, count, neighbors) for count in counts]
    sides = [our_side(size, make_inputs(size)) for size in sizes]
    times: list[list[float]] = [[] for _ in sizes]
    for turn in range(turns + 1):
        for side, taken in zip(sides, times, strict=True):
            once = seconds(side.train)
            if turn:  # the first warms up
                taken.append(once)
    del sides
    time_of = [statistics.median(taken) for taken in times]
    memory_of = [step_memory("ours", size, threads) for size in sizes]

    def per_label(costs: Sequence[float]) -> dict[str, float]:
        first = costs[0] / counts[0]
        return {
            str(count): round(cost / count / first, 3)
            for count, cost in zip(counts, costs, strict=True)
        }

    kind = "all others" if neighbors is None else f"{neighbors} others"
    results: dict[str, Any] = {}
    for name, costs in (("time", time_of), ("memory", memory_of)):
        results[f"{name}_per_label"] = per_label(costs)
        slopes = [
            (high - low) / (more - fewer)
            for (low, fewer), (high, more) in pairwise(zip(costs, counts, strict=True))
        ]
        if len(slopes) > 1:
            results[f"{name}_growth"] = round(slopes[-1] / slopes[0], 3)
    table = [
        (count, f"{taken:.3f}", f"{memory:.0f}", *ratios)
        for count, taken, memory, *ratios in zip(
            counts,
            time_of,
            memory_of,
            results["time_per_label"].values(),
            results["memory_per_label"].values(),
            strict=True,
        )
    ]
    print(f"\neach label reads {kind}: a training step of gmpipe, B = 2, M = 10")
    headers = ["C", "s", "MB", "s per label", "MB per label"]
    print(tabulate(table, headers=headers), flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.matching",
        description=(__doc__ or "").split("\n", 1)[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--voc-batch", type=int, default=32, help="images per batch of VOC's size")
    parser.add_argument("--coco-batch", type=int, default=8, help="images per batch of COCO's size")
    parser.add_argument("--turns", type=int, default=3, help="turns of each network")
    parser.add_argument("--threads", type=int, default=cores(), help="threads that torch uses")
    parser.add_argument("--quick", action="store_true", help="small batches, one turn, 300 labels")
    options = parser.parse_args()
    turns = 1 if options.quick else options.turns
    torch.set_num_threads(options.threads)
    voc = Size(4 if options.quick else options.voc_batch, instances=10, labels=20)
    coco = Size(1 if options.quick else options.coco_batch, instances=35, labels=80)
    for size in (voc, coco):
        require_equal(Size(min(2, size.images), size.instances, size.labels))
    effort = {"turns": turns, "threads": options.threads}
    results: dict[str, Any] = {"voc2007": compare(voc, **effort), "coco": compare(coco, **effort)}
    results["voc2007_bfloat16"] = compare(voc, half=True, **effort)
    results["coco_bfloat16"] = compare(coco, half=True, **effort)
    counts = (80, 300) if options.quick else (80, 300, 1000)
    results["labels"] = {"sparse": many_labels(counts, 10, **effort)}
    if not options.quick:
        effort["turns"] = 1  # 180,000 edges between 300 labels in 2 images take a while
        results["labels"]["complete"] = many_labels(counts[:2], None, **effort)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
