"""The matching network edge by edge, as section 3 of the paper writes it: slow, and the judge.

`pipeline.heads.matching.network` computes the same numbers from the same parameters, fast. Nothing
of its arithmetic is used here: only the modules that hold the parameters (MLP, norm, `Inputs`),
each called on what its equation concatenates. Neighbours are found by sorting.

Naming: as in the network, ``X_from_Y`` gathers for nodes X from neighbours Y; ``X_node`` and
``X_edge`` update; ``X_edge_from_nodes`` is what an edge gathers from its two nodes. Symbols:
``v_i`` is a node, ``e_ij`` the edge by which node i reads node j. A matching edge (i, j) joins
instance i and label j, and both read it.

Letters: B images, M instances (padding included), C labels, K neighbours of an instance,
L neighbours of a label, D feature size, W label vector size, H hidden size.

Where this departs from the paper's print:

- (5), (7): messages between instances and labels travel over the matching edge e^m, and have a
  rho of their own; the print repeats e^o, e^l and the hat.
- Inputs are standardised, and nodes pass a LayerNorm after the encoder and each update where the
  settings ask for it. Where they ask for residual nodes, a node's former state is added to its
  update before the norm, by a linear layer if their sizes differ.
- The last module's instance and label edges are not computed: the decoder reads matching edges
  only, so nothing reads them, and they have no parameters.
- (13) stops before the sigmoid.

There is no dropout here, so compare in eval mode, or with dropout 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from pipeline.heads.contract import RegionBatch
from pipeline.heads.matching.convolution import Convolution
from pipeline.heads.matching.layers import MLP
from pipeline.heads.matching.network import GmMlic

Nodes = dict[int, Tensor]
"""v_i by i."""

Edges = dict[tuple[int, int], Tensor]
"""e_ij by (i, j)."""


@dataclass(frozen=True)
class Graph:
    """The assignment graph of one image. Before the encoder each attribute has its own size.

    Attributes:
        instances: v_i^o, (D,) then (H,), for every real instance i; padding has no node.
        labels: v_j^l, (W,) then (H,), for every label j.
        instance_edges: e_ij^o, (8,) then (H,), for every j from which instance i gathers.
        label_edges: e_ij^l, (2W,) then (H,), for every j from which label i gathers.
        matching_edges: e_ij^m, (D+W,) then (H,), for every real instance i and every label j.

    A kind of edges that the variant lacks, or that nothing reads any more, is empty.
    """

    instances: Nodes
    labels: Nodes
    instance_edges: Edges
    label_edges: Edges
    matching_edges: Edges


def reference_logits(network: GmMlic, batch: RegionBatch, label_vectors: Tensor) -> Tensor:
    """Compute equations (1)-(13), one image after the other.

    The attribution of the regions, ``network(batch, labels).regions``, must equal the result.

    Args:
        network: `full` or an ablation, in eval mode or with dropout 0.
        batch: B images with up to M instances.
        label_vectors: (C, W), as they come from their source.

    Returns:
        (B, M, C) logits, through which gradients flow; -inf for padding.
    """
    images, instances = batch.mask.shape
    labels = len(label_vectors)
    logits = []
    for image in range(images):
        graph = encode(network, build_graph(network, batch, image, label_vectors))
        for module in network.convolutions:
            graph = convolve(cast(Convolution, module), graph)
        scores = decode(network, graph)
        padding = label_vectors.new_tensor(-math.inf)
        rows = [
            torch.stack([scores.get((i, j), padding) for j in range(labels)])
            for i in range(instances)
        ]
        logits.append(torch.stack(rows))
    return torch.stack(logits)


# Assignment graph --------------------------------------------------------------------------------


def build_graph(network: GmMlic, batch: RegionBatch, image: int, label_vectors: Tensor) -> Graph:
    """Build the graph before the encoder, (1)-(3), from standardised inputs."""
    settings = network.settings
    inputs = network.inputs
    real = [i for i, is_real in enumerate(batch.mask[image].tolist()) if is_real]
    f = {i: inputs.features(batch.features[image, i]) for i in real}
    box = {i: inputs.boxes(batch.boxes[image, i]) for i in real}
    w = dict(enumerate(inputs.vectors(label_vectors)))

    # (1): v_i^o = f_i, e_ij^o = [B_i, B_j]
    instance_edges = {}
    if settings.instance_graph:
        for i in real:
            for j in nearest_instances(batch, image, i, settings.neighbors):
                instance_edges[i, j] = torch.cat([box[i], box[j]])

    # (2): v_i^l = w_i, e_ij^l = [w_i, w_j]
    label_edges = {}
    if settings.label_graph:
        for i in w:
            for j in nearest_labels(label_vectors, i, settings.label_neighbors):
                label_edges[i, j] = torch.cat([w[i], w[j]])

    # (3): e_ij^m = [v_i^o, v_j^l]
    matching_edges = {}
    if settings.matching_states:
        for i in real:
            for j in w:
                matching_edges[i, j] = torch.cat([f[i], w[j]])

    return Graph(f, w, instance_edges, label_edges, matching_edges)


def nearest_instances(batch: RegionBatch, image: int, i: int, neighbors: int) -> list[int]:
    """Find the K real instances, except i, whose box centres are nearest to that of instance i.

    Ties are broken by score (higher first), class, then box coordinates.
    """

    def center(j: int) -> Tensor:
        x1, y1, x2, y2 = batch.boxes[image, j]
        return torch.stack([(x1 + x2) / 2, (y1 + y2) / 2])

    def key(j: int) -> tuple[float, ...]:
        # In the boxes' own precision: in another, centres that tie exactly would not.
        distance = (center(i) - center(j)).square().sum().item()
        score, label = batch.scores[image, j].item(), batch.classes[image, j].item()
        return (distance, -score, label, *batch.boxes[image, j].tolist())

    others = [j for j, is_real in enumerate(batch.mask[image].tolist()) if is_real and j != i]
    return sorted(others, key=key)[:neighbors]


def nearest_labels(label_vectors: Tensor, i: int, neighbors: int | None) -> list[int]:
    """Find the L labels, except i, nearest to label i by cosine; all if `neighbors` is None.

    Ties are broken by the lower index. Cosines tie if they agree to 12 decimals, since equal ones
    may differ in their last bit.
    """
    vectors = label_vectors.double()

    def key(j: int) -> tuple[float, int]:
        cosine = vectors[i] @ vectors[j] / (vectors[i].norm() * vectors[j].norm())
        return (-round(cosine.item(), 12), j)

    others = [j for j in range(len(vectors)) if j != i]
    return sorted(others, key=key)[:neighbors]


# Encoder -----------------------------------------------------------------------------------------


def encode(network: GmMlic, graph: Graph) -> Graph:
    """Apply the encoder (4): an MLP on every node and every edge, one for each kind."""
    encoder = network.encoder

    def nodes(phi: MLP, norm: nn.Module, kind: Nodes) -> Nodes:
        return {i: _normalised(norm, _mlp(phi, v_i)) for i, v_i in kind.items()}

    def edges(phi: MLP | None, kind: Edges) -> Edges:
        return {} if phi is None else {ij: _mlp(phi, e_ij) for ij, e_ij in kind.items()}

    return Graph(
        nodes(encoder.instance, encoder.instance_norm, graph.instances),
        nodes(encoder.label, encoder.label_norm, graph.labels),
        edges(encoder.instance_edge, graph.instance_edges),
        edges(encoder.label_edge, graph.label_edges),
        edges(encoder.matching_edge, graph.matching_edges),
    )


# Graph convolution -------------------------------------------------------------------------------


def convolve(module: Convolution, graph: Graph) -> Graph:
    """Apply one module: node convolution (5)-(8), then edge convolution (9)-(12).

    Edges read the updated nodes. A term that the variant lacks is left out of the concatenations of
    (6) and (8).
    """
    instances = {i: convolved_instance(module, graph, i) for i in graph.instances}
    labels = {j: convolved_label(module, graph, j) for j in graph.labels}

    def edges(rho: MLP | None, phi: MLP | None, kind: Edges, v: Nodes, other: Nodes) -> Edges:
        if rho is None or phi is None:
            return {}
        return {(i, j): _mlp(phi, e_ij, _mlp(rho, v[i], other[j])) for (i, j), e_ij in kind.items()}

    return Graph(
        instances,
        labels,
        edges(  # (9)
            module.instance_edge_from_nodes,
            module.instance_edge,
            graph.instance_edges,
            instances,
            instances,
        ),
        edges(  # (10)
            module.label_edge_from_nodes,
            module.label_edge,
            graph.label_edges,
            labels,
            labels,
        ),
        edges(  # (11), (12)
            module.matching_edge_from_nodes,
            module.matching_edge,
            graph.matching_edges,
            instances,
            labels,
        ),
    )


def convolved_instance(module: Convolution, graph: Graph, i: int) -> Tensor:
    """Compute equations (5) and (6) of instance i."""
    gathered = [graph.instances[i]]
    if (rho := module.instance_from_instance) is not None:  # (5), left
        messages = [
            _mlp(rho, e_ij, graph.instances[j])
            for (reader, j), e_ij in graph.instance_edges.items()
            if reader == i
        ]
        gathered.append(_mean(messages, rho))
    if (rho := module.instance_from_label) is not None:  # (5), right
        messages = [_mlp(rho, *state(graph, i, j), v_j) for j, v_j in graph.labels.items()]
        gathered.append(_mean(messages, rho))
    update = _mlp(module.instance_node, *gathered)  # (6)
    return _normalised(module.instance_norm, _added(module.instance_skip, gathered[0], update))


def convolved_label(module: Convolution, graph: Graph, j: int) -> Tensor:
    """Compute equations (7) and (8) of label j."""
    gathered = [graph.labels[j]]
    if (rho := module.label_from_label) is not None:  # (7), left
        messages = [
            _mlp(rho, e_jk, graph.labels[k])
            for (reader, k), e_jk in graph.label_edges.items()
            if reader == j
        ]
        gathered.append(_mean(messages, rho))
    if (rho := module.label_from_instance) is not None:  # (7), right
        messages = [_mlp(rho, *state(graph, i, j), v_i) for i, v_i in graph.instances.items()]
        gathered.append(_mean(messages, rho))
    update = _mlp(module.label_node, *gathered)  # (8)
    return _normalised(module.label_norm, _added(module.label_skip, gathered[0], update))


def state(graph: Graph, i: int, j: int) -> tuple[Tensor, ...]:
    """What a message over a matching edge reads of it: nothing if the edges have no states."""
    return (graph.matching_edges[i, j],) if graph.matching_edges else ()


# Decoder -----------------------------------------------------------------------------------------


def decode(network: GmMlic, graph: Graph) -> Edges:
    """Apply the decoder (13): a scalar logit for every real instance i and label j, by (i, j).

    Where matching edges have no states it reads ``[v_i^o, v_j^l]``.
    """
    phi = network.decoder.mlp
    logits: Edges = {}
    for i, v_i in graph.instances.items():
        for j, v_j in graph.labels.items():
            if graph.matching_edges:
                logit = _mlp(phi, graph.matching_edges[i, j])
            else:
                logit = _mlp(phi, v_i, v_j)
            logits[i, j] = logit.squeeze()
    return logits


def _mlp(mlp: MLP, *pieces: Tensor) -> Tensor:
    """Apply the MLP to the concatenation ``[., .]`` of vectors."""
    return cast(Tensor, mlp(torch.cat(pieces)))


def _mean(messages: list[Tensor], rho: MLP) -> Tensor:
    """Average over neighbours. Without any the mean is 0, and not rho's bias."""
    if not messages:
        return rho.second.weight.new_zeros(rho.second.out_features)
    return sum(messages[1:], start=messages[0]) / len(messages)


def _added(skip: nn.Module | None, v_i: Tensor, update: Tensor) -> Tensor:
    """A node's update, with its former state where the settings ask for residual nodes."""
    return update if skip is None else update + cast(Tensor, skip(v_i))


def _normalised(norm: nn.Module, v_i: Tensor) -> Tensor:
    return cast(Tensor, norm(v_i))
