"""A graph convolution module: node convolution (5)-(8), then edge convolution (9)-(12).

Naming: ``X_from_Y`` gathers for nodes X from neighbours Y (the rho of equations (5) and (7));
``X_node`` and ``X_edge`` update (the phi of (6), (8) and (9)-(12)); ``X_edge_from_nodes`` is the
rho of (9)-(11). X and Y are `instance`, `label` or `matching`.

A message is ``rho([e_ij, v_j])``, or ``rho(v_j)`` where the edges have no states. What its first
layer reads of the edge and of the node are separate products, and the mean commutes with the second
layer, so messages are averaged before it. The product that reads the edges also gives what the
edges' own update reads of them (`kept`).

Letters: B images, M instances (padding included), C labels, R nodes that read, K listed neighbours
of a node, H hidden size, H' size of the message, G images or 1 (where all images share something).
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from pipeline.heads.layers import apply, scaled_linear
from pipeline.heads.matching.graphs import Structure
from pipeline.heads.matching.grids import Hidden, Pair, Reading, read_grid, update_grid
from pipeline.heads.matching.layers import MLP, listed, neighbor_rows
from pipeline.heads.matching.states import AssignmentGraph, Edges
from pipeline.settings import GmMlicSettings


class Convolution(nn.Module):
    """One module. An MLP that an ablation or the last module lacks is None.

    Args:
        inputs: size of the nodes and edges that it reads.
        outputs: size of those that it makes.
        settings: graphs, normalisation and dropout.
        last: whether it is the last module, of which only nodes and matching edges are read.
    """

    def __init__(self, inputs: int, outputs: int, settings: GmMlicSettings, last: bool) -> None:
        super().__init__()
        instance_graph, label_graph = settings.instance_graph, settings.label_graph
        matching, states = bool(settings.matching_edges), settings.matching_states

        def gather(exists: bool, edges: bool = True) -> MLP | None:
            return MLP((inputs, inputs) if edges else (inputs,), outputs) if exists else None

        self.instance_from_instance = gather(instance_graph)
        self.instance_from_label = gather(matching, states)
        self.label_from_label = gather(label_graph)
        self.label_from_instance = gather(matching, states)
        self.instance_node = MLP((inputs, *(outputs,) * (instance_graph + matching)), outputs)
        self.label_node = MLP((inputs, *(outputs,) * (label_graph + matching)), outputs)
        self.instance_skip = _skip(inputs, outputs) if settings.residual else None
        self.label_skip = _skip(inputs, outputs) if settings.residual else None
        self.instance_norm = nn.LayerNorm(outputs) if settings.node_norm else nn.Identity()
        self.label_norm = nn.LayerNorm(outputs) if settings.node_norm else nn.Identity()
        self.dropout = nn.Dropout(settings.dropout)

        def between(exists: bool) -> MLP | None:
            return MLP((outputs, outputs), outputs) if exists else None

        def update(exists: bool) -> MLP | None:
            return MLP((inputs, outputs), outputs) if exists else None

        self.instance_edge_from_nodes = between(instance_graph and not last)
        self.instance_edge = update(instance_graph and not last)
        self.label_edge_from_nodes = between(label_graph and not last)
        self.label_edge = update(label_graph and not last)
        self.matching_edge_from_nodes = between(states)
        self.matching_edge = update(states)

    def forward(self, graph: AssignmentGraph, structure: Structure) -> AssignmentGraph:
        """Update the nodes from their neighbours, then the edges from their updated nodes."""
        from_instances = self._gather_from_instances(graph, structure)  # (5), left
        from_labels = self._gather_from_labels(graph, structure)  # (7), left
        matched = self._gather_over_matching_edges(graph, structure)  # (5) and (7), right
        instance_pieces, label_pieces = [graph.instances], [graph.labels]
        if from_instances is not None:
            instance_pieces.append(from_instances.to_rows)
        if from_labels is not None:
            label_pieces.append(from_labels.to_rows)
        if matched is not None:
            instance_pieces.append(matched.to_rows)
            label_pieces.append(cast(Tensor, matched.to_columns))
        instances = self.instance_node.of_pieces(*instance_pieces)  # (6)
        labels = self.label_node.of_pieces(*label_pieces)  # (8)
        if self.instance_skip is None or self.label_skip is None:
            instances = self.dropout(self.instance_norm(instances))
            labels = self.label_norm(labels)
        else:
            kept = apply(self.instance_skip, graph.instances)
            instances = self.instance_norm(kept + self.dropout(instances))
            labels = self.label_norm(apply(self.label_skip, graph.labels) + labels)
        return AssignmentGraph(
            instances,
            labels,
            self._update_instance_edges(graph, from_instances, instances, structure),  # (9)
            self._update_label_edges(graph, from_labels, labels, structure),  # (10)
            self._update_matching_edges(graph, matched, instances, labels),  # (11), (12)
        )

    def _gather_from_instances(
        self, graph: AssignmentGraph, structure: Structure
    ) -> Reading | None:
        if (rho := self.instance_from_instance) is None:
            return None
        edges, neighbors = cast(Edges, graph.instance_edges), structure.instance_neighbors
        index, mask = neighbors.index, neighbors.mask
        return _gather_listed(rho, edges, graph.instances, index, mask, self.instance_edge)

    def _gather_from_labels(self, graph: AssignmentGraph, structure: Structure) -> Reading | None:
        if (rho := self.label_from_label) is None:
            return None
        labels, edges = graph.labels, cast(Edges, graph.label_edges)
        if (weights := structure.label_weights) is not None:
            return _gather_others(rho, edges, labels, weights.to(labels.dtype), self.label_edge)
        index = cast(Tensor, structure.label_neighbors).expand(labels.shape[0], -1, -1)
        every = torch.ones_like(index, dtype=torch.bool)
        return _gather_listed(rho, edges, labels, index, every, self.label_edge)

    def _gather_over_matching_edges(
        self, graph: AssignmentGraph, structure: Structure
    ) -> Reading | None:
        if (rho := self.instance_from_label) is None:
            return None
        to_label = cast(MLP, self.label_from_instance)
        if (update := self.matching_edge) is None:
            return _gather_stateless(rho, to_label, graph, structure)
        return _gather_matching(rho, to_label, update, graph, structure)

    def _update_instance_edges(
        self, graph: AssignmentGraph, read: Reading | None, instances: Tensor, structure: Structure
    ) -> Edges | None:
        if self.instance_edge is None or read is None:
            return None
        rho, before = cast(MLP, self.instance_edge_from_nodes), cast(Edges, graph.instance_edges)
        nodes = listed(rho.pair(instances, instances), structure.instance_neighbors.index)
        return _updated_edges(self.instance_edge, rho, before, read.kept, nodes)

    def _update_label_edges(
        self, graph: AssignmentGraph, read: Reading | None, labels: Tensor, structure: Structure
    ) -> Edges | None:
        if self.label_edge is None or read is None:
            return None
        rho, before = cast(MLP, self.label_edge_from_nodes), cast(Edges, graph.label_edges)
        pair, index = rho.pair(labels, labels), structure.label_neighbors
        nodes = pair if index is None else listed(pair, index.expand(labels.shape[0], -1, -1))
        return _updated_edges(self.label_edge, rho, before, read.kept, nodes)

    def _update_matching_edges(
        self, graph: AssignmentGraph, read: Reading | None, instances: Tensor, labels: Tensor
    ) -> Edges | None:
        if self.matching_edge is None or read is None:
            return None
        rho, before = cast(MLP, self.matching_edge_from_nodes), cast(Edges, graph.matching_edges)
        pair = rho.pair(instances, labels)
        return _updated_edges(self.matching_edge, rho, before, read.kept, pair)


def _gather_listed(
    rho: MLP, edges: Edges, nodes: Tensor, index: Tensor, mask: Tensor, update: MLP | None
) -> Reading:
    """Gather from the listed neighbours of each node; a node without any gets 0.

    Args:
        rho: makes messages.
        edges: (G, R, K, H).
        nodes: (G, R, H).
        index, mask: (G, R, K), the neighbours, and whether there is one.
        update: the edges' phi; None in the last module.

    Returns:
        `to_rows` (G, R, H') and `kept` (G, R, K, H').
    """
    read = linear(cast(Tensor, edges.hidden), edges.fold(*_edge_readers(rho, update)))
    size = rho.first.out_features
    of_nodes = neighbor_rows(_node_term(rho, edges, nodes), index)
    count = mask.sum(dim=-1, keepdim=True)
    weights = mask.to(read.dtype) / count.clamp(min=1)
    mean = torch.einsum("...kh,...k->...h", (read[..., :size] + of_nodes).relu(), weights)
    kept = None if update is None else read[..., size:]
    return Reading(apply(rho.second, mean) * (count > 0), None, kept)


def _gather_others(
    rho: MLP, edges: Edges, nodes: Tensor, weights: Tensor, update: MLP | None
) -> Reading:
    """Gather from all other nodes of a complete graph; the only node of a graph gets 0.

    Args:
        rho: makes messages.
        edges: a grid (G, C, C, H).
        nodes: (G, C, H).
        weights: (C, C), 1 / (C - 1) off the diagonal and 0 on it.
        update: the edges' phi; None in the last module.

    Returns:
        `to_rows` (G, C, H') and `kept` (G, C, C, H').
    """
    weight = edges.fold(*_edge_readers(rho, update))
    reading = read_grid(edges.hidden, weight, _node_term(rho, edges, nodes), weights)
    return reading._replace(to_rows=apply(rho.second, reading.to_rows) * (len(weights) > 1))


def _gather_matching(
    to_instance: MLP, to_label: MLP, update: MLP, graph: AssignmentGraph, structure: Structure
) -> Reading:
    """Gather along matching edges, to instances (5) and to labels (7).

    Both messages and the edges' update read the same edges by one product.

    Args:
        to_instance, to_label: the rho of each message.
        update: the edges' phi.
        graph: with matching edges.
        structure: its `instance_weights` average over instances.

    Returns:
        `to_rows` (B, M, H'), `to_columns` (B, C, H') and `kept` (B, M, C, H').
    """
    edges = cast(Edges, graph.matching_edges)
    labels = graph.labels.shape[1]
    reading = read_grid(
        edges.hidden,
        edges.fold(to_instance.pieces()[0], to_label.pieces()[0], update.pieces()[0]),
        _node_term(to_instance, edges, graph.labels),
        graph.labels.new_full((1, labels), 1 / labels),
        _node_term(to_label, edges, graph.instances),
        structure.instance_weights,
    )
    to_columns = apply(to_label.second, cast(Tensor, reading.to_columns))
    return Reading(apply(to_instance.second, reading.to_rows), to_columns, reading.kept)


def _gather_stateless(
    to_instance: MLP, to_label: MLP, graph: AssignmentGraph, structure: Structure
) -> Reading:
    """Gather along matching edges without states, whose messages are those of the nodes alone.

    So all instances of an image gather the same from its labels, and all labels from its instances.

    Returns:
        `to_rows` (G, 1, H') and `to_columns` (B, 1, H').
    """
    of_labels = apply(to_instance.first, graph.labels).relu().mean(dim=1, keepdim=True)
    hidden = apply(to_label.first, graph.instances).relu()
    of_instances = torch.einsum("bmh,bm->bh", hidden, structure.instance_weights)[:, None]
    return Reading(apply(to_instance.second, of_labels), apply(to_label.second, of_instances), None)


def _node_term(rho: MLP, edges: Edges, nodes: Tensor) -> Tensor:
    """Compute what a message's first layer reads of the nodes, and everything constant in it."""
    of_edge, of_node = rho.pieces()
    return linear(nodes, of_node, rho.first.bias + of_edge @ edges.second.bias)


def _edge_readers(rho: MLP, update: MLP | None) -> tuple[Tensor, ...]:
    """List the weights by which the message and, if there is one, the update read the edges."""
    return tuple(reader.pieces()[0] for reader in (rho, update) if reader is not None)


def _skip(inputs: int, outputs: int) -> nn.Module:
    """What adds a node's state to its update: the identity, or a linear layer if sizes differ."""
    return nn.Identity() if inputs == outputs else scaled_linear(inputs, outputs, bias=False)


def _updated_edges(phi: MLP, rho: MLP, before: Edges, kept: Tensor | None, nodes: Hidden) -> Edges:
    """Update edges by ``phi([e_ij, rho([v_i, v_j])])``, equations (9)-(12).

    Args:
        phi: the update.
        rho: the MLP on the edge's two nodes.
        before: the edges so far.
        kept: what phi's first layer reads of their hidden state; never None if there is a phi.
        nodes: hidden states of rho for every edge.
    """
    of_edge, of_nodes = phi.pieces()
    weight = of_nodes @ rho.second.weight
    bias = phi.first.bias + of_nodes @ rho.second.bias
    bias = bias + of_edge @ before.second.bias
    read = cast(Tensor, kept)
    if isinstance(nodes, Pair):
        return Edges(update_grid(read, nodes, weight, bias), phi.second)
    return Edges((read + linear(nodes, weight, bias)).relu(), phi.second)
