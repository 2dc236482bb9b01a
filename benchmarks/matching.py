"""The matching network against the same network in PyTorch Geometric, from the same parameters.

    python -m benchmarks.matching [--quick] [--help]

The other network is written as PyTorch Geometric wants it: a batch of heterogeneous graphs with
lists of edges, `MessagePassing` with the mean as aggregation, MLPs on what equations (4)-(13)
concatenate. Its graphs are built before the clock starts (ours finds its neighbours within the
measured time), hold no padding, and, as here, the last module's unread edges are not computed.
Before anything is timed both must give equal scores and equal gradients.

What is measured, on random inputs in which every instance is real:

- forward: logits of the images, without gradients. Training step: forward, loss (15), backward,
  SGD with momentum. Both networks take turns; a ratio is the median over the turns.
- memory of a training step, each network in a process of its own: the peak of the resident set
  (VmHWM) minus the resident set when network and inputs are there and a tiny network of the same
  kind has made a step. So it holds activations, gradients, the optimiser's state and what the
  allocator wastes, but not parameters, inputs and libraries.
- matmul_share: floating-point operations of all matrix products that our step really does, a
  second, over the best rate of a plain float32 product (`RATE_SIZES`) found in the same run.
- labels: our training step with many labels, of which each reads a fixed number of others, and,
  for contrast, all others. Linear means that time and memory for one label stay what they are at
  the smallest number. `growth` compares what one further label costs in the last interval to what
  it costs in the first; what does not depend on the labels drops out of it.

The last line is JSON: `forward_speedup` and `train_speedup` are PyTorch Geometric's time over ours,
`memory_ratio` is our memory over its.

Letters: B images, M instances, C labels, K neighbours of an instance, L neighbours of a label,
D feature size, W label vector size, H hidden size; N instances and E edges of a whole batch.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import multiprocessing
import re
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pipeline.machine import cores
from pipeline.matching.graphs import InstanceBatch, instance_neighbors, label_neighbors
from pipeline.matching.loss import matching_loss
from pipeline.matching.network import MatchingNetwork, image_logits
from pipeline.settings import NetworkSettings

with warnings.catch_warnings():
    # PyTorch Geometric scripts some of its classes while it is imported.
    warnings.filterwarnings("ignore", r"`torch\.jit", FutureWarning)
    warnings.filterwarnings("ignore", r"`torch\.jit", DeprecationWarning)
    from torch_geometric.data import Batch, HeteroData
    from torch_geometric.nn import MessagePassing
    from torch_geometric.utils import scatter

D, W = 1024, 300
NEAR = ("instance", "reads", "instance")
LABELS = ("label", "reads", "label")
MATCHING = ("label", "matches", "instance")
"""Kinds of edges. In a list of edges (2, E) the first row is whom the second row reads."""


# The network in PyTorch Geometric ----------------------------------------------------------------


class TwoLayers(nn.Module):
    """Linear, ReLU, linear, on a concatenation."""

    def __init__(self, inputs: int, outputs: int, hidden: int | None = None) -> None:
        super().__init__()
        hidden = outputs if hidden is None else hidden
        self.first = nn.Linear(inputs, hidden)
        self.second = nn.Linear(hidden, outputs)

    def forward(self, *pieces: Tensor) -> Tensor:
        return self.second(self.first(torch.cat(pieces, dim=-1)).relu())


class Gather(MessagePassing):
    """rho on [e_ij, v_j], then the mean over those that i reads: (5), (7)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(aggr="mean")
        self.first = nn.Linear(2 * inputs, outputs)
        self.second = nn.Linear(outputs, outputs)

    def forward(self, read: Tensor, readers: int, edge_index: Tensor, edge_attr: Tensor) -> Tensor:
        """(nodes, H), number of readers, (2, E), (E, H) -> (readers, H')"""
        sizes = (len(read), readers)
        return self.propagate(edge_index, x=(read, None), edge_attr=edge_attr, size=sizes)

    def message(self, x_j: Tensor, edge_attr: Tensor) -> Tensor:
        return self.second(self.first(torch.cat([edge_attr, x_j], dim=-1)).relu())


def _ends(read: Tensor, reader: Tensor, edge_index: Tensor) -> tuple[Tensor, Tensor]:
    """(E, H) of the reading node and (E, H) of the node it reads: [v_i, v_j]."""
    return reader[edge_index[1]], read[edge_index[0]]


class GraphConvolution(nn.Module):
    """Equations (5)-(12); parameters are named as those of `MatchingNetwork`."""

    def __init__(self, inputs: int, outputs: int, settings: NetworkSettings, last: bool) -> None:
        super().__init__()
        near, labels, matching = (
            settings.instance_graph,
            settings.label_graph,
            settings.matching_edges,
        )
        self.instance_from_instance = Gather(inputs, outputs) if near else None
        self.instance_from_label = Gather(inputs, outputs) if matching else None
        self.label_from_label = Gather(inputs, outputs) if labels else None
        self.label_from_instance = Gather(inputs, outputs) if matching else None
        self.instance_node = TwoLayers(inputs + (near + matching) * outputs, outputs)
        self.label_node = TwoLayers(inputs + (labels + matching) * outputs, outputs)
        self.instance_norm = _norm(outputs, settings)
        self.label_norm = _norm(outputs, settings)
        for name, exists in (
            ("instance", near and not last),
            ("label", labels and not last),
            ("matching", matching),
        ):
            rho = TwoLayers(2 * outputs, outputs) if exists else None
            phi = TwoLayers(inputs + outputs, outputs) if exists else None
            self.add_module(f"{name}_edge_from_nodes", rho)
            self.add_module(f"{name}_edge", phi)

    def forward(
        self,
        instances: Tensor,
        labels: Tensor,
        near: Tensor | None,
        between: Tensor | None,
        matching: Tensor | None,
        graph: HeteroData,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """Nodes (N, H), (B C, H) and edges (E, H) of the three kinds, updated."""
        near_index = graph[NEAR].edge_index
        label_index = graph[LABELS].edge_index
        matching_index = graph[MATCHING].edge_index
        seen, known = [instances], [labels]
        if self.instance_from_instance is not None:
            seen.append(self.instance_from_instance(instances, len(instances), near_index, near))
        if self.instance_from_label is not None:
            seen.append(self.instance_from_label(labels, len(instances), matching_index, matching))
        if self.label_from_label is not None:
            known.append(self.label_from_label(labels, len(labels), label_index, between))
        if self.label_from_instance is not None:
            back = matching_index.flip(0)
            known.append(self.label_from_instance(instances, len(labels), back, matching))
        instances = self.instance_norm(self.instance_node(*seen))
        labels = self.label_norm(self.label_node(*known))

        def edges(name: str, old: Any, read: Tensor, reader: Tensor, index: Tensor) -> Any:
            rho, phi = getattr(self, f"{name}_edge_from_nodes"), getattr(self, f"{name}_edge")
            return None if phi is None else phi(old, rho(*_ends(read, reader, index)))

        near = edges("instance", near, instances, instances, near_index)
        between = edges("label", between, labels, labels, label_index)
        matching = edges("matching", matching, labels, instances, matching_index)
        return instances, labels, near, between, matching


class Statistics(nn.Module):
    """The buffers of `MatchingNetwork.inputs`."""

    def __init__(self, feature_size: int) -> None:
        super().__init__()
        for name, size in (("feature", feature_size), ("box", 4)):
            self.register_buffer(f"{name}_mean", torch.zeros(size))
            self.register_buffer(f"{name}_scale", torch.ones(size))
        self.register_buffer("vector_scale", torch.ones(()))


class GraphNetwork(nn.Module):
    """`MatchingNetwork` on lists of edges: the same parameters, by the same names."""

    def __init__(self, feature_size: int, vector_size: int, settings: NetworkSettings) -> None:
        super().__init__()
        latent, matching = settings.latent_size, settings.matching_edges
        self.inputs = Statistics(feature_size)
        self.encode_instance = TwoLayers(feature_size, latent)
        self.encode_label = TwoLayers(vector_size, latent)
        self.encode_instance_edge = TwoLayers(8, latent) if settings.instance_graph else None
        self.encode_label_edge = (
            TwoLayers(2 * vector_size, latent) if settings.label_graph else None
        )
        self.encode_matching_edge = (
            TwoLayers(feature_size + vector_size, latent) if matching else None
        )
        self.encoded_instance_norm = _norm(latent, settings)
        self.encoded_label_norm = _norm(latent, settings)
        sizes = [latent] * settings.modules + [latent // 2]
        self.convolutions = nn.ModuleList(
            GraphConvolution(before, after, settings, last=place == settings.modules - 1)
            for place, (before, after) in enumerate(pairwise(sizes))
        )
        read = sizes[-1] * (1 if matching else 2)
        self.decode = TwoLayers(read, 1, hidden=read)

    def forward(self, graph: HeteroData) -> Tensor:
        """Logits (E,) of all matching edges: by image, instance, label."""
        inputs: Any = self.inputs
        features = (graph["instance"].x - inputs.feature_mean) * inputs.feature_scale
        boxes = (graph["instance"].box - inputs.box_mean) * inputs.box_scale
        words = graph["label"].x * inputs.vector_scale
        instances = self.encoded_instance_norm(self.encode_instance(features))
        labels = self.encoded_label_norm(self.encode_label(words))
        near = between = matching = None
        if self.encode_instance_edge is not None:
            near = self.encode_instance_edge(*_ends(boxes, boxes, graph[NEAR].edge_index))
        if self.encode_label_edge is not None:
            between = self.encode_label_edge(*_ends(words, words, graph[LABELS].edge_index))
        matching_index = graph[MATCHING].edge_index
        if self.encode_matching_edge is not None:
            matching = self.encode_matching_edge(*_ends(words, features, matching_index))
        for module in self.convolutions:
            instances, labels, near, between, matching = module(
                instances, labels, near, between, matching, graph
            )
        if matching is None:
            return self.decode(*_ends(labels, instances, matching_index)).squeeze(-1)
        return self.decode(matching).squeeze(-1)


def _norm(size: int, settings: NetworkSettings) -> nn.Module:
    return nn.LayerNorm(size) if settings.node_norm else nn.Identity()


def graph_image_logits(logits: Tensor, graph: HeteroData) -> Tensor:
    """Cross-instance max (14): (E,) -> (B, C)"""
    labels = graph["label"].x.shape[0]
    best = scatter(logits, graph[MATCHING].edge_index[0], dim_size=labels, reduce="max")
    return best.view(graph.num_graphs, -1)


def make_graph(batch: InstanceBatch, label_vectors: Tensor, settings: NetworkSettings) -> Batch:
    """Lists of edges (1)-(3), image by image, joined to one graph; labels are in each image's."""
    neighbors = instance_neighbors(batch, settings.neighbors)
    label_index = label_neighbors(label_vectors, settings.label_neighbors)
    labels, kept = label_index.shape
    graphs = []
    for image, mask in enumerate(batch.mask):
        places = mask.cumsum(0) - 1  # of an instance among the real ones
        count = int(mask.sum())
        reader, rank = neighbors.mask[image].nonzero().unbind(1)
        graph = HeteroData()
        graph["instance"].x = batch.features[image, mask]
        graph["instance"].box = batch.boxes[image, mask]
        graph["label"].x = label_vectors
        graph[NEAR].edge_index = torch.stack(
            [places[neighbors.index[image, reader, rank]], places[reader]]
        )
        graph[LABELS].edge_index = torch.stack(
            [label_index.flatten(), torch.arange(labels).repeat_interleave(kept)]
        )
        graph[MATCHING].edge_index = torch.stack(
            [torch.arange(labels).repeat(count), torch.arange(count).repeat_interleave(labels)]
        )
        graphs.append(graph)
    return Batch.from_data_list(graphs)


# What is measured --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Size:
    """Images, instances, labels of a batch; L None: the complete label graph."""

    images: int
    instances: int
    labels: int
    label_neighbors: int | None = None
    feature_size: int = D
    vector_size: int = W
    latent_size: int = 512

    def settings(self) -> NetworkSettings:
        return NetworkSettings(latent_size=self.latent_size, label_neighbors=self.label_neighbors)


TINY = Size(2, 3, 4, feature_size=8, vector_size=8, latent_size=16)


@dataclass(frozen=True)
class Inputs:
    """A batch, label vectors (C, W), truth (B, C), and the labels' ratios (C,)."""

    batch: InstanceBatch
    vectors: Tensor
    truth: Tensor
    ratio: Tensor


def make_inputs(size: Size, dtype: torch.dtype = torch.float32, padding: int = 0) -> Inputs:
    """Random inputs; the last image has so many instances of padding."""
    generator = torch.Generator().manual_seed(0)
    images, instances, labels = size.images, size.instances, size.labels

    def rand(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=dtype)

    mask = torch.ones(images, instances, dtype=torch.bool)
    mask[-1, instances - padding :] = False
    corners = rand(images, instances, 2, 2).sort(dim=2).values
    features = torch.randn((images, instances, size.feature_size), generator=generator, dtype=dtype)
    batch = InstanceBatch(
        features * mask[..., None],
        corners.reshape(images, instances, 4) * mask[..., None],
        rand(images, instances) * mask,
        torch.zeros(images, instances, dtype=torch.int64),
        mask,
    )
    vectors = torch.randn((labels, size.vector_size), generator=generator, dtype=dtype)
    truth = (rand(images, labels) < 0.1).to(dtype)
    return Inputs(batch, vectors, truth, torch.full((labels,), 0.1, dtype=dtype))


@dataclass
class Side:
    """One of the two networks, and how it comes to (B, C) logits of the images."""

    network: nn.Module
    scores: Callable[[], Tensor]
    inputs: Inputs

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.SGD(self.network.parameters(), lr=1e-4, momentum=0.9)

    def loss(self) -> Tensor:
        return matching_loss(self.scores(), self.inputs.truth, self.inputs.ratio, beta=0.4)

    @torch.no_grad()
    def forward(self) -> None:
        self.scores()

    def train(self) -> None:
        self.optimizer.zero_grad()
        self.loss().backward()
        self.optimizer.step()


def our_side(size: Size, inputs: Inputs, settings: NetworkSettings | None = None) -> Side:
    """`MatchingNetwork`, its statistics those of the inputs."""
    torch.manual_seed(0)
    network = MatchingNetwork(size.feature_size, size.vector_size, settings or size.settings())
    network.to(inputs.vectors.dtype)
    features = inputs.batch.features[inputs.batch.mask]
    boxes = inputs.batch.boxes[inputs.batch.mask]
    network.inputs.set_statistics(
        features.mean(0), features.std(0), boxes.mean(0), boxes.std(0), inputs.vectors
    )
    return Side(network, lambda: image_logits(network(inputs.batch, inputs.vectors))[0], inputs)


def their_side(size: Size, inputs: Inputs, settings: NetworkSettings | None = None) -> Side:
    """PyTorch Geometric's network, with whatever parameters it has."""
    settings = settings or size.settings()
    network = GraphNetwork(size.feature_size, size.vector_size, settings)
    network.to(inputs.vectors.dtype)
    graph = make_graph(inputs.batch, inputs.vectors, settings)
    return Side(network, lambda: graph_image_logits(network(graph), graph), inputs)


def largest_differences(
    size: Size, dtype: torch.dtype, settings: NetworkSettings | None = None, padding: int = 0
) -> tuple[float, float]:
    """Between the networks' scores, and between the gradients of any parameter.

    Relative to the largest score, and to the parameter's largest gradient.
    """
    inputs = make_inputs(size, dtype, padding)
    ours, theirs = our_side(size, inputs, settings), their_side(size, inputs, settings)
    theirs.network.load_state_dict(ours.network.state_dict())

    def relative(found: Tensor, expected: Tensor) -> float:
        scale = expected.abs().max()
        return float((found - expected).abs().max() / scale) if scale else float(found.abs().max())

    scores = relative(ours.scores().detach(), theirs.scores().detach())
    for side in (ours, theirs):
        side.loss().backward()
    expected = dict(theirs.network.named_parameters())
    gradients = 0.0
    for name, parameter in ours.network.named_parameters():
        if (parameter.grad is None) != (expected[name].grad is None):
            raise SystemExit(f"only one of the networks has a gradient for {name}")
        if parameter.grad is not None:
            gradients = max(gradients, relative(parameter.grad, expected[name].grad))
    return scores, gradients


SCORES_LIMIT = {torch.float32: 1e-4, torch.float64: 1e-9}
GRADIENTS_LIMIT = 1e-9
"""In float64. In float32 two regions may tie for an image's max, and the other one gets it all."""


def require_equal(size: Size) -> None:
    """Stop unless both networks are the same function and have the same gradients."""
    for dtype, limit in SCORES_LIMIT.items():
        scores, gradients = largest_differences(size, dtype, padding=size.instances // 3)
        line = f"M = {size.instances}, C = {size.labels}, {str(dtype).removeprefix('torch.')}: "
        line += f"scores differ by {scores:.1e}"
        if dtype is torch.float64:
            line += f", gradients by {gradients:.1e}"
        print(line, flush=True)
        if scores > limit or (dtype is torch.float64 and gradients > GRADIENTS_LIMIT):
            raise SystemExit("the networks are not equal; nothing was timed")


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


# Memory ------------------------------------------------------------------------------------------


def _resident(field: str) -> int:
    """VmRSS or VmHWM of this process, in bytes.

    VmHWM, since ru_maxrss begins with the resident set of the process that started this one.
    """
    status = Path("/proc/self/status").read_text()
    return int(re.findall(rf"{field}:\s*(\d+) kB", status)[0]) * 1024


def _step_memory(whose: str, size: Size, threads: int) -> int:
    """Bytes that a first training step needs beyond what is there before it."""
    torch.set_num_threads(threads)
    make_side = our_side if whose == "ours" else their_side
    make_side(TINY, make_inputs(TINY)).train()
    side = make_side(size, make_inputs(size))
    ctypes.CDLL(None).malloc_trim(0)  # or the step would use what the preparation has freed
    before, highest = _resident("VmRSS"), _resident("VmHWM")
    side.train()
    after = _resident("VmHWM")
    if after <= highest:
        raise SystemExit(f"the preparation of {size} needs more memory than the step itself")
    return after - before


def step_memory(whose: str, size: Size, threads: int) -> float:
    """Megabytes (1e6) of a training step of `ours` or `theirs`, in a process of its own."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_step_memory, whose, size, threads).result() / 1e6


# Matrix products ---------------------------------------------------------------------------------

RATE_SIZES = ((2048, 2048, 2048), (22400, 512, 1536))
"""(n, k, m) of (n, k) x (k, m): a square, and the widest product of 8 images of COCO's size."""


def product_rate(repetitions: int = 4) -> float:
    """Floating-point operations a second of float32 products; the best of all."""
    best = 0.0
    for rows, inner, columns in RATE_SIZES:
        left, right = torch.randn(rows, inner), torch.randn(inner, columns)
        out = torch.empty(rows, columns)
        for _ in range(repetitions):
            started = time.perf_counter()
            torch.mm(left, right, out=out)
            taken = time.perf_counter() - started
            best = max(best, 2 * rows * inner * columns / taken)
    return best


def product_operations(work: Callable[[], object]) -> int:
    """Floating-point operations of the matrix products that are really run, backward included."""

    def added(_: Any, left: Sequence[int], right: Sequence[int], *__: Any, **___: Any) -> int:
        """Of a product (n, k) x (k, m), or of some such, which is added to something."""
        return 2 * math.prod(left) * right[-1]

    # Forms that PyTorch's counter does not know.
    aten = torch.ops.aten
    others = (aten.addmm_, aten.baddbmm_, aten.addbmm, aten.addbmm_, aten._addmm_activation)
    mapping = dict.fromkeys(others, added)
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        work()
    return counter.get_total_flops()


# The tables --------------------------------------------------------------------------------------


def compare(size: Size, *, turns: int, threads: int) -> dict[str, float]:
    """Ratios for one size, after printing its table."""
    inputs = make_inputs(size)
    sides = {"gmpipe": our_side(size, inputs), "PyTorch Geometric": their_side(size, inputs)}
    ours, theirs = sides.values()
    theirs.network.load_state_dict(ours.network.state_dict())
    operations = {
        "forward": product_operations(ours.forward),
        "train": product_operations(ours.train),
    }
    theirs.forward()
    times: dict[tuple[str, str], list[float]] = {
        (name, kind): [] for name in sides for kind in operations
    }
    rate = 0.0
    for turn in range(turns):
        rate = max(rate, product_rate())
        for kind in operations:
            # Each goes first as often as the other.
            for name in list(sides) if turn % 2 else reversed(sides):
                times[name, kind].append(seconds(getattr(sides[name], kind)))
    state = 2 * 4 * sum(parameter.numel() for parameter in ours.network.parameters())
    del sides, ours, theirs
    memory = {
        name: step_memory(whose, size, threads)
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
    print(f"\nB = {size.images}, M = {size.instances}, C = {size.labels}, {threads} threads")
    print(tabulate(table, headers=["median of", "forward, s", "training step, s", "memory, MB"]))
    print(f"of the memory of either {state / 1e6:.0f} MB are gradients and momentum")
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


def many_labels(
    counts: Sequence[int], neighbors: int | None, *, turns: int, threads: int
) -> dict[str, Any]:
    """Our training step for several C: per label relative to the first C, after a table."""
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
    found: dict[str, Any] = {}
    for name, costs in (("time", time_of), ("memory", memory_of)):
        found[f"{name}_per_label"] = per_label(costs)
        slopes = [
            (high - low) / (more - fewer)
            for (low, fewer), (high, more) in pairwise(zip(costs, counts, strict=True))
        ]
        if len(slopes) > 1:
            found[f"{name}_growth"] = round(slopes[-1] / slopes[0], 3)
    table = [
        (count, f"{taken:.3f}", f"{memory:.0f}", *ratios)
        for count, taken, memory, *ratios in zip(
            counts,
            time_of,
            memory_of,
            found["time_per_label"].values(),
            found["memory_per_label"].values(),
            strict=True,
        )
    ]
    print(f"\neach label reads {kind}: a training step of gmpipe, B = 2, M = 10")
    headers = ["C", "s", "MB", "s for a label", "MB for a label"]
    print(tabulate(table, headers=headers), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.matching",
        description=(__doc__ or "").split("\n", 1)[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--voc-batch", type=int, default=32, help="images, VOC's size")
    parser.add_argument("--coco-batch", type=int, default=8, help="images, COCO's size")
    parser.add_argument("--turns", type=int, default=3, help="turns of each")
    parser.add_argument("--threads", type=int, default=cores(), help="threads of torch")
    parser.add_argument("--quick", action="store_true", help="small batches, one turn, 300 labels")
    options = parser.parse_args()
    turns = 1 if options.quick else options.turns
    torch.set_num_threads(options.threads)
    voc = Size(4 if options.quick else options.voc_batch, instances=10, labels=20)
    coco = Size(1 if options.quick else options.coco_batch, instances=35, labels=80)
    for size in (voc, coco):
        require_equal(Size(min(2, size.images), size.instances, size.labels))
    ways = {"turns": turns, "threads": options.threads}
    results: dict[str, Any] = {"voc2007": compare(voc, **ways), "coco": compare(coco, **ways)}
    counts = (80, 300) if options.quick else (80, 300, 1000)
    results["labels"] = {"sparse": many_labels(counts, 10, **ways)}
    if not options.quick:
        ways["turns"] = 1  # 180,000 edges between 300 labels in 2 images take a while
        results["labels"]["complete"] = many_labels(counts[:2], None, **ways)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
