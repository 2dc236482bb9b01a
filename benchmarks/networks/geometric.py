"""The matching network as PyTorch Geometric wants it, for `benchmarks.matching`.

A batch is one heterogeneous graph with lists of edges. `MessagePassing` averages messages, and
every MLP runs on what equations (4)-(13) concatenate. As in `pipeline.heads.matching`, the last
module's unread edges are not computed, and parameters have the same names.

Letters: B images, C labels, K neighbours of an instance, L neighbours of a label, D feature size,
W label vector size, H hidden size; N instances and E edges of a whole batch.
"""

from __future__ import annotations

import warnings
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.heads.contract import RegionBatch
from pipeline.heads.matching.graphs import instance_neighbors, label_neighbors
from pipeline.heads.matching.network import module_sizes
from pipeline.settings import GmMlicSettings

with warnings.catch_warnings():
    # PyTorch Geometric scripts some of its classes while it is imported.
    warnings.filterwarnings("ignore", r"`torch\.jit", FutureWarning)
    warnings.filterwarnings("ignore", r"`torch\.jit", DeprecationWarning)
    from torch_geometric.data import Batch, HeteroData
    from torch_geometric.nn import MessagePassing
    from torch_geometric.utils import scatter

NEAR = ("instance", "reads", "instance")
LABELS = ("label", "reads", "label")
MATCHING = ("label", "matches", "instance")
"""Kinds of edges. In a list of edges (2, E) the nodes of the second row read those of the first."""


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
    """rho on [e_ij, v_j], then the mean over the nodes j that i reads: (5), (7).

    Where the edges have no states, rho reads v_j alone.
    """

    def __init__(self, inputs: int, outputs: int, states: bool = True) -> None:
        super().__init__(aggr="mean")
        self.first = nn.Linear((1 + states) * inputs, outputs)
        self.second = nn.Linear(outputs, outputs)

    def forward(
        self, read: Tensor, readers: int, edge_index: Tensor, edge_attr: Tensor | None
    ) -> Tensor:
        """(nodes, H), number of readers, (2, E), (E, H) -> (readers, H')"""
        sizes = (len(read), readers)
        return self.propagate(edge_index, x=(read, None), edge_attr=edge_attr, size=sizes)

    def message(self, x_j: Tensor, edge_attr: Tensor | None) -> Tensor:
        read = x_j if edge_attr is None else torch.cat([edge_attr, x_j], dim=-1)
        return self.second(self.first(read).relu())


def _ends(read: Tensor, reader: Tensor, edge_index: Tensor) -> tuple[Tensor, Tensor]:
    """Select (E, H) of the reading node and (E, H) of the node that it reads: [v_i, v_j]."""
    return reader[edge_index[1]], read[edge_index[0]]


class GraphConvolution(nn.Module):
    """Equations (5)-(12); parameters have the names of `Convolution`'s."""

    def __init__(self, inputs: int, outputs: int, settings: GmMlicSettings, last: bool) -> None:
        super().__init__()
        states = settings.matching_states
        near, labels, matching = (
            settings.instance_graph,
            settings.label_graph,
            bool(settings.matching_edges),
        )
        self.instance_from_instance = Gather(inputs, outputs) if near else None
        self.instance_from_label = Gather(inputs, outputs, states) if matching else None
        self.label_from_label = Gather(inputs, outputs) if labels else None
        self.label_from_instance = Gather(inputs, outputs, states) if matching else None
        self.instance_node = TwoLayers(inputs + (near + matching) * outputs, outputs)
        self.label_node = TwoLayers(inputs + (labels + matching) * outputs, outputs)
        self.instance_norm = _norm(outputs, settings)
        self.label_norm = _norm(outputs, settings)
        for name, exists in (
            ("instance", near and not last),
            ("label", labels and not last),
            ("matching", states),
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
        """Update nodes (N, H), (B C, H) and edges (E, H) of the three kinds."""
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
    """The buffers of `GmMlic.inputs`."""

    def __init__(self, feature_size: int) -> None:
        super().__init__()
        for name, size in (("feature", feature_size), ("box", 4), ("whole", feature_size)):
            self.register_buffer(f"{name}_mean", torch.zeros(size))
            self.register_buffer(f"{name}_scale", torch.ones(size))
        self.register_buffer("vector_scale", torch.ones(()))
        self.register_buffer("classes", torch.tensor(1))


class GraphEncoder(nn.Module):
    """Equation (4); parameters have the names of `Encoder`'s."""

    def __init__(self, feature_size: int, vector_size: int, settings: GmMlicSettings) -> None:
        super().__init__()
        latent = settings.latent_size

        def edge(inputs: int, exists: bool) -> TwoLayers | None:
            return TwoLayers(inputs, latent) if exists else None

        self.instance = TwoLayers(feature_size, latent)
        self.label = TwoLayers(vector_size, latent)
        self.instance_edge = edge(8, settings.instance_graph)
        self.label_edge = edge(2 * vector_size, settings.label_graph)
        self.matching_edge = edge(feature_size + vector_size, settings.matching_states)
        self.instance_norm = _norm(latent, settings)
        self.label_norm = _norm(latent, settings)

    def forward(
        self, features: Tensor, boxes: Tensor, words: Tensor, graph: HeteroData
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """Encode nodes (N, D), (B C, W) and the edges of the three kinds."""
        near = between = matching = None
        if self.instance_edge is not None:
            near = self.instance_edge(*_ends(boxes, boxes, graph[NEAR].edge_index))
        if self.label_edge is not None:
            between = self.label_edge(*_ends(words, words, graph[LABELS].edge_index))
        if self.matching_edge is not None:
            matching = self.matching_edge(*_ends(words, features, graph[MATCHING].edge_index))
        instances = self.instance_norm(self.instance(features))
        return instances, self.label_norm(self.label(words)), near, between, matching


class GraphDecoder(nn.Module):
    """Equation (13); parameters have the names of `Decoder`'s."""

    def __init__(self, size: int, settings: GmMlicSettings) -> None:
        super().__init__()
        read = size * (1 if settings.matching_states else 2)
        self.mlp = TwoLayers(read, 1, hidden=read)

    def forward(
        self, instances: Tensor, labels: Tensor, matching: Tensor | None, graph: HeteroData
    ) -> Tensor:
        """Logits (E,) of all matching edges."""
        if matching is None:
            return self.mlp(*_ends(labels, instances, graph[MATCHING].edge_index)).squeeze(-1)
        return self.mlp(matching).squeeze(-1)


class GraphNetwork(nn.Module):
    """`GmMlic` on lists of edges: the same parameters, by the same names."""

    def __init__(self, feature_size: int, vector_size: int, settings: GmMlicSettings) -> None:
        super().__init__()
        self.inputs = Statistics(feature_size)
        self.encoder = GraphEncoder(feature_size, vector_size, settings)
        sizes = module_sizes(settings)
        self.convolutions = nn.ModuleList(
            GraphConvolution(before, after, settings, last=number == settings.modules)
            for number, (before, after) in enumerate(pairwise(sizes), 1)
        )
        self.decoder = GraphDecoder(sizes[-1], settings)

    def forward(self, graph: HeteroData) -> Tensor:
        """Logits (E,) of all matching edges, in the order of image, instance, label."""
        inputs: Any = self.inputs
        features = (graph["instance"].x - inputs.feature_mean) * inputs.feature_scale
        boxes = (graph["instance"].box - inputs.box_mean) * inputs.box_scale
        words = graph["label"].x * inputs.vector_scale
        state = self.encoder(features, boxes, words, graph)
        for module in self.convolutions:
            state = module(*state, graph)
        instances, labels, _, _, matching = state
        return self.decoder(instances, labels, matching, graph)


def _norm(size: int, settings: GmMlicSettings) -> nn.Module:
    return nn.LayerNorm(size) if settings.node_norm else nn.Identity()


def graph_image_logits(logits: Tensor, graph: HeteroData) -> Tensor:
    """Take the max over instances (14): (E,) -> (B, C)."""
    labels = graph["label"].x.shape[0]
    best = scatter(logits, graph[MATCHING].edge_index[0], dim_size=labels, reduce="max")
    return best.view(graph.num_graphs, -1)


def make_graph(batch: RegionBatch, label_vectors: Tensor, settings: GmMlicSettings) -> Batch:
    """Make lists of edges (1)-(3) of each image, and join them to one graph.

    Every image has label nodes of its own.
    """
    neighbors = instance_neighbors(batch, settings.neighbors)
    label_index = label_neighbors(label_vectors, settings.label_neighbors)
    labels, kept = label_index.shape
    graphs = []
    for image, mask in enumerate(batch.mask):
        position = mask.cumsum(0) - 1  # of an instance among the real ones
        count = int(mask.sum())
        reader, rank = neighbors.mask[image].nonzero().unbind(1)
        graph = HeteroData()
        graph["instance"].x = batch.features[image, mask]
        graph["instance"].box = batch.boxes[image, mask]
        graph["label"].x = label_vectors
        graph[NEAR].edge_index = torch.stack(
            [position[neighbors.index[image, reader, rank]], position[reader]]
        )
        graph[LABELS].edge_index = torch.stack(
            [label_index.flatten(), torch.arange(labels).repeat_interleave(kept)]
        )
        graph[MATCHING].edge_index = torch.stack(
            [torch.arange(labels).repeat(count), torch.arange(count).repeat_interleave(labels)]
        )
        graphs.append(graph)
    return Batch.from_data_list(graphs)
