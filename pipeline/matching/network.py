"""The matching network of GM-MLIC, section 3.3, on its fast path.

Naming: ``X_from_Y`` gathers for nodes X from neighbours Y (the rho of equations (5) and (7));
``X_node`` and ``X_edge`` update (the phi of (6), (8) and (9)-(12)); ``X_edge_from_nodes`` is the
rho of (9)-(11). X and Y are `instance`, `label` or `matching`.

Letters: B images, M instances (padding included), C labels, K neighbours of an instance,
L neighbours of a label, D feature size, W label vector size, H hidden size, G images or 1 (where
all images share something).

The fast path computes what `reference` computes edge by edge, from the same
parameters, by three identities:

1. A linear layer on a concatenation is a sum of smaller ones. So what an edge reads of its nodes
   is computed once a node and broadcast.
2. Between an edge's update (linear, ReLU, linear) and the first layer of whoever reads the edge
   stands no nonlinearity. So an edge is kept as its hidden state, and the second layer is folded
   into the readers' first (`_Edges`). All readers' products run as one.
3. A mean commutes with a linear layer: messages are averaged before their second layer.

Matching edges and complete label graphs are grids of edges, of which `pipeline.matching.grids`
holds as little as it can. Edges to listed neighbours (of instances, and of labels in a sparse
graph) are few.

What is the same for every image (encoded labels, and the edges between them, before they have
seen an instance) is computed once. The last module's instance and label edges are read by nobody
and have no parameters.

Initialisation and normalisation. Two-layer MLPs are stacked nine deep here, without a residual
connection. PyTorch's default initialisation shrinks a signal at every layer, and the network
hardly trains. So every layer preserves its input's second moment: weights have variance 1/fan_in in
first layers, which read plain states, and 2/fan_in (He) in second layers, which read a ReLU.
Inputs are standardised with statistics of the training split. What still drifts during training
is held by LayerNorm on the nodes after the encoder and each update. It stands on nodes only:
identity 2 needs the path from an edge's update to its readers to be linear, and a normalised edge
would have to be materialised.

Beyond the paper, off unless the settings ask for it: dropout on the region features, on instance
nodes (never on label nodes: a label without its node can't be told from others) and in the decoder.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from pipeline.matching.graphs import InstanceBatch, Neighbors, instance_neighbors, label_neighbors
from pipeline.matching.grids import Hidden, Pair, read_grid, update_grid
from pipeline.settings import NetworkSettings

_LEAST_BOX_DEVIATION = 0.1  # of the root mean square deviation of the four coordinates


class MLP(nn.Module):
    """Linear, ReLU, linear.

    Args:
        inputs: sizes of the pieces that are concatenated to its input.
        outputs: size of its output.
        hidden: size between; None: as the output.
    """

    def __init__(self, inputs: tuple[int, ...], outputs: int, hidden: int | None = None) -> None:
        super().__init__()
        hidden = outputs if hidden is None else hidden
        self.inputs = inputs
        self.first = nn.Linear(sum(inputs), hidden)
        self.second = nn.Linear(hidden, outputs)
        for layer, gain in ((self.first, 1.0), (self.second, 2.0)):
            nn.init.normal_(layer.weight, std=math.sqrt(gain / layer.in_features))
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., sum of inputs) -> (..., outputs)."""
        return cast(Tensor, self.second(self.first(x).relu()))

    def pieces(self) -> tuple[Tensor, ...]:
        """The first layer's weights, cut by the pieces of its input: (hidden, piece) each."""
        return torch.split(self.first.weight, list(self.inputs), dim=1)


class _Edges(NamedTuple):
    """Edges as the hidden state of their last update: the attribute is ``second(hidden)``.

    They go to each node's listed neighbours (..., K, H), or from every row to every column of a
    grid; see `pipeline.matching.grids`.
    """

    hidden: Hidden
    second: nn.Linear

    def fold(self, *weights: Tensor) -> Tensor:
        """Weights (H', H) that read the attribute, as one that reads the hidden state."""
        return torch.cat(weights) @ self.second.weight


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return nn.functional.linear(x, weight, bias)


def _neighbor_rows(nodes: Tensor, index: Tensor) -> Tensor:
    """(B, M, H), (B, M, K) -> (B, M, K, H): the rows of each node's neighbours."""
    images, instances, neighbors = index.shape
    flat = index.reshape(images, instances * neighbors, 1).expand(-1, -1, nodes.shape[-1])
    return nodes.gather(1, flat).view(images, instances, neighbors, nodes.shape[-1])


class Convolution(nn.Module):
    """One graph convolution module: node convolution (5)-(8), then edge convolution (9)-(12)."""

    def __init__(self, inputs: int, outputs: int, settings: NetworkSettings, last: bool) -> None:
        super().__init__()
        instance_graph, label_graph = settings.instance_graph, settings.label_graph
        matching, norm = settings.matching_edges, settings.node_norm

        def gather(exists: bool) -> MLP | None:
            return MLP((inputs, inputs), outputs) if exists else None

        self.instance_from_instance = gather(instance_graph)
        self.instance_from_label = gather(matching)
        self.label_from_label = gather(label_graph)
        self.label_from_instance = gather(matching)
        self.instance_node = MLP((inputs, *(outputs,) * (instance_graph + matching)), outputs)
        self.label_node = MLP((inputs, *(outputs,) * (label_graph + matching)), outputs)
        self.instance_norm = nn.LayerNorm(outputs) if norm else nn.Identity()
        self.label_norm = nn.LayerNorm(outputs) if norm else nn.Identity()

        def between(exists: bool) -> MLP | None:
            return MLP((outputs, outputs), outputs) if exists else None

        def update(exists: bool) -> MLP | None:
            return MLP((inputs, outputs), outputs) if exists else None

        self.instance_edge_from_nodes = between(instance_graph and not last)
        self.instance_edge = update(instance_graph and not last)
        self.label_edge_from_nodes = between(label_graph and not last)
        self.label_edge = update(label_graph and not last)
        self.matching_edge_from_nodes = between(matching)
        self.matching_edge = update(matching)


@dataclass
class _State:
    """The assignment graph between two modules; None where the variant has no such edges.

    G is B, and 1 for labels and their edges until labels have seen instances: until then they are
    the same for every image.
    """

    instances: Tensor  # (B, M, H)
    labels: Tensor  # (G, C, H)
    instance_edges: _Edges | None  # (B, M, K, H)
    label_edges: _Edges | None  # (G, C, C, H), or (G, C, L, H)
    matching_edges: _Edges | None  # (B, M, C, H)


@dataclass(frozen=True)
class _Structure:
    """Whom each node gathers from."""

    instance_share: Tensor  # (B, M), a real instance's weight in the mean over instances
    instance_neighbors: Neighbors
    label_neighbors: Tensor | None  # (C, L); None for a complete label graph
    label_share: Tensor | None  # (C, C), weights in a complete one; None in a sparse one


class MatchingNetwork(nn.Module):
    """Scores of every instance for every label.

    Args:
        feature_size: D.
        vector_size: W.
        settings: sizes, graphs, neighbours, normalisation and dropout.
    """

    def __init__(self, feature_size: int, vector_size: int, settings: NetworkSettings) -> None:
        super().__init__()
        latent = settings.latent_size
        self.settings = settings
        self.inputs = Inputs(feature_size, settings.least_deviation)
        self.dropout = nn.Dropout(settings.dropout)
        self.decoder_dropout = nn.Dropout(settings.decoder_dropout)
        self.input_dropout = nn.Dropout(settings.input_dropout)

        def encoder(*inputs: int, exists: bool = True) -> MLP | None:
            return MLP(inputs, latent) if exists else None

        self.encode_instance = MLP((feature_size,), latent)
        self.encode_label = MLP((vector_size,), latent)
        self.encode_instance_edge = encoder(4, 4, exists=settings.instance_graph)
        self.encode_label_edge = encoder(vector_size, vector_size, exists=settings.label_graph)
        self.encode_matching_edge = encoder(
            feature_size, vector_size, exists=settings.matching_edges
        )
        norm = settings.node_norm
        self.encoded_instance_norm = nn.LayerNorm(latent) if norm else nn.Identity()
        self.encoded_label_norm = nn.LayerNorm(latent) if norm else nn.Identity()
        self._label_graph: tuple[Tensor, Tensor | None, Tensor | None] | None = None
        sizes = module_sizes(settings)
        self.convolutions = nn.ModuleList(
            Convolution(before, after, settings, last=place == len(sizes) - 2)
            for place, (before, after) in enumerate(pairwise(sizes))
        )
        pieces = (sizes[-1],) if settings.matching_edges else (sizes[-1],) * 2
        self.decode = MLP(pieces, 1, hidden=sum(pieces))

    def forward(
        self,
        batch: InstanceBatch,
        label_vectors: Tensor,
        *,
        instance_graph: bool = True,
        label_graph: bool = True,
    ) -> Tensor:
        """Encoder (4), convolution modules (5)-(12), decoder (13).

        Args:
            batch: B images with up to M instances.
            label_vectors: (C, W), as they come from their source.
            instance_graph, label_graph: False takes the edges of that graph away, so that its
                nodes have no neighbours and their mean message is 0. Where the settings have no
                such graph, it changes nothing.

        Returns:
            (B, M, C) logits; -inf for padding.
        """
        logits = self._decode(self._convolved(batch, label_vectors, instance_graph, label_graph))
        return logits.masked_fill(~batch.mask[..., None], -torch.inf)

    def label_nodes(self, batch: InstanceBatch, label_vectors: Tensor) -> Tensor:
        """What each image made of the labels: v_j^l of (8) after the last convolution module.

        Args:
            batch, label_vectors: as `forward` takes them.

        Returns:
            (B, C, H); without matching edges a label sees no image, and all B are the same.
        """
        labels = self._convolved(batch, label_vectors).labels
        return labels.expand(batch.mask.shape[0], -1, -1)

    def _convolved(
        self,
        batch: InstanceBatch,
        label_vectors: Tensor,
        instance_graph: bool = True,
        label_graph: bool = True,
    ) -> _State:
        """The assignment graph after the last module."""
        structure = self._structure(batch, label_vectors, instance_graph, label_graph)
        state = self._encode(batch, label_vectors, structure)
        for module in self.convolutions:
            state = self._convolve(cast(Convolution, module), state, structure)
        return state

    def _structure(
        self, batch: InstanceBatch, label_vectors: Tensor, instance_graph: bool, label_graph: bool
    ) -> _Structure:
        share = batch.mask.to(batch.features.dtype)
        labels = (label_neighbors(label_vectors, 0), None)  # a sparse graph without edges
        return _Structure(
            share / share.sum(dim=1, keepdim=True),
            instance_neighbors(batch, self.settings.neighbors if instance_graph else 0),
            *(self._label_structure(label_vectors) if label_graph else labels),
        )

    def _label_structure(self, vectors: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """`_Structure`'s last two: the same for all batches, so found once for given vectors."""
        known = self._label_graph
        if known is None or known[0].device != vectors.device or not torch.equal(known[0], vectors):
            labels, chosen = len(vectors), self.settings.label_neighbors
            index = share = None
            if chosen is not None and chosen < labels - 1:
                index = label_neighbors(vectors, chosen)
            else:
                others = 1 - torch.eye(labels, dtype=torch.float64, device=vectors.device)
                share = others / max(labels - 1, 1)
            known = self._label_graph = (vectors.detach().clone(), index, share)
        return known[1:]

    def _encode(self, batch: InstanceBatch, vectors: Tensor, structure: _Structure) -> _State:
        features = self.input_dropout(self.inputs.features(batch.features))
        boxes = self.inputs.boxes(batch.boxes)
        words = self.inputs.vectors(vectors)[None]
        instance_edges = label_edges = matching_edges = None
        if (mlp := self.encode_instance_edge) is not None:
            pair = _pair(mlp, boxes, boxes)
            instance_edges = _Edges(_listed(pair, structure.instance_neighbors.index), mlp.second)
        if (mlp := self.encode_label_edge) is not None:
            pair, index = _pair(mlp, words, words), structure.label_neighbors
            label_edges = _Edges(pair if index is None else _listed(pair, index[None]), mlp.second)
        if (mlp := self.encode_matching_edge) is not None:
            matching_edges = _Edges(_pair(mlp, features, words), mlp.second)
        return _State(
            self.dropout(self.encoded_instance_norm(self.encode_instance(features))),
            self.encoded_label_norm(self.encode_label(words)),
            instance_edges,
            label_edges,
            matching_edges,
        )

    def _convolve(self, module: Convolution, state: _State, structure: _Structure) -> _State:
        instance_parts, label_parts = [state.instances], [state.labels]
        instance_read = label_read = matching_read = None  # what the edge updates read of edges
        if (mlp := module.instance_from_instance) is not None:
            message, instance_read = _gather_listed(
                mlp,
                cast(_Edges, state.instance_edges),
                state.instances,
                structure.instance_neighbors.index,
                structure.instance_neighbors.mask,
                module.instance_edge,
            )
            instance_parts.append(message)
        if (mlp := module.label_from_label) is not None:
            edges, share = cast(_Edges, state.label_edges), structure.label_share
            if share is not None:
                message, label_read = _gather_others(
                    mlp, edges, state.labels, share.to(state.labels.dtype), module.label_edge
                )
            else:
                index = cast(Tensor, structure.label_neighbors)
                index = index.expand(state.labels.shape[0], -1, -1)
                there = torch.ones_like(index, dtype=torch.bool)
                message, label_read = _gather_listed(
                    mlp, edges, state.labels, index, there, module.label_edge
                )
            label_parts.append(message)
        if (mlp := module.instance_from_label) is not None:
            to_instances, to_labels, matching_read = _gather_matched(
                mlp,
                cast(MLP, module.label_from_instance),
                cast(MLP, module.matching_edge),
                state,
                structure,
            )
            instance_parts.append(to_instances)
            label_parts.append(to_labels)
        instances = module.instance_norm(_update(module.instance_node, instance_parts))
        instances = self.dropout(instances)
        labels = module.label_norm(_update(module.label_node, label_parts))

        instance_edges = label_edges = matching_edges = None
        if (mlp := module.instance_edge) is not None:
            between, before = cast(MLP, module.instance_edge_from_nodes), state.instance_edges
            pair = _pair(between, instances, instances)
            states = _listed(pair, structure.instance_neighbors.index)
            instance_edges = _updated(mlp, between, before, instance_read, states)
        if (mlp := module.label_edge) is not None:
            between, before = cast(MLP, module.label_edge_from_nodes), state.label_edges
            pair = _pair(between, labels, labels)
            if structure.label_neighbors is None:
                label_edges = _updated(mlp, between, before, label_read, pair)
            else:
                states = _listed(pair, structure.label_neighbors.expand(labels.shape[0], -1, -1))
                label_edges = _updated(mlp, between, before, label_read, states)
        if (mlp := module.matching_edge) is not None:
            between, before = cast(MLP, module.matching_edge_from_nodes), state.matching_edges
            pair = _pair(between, instances, labels)
            matching_edges = _updated(mlp, between, before, matching_read, pair)
        return _State(instances, labels, instance_edges, label_edges, matching_edges)

    def _decode(self, state: _State) -> Tensor:
        first = self.decode.first
        if state.matching_edges is not None:
            hidden, second = state.matching_edges
            bias = first.bias + first.weight @ second.bias
            read = _linear(cast(Tensor, hidden), state.matching_edges.fold(first.weight), bias)
        else:
            own, other = self.decode.pieces()
            there = _linear(state.labels, other)[:, None]
            read = _linear(state.instances, own, first.bias)[:, :, None] + there
        return cast(Tensor, self.decode.second(self.decoder_dropout(read.relu())).squeeze(-1))


def module_sizes(settings: NetworkSettings) -> list[int]:
    """Sizes of nodes and edges: encoded, then after each module; the last has half the size."""
    latent = settings.latent_size
    return [latent] * settings.modules + [latent // 2]


def _linear_of(layer: nn.Linear, x: Tensor) -> Tensor:
    return cast(Tensor, layer(x))


def _pair(mlp: MLP, own: Tensor, other: Tensor) -> Pair:
    """Hidden states of an MLP on ``[own_i, other_j]``, as what they are the sum of."""
    left, right = mlp.pieces()
    return Pair(_linear(own, left, mlp.first.bias), _linear(other, right))


def _listed(pair: Pair, index: Tensor) -> Tensor:
    """A pair's hidden states at each node's neighbours: (G, R, K) -> (G, R, K, H)."""
    return (pair.left[:, :, None] + _neighbor_rows(pair.right, index)).relu()


def _node_term(mlp: MLP, edges: _Edges, nodes: Tensor) -> Tensor:
    """What a message's first layer reads of the nodes; with it all that is constant."""
    edge, node = mlp.pieces()
    return _linear(nodes, node, mlp.first.bias + edge @ edges.second.bias)


def _edge_readers(mlp: MLP, update: MLP | None) -> tuple[Tensor, ...]:
    """Weights by which a message and, unless the module is the last, the update read edges."""
    return tuple(reader.pieces()[0] for reader in (mlp, update) if reader is not None)


def _gather_listed(
    mlp: MLP, edges: _Edges, nodes: Tensor, index: Tensor, mask: Tensor, update: MLP | None
) -> tuple[Tensor, Tensor | None]:
    """Mean message from listed neighbours (5), (7), and what the edges' update reads of them.

    Args:
        mlp: the rho.
        edges: (G, R, K, H).
        nodes: (G, R, H).
        index, mask: (G, R, K), the neighbours, and which of them there are.
        update: the edges' phi; None in the last module.
    """
    read = _linear(cast(Tensor, edges.hidden), edges.fold(*_edge_readers(mlp, update)))
    size = mlp.first.out_features
    there = _neighbor_rows(_node_term(mlp, edges, nodes), index)
    count = mask.sum(dim=-1, keepdim=True)
    share = mask.to(read.dtype) / count.clamp(min=1)
    mean = torch.einsum("...kh,...k->...h", (read[..., :size] + there).relu(), share)
    kept = None if update is None else read[..., size:]
    return _linear_of(mlp.second, mean) * (count > 0), kept


def _gather_others(
    mlp: MLP, edges: _Edges, nodes: Tensor, share: Tensor, update: MLP | None
) -> tuple[Tensor, Tensor | None]:
    """As `_gather_listed`, in a complete graph: from all other nodes.

    Args:
        mlp: the rho.
        edges: a grid of (G, C, C).
        nodes: (G, C, H).
        share: (C, C), 1 / (C - 1) off the diagonal.
        update: the edges' phi; None in the last module.
    """
    weight = edges.fold(*_edge_readers(mlp, update))
    reading = read_grid(edges.hidden, weight, _node_term(mlp, edges, nodes), share)
    return _linear_of(mlp.second, reading.to_rows) * (len(share) > 1), reading.kept


def _gather_matched(
    to_instance: MLP, to_label: MLP, update: MLP, state: _State, structure: _Structure
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Mean messages to instances (5) and to labels (7), and what the matching edges' update reads.

    All three read the same edges, by one product.
    """
    edges = cast(_Edges, state.matching_edges)
    labels = state.labels.shape[1]
    reading = read_grid(
        edges.hidden,
        edges.fold(to_instance.pieces()[0], to_label.pieces()[0], update.pieces()[0]),
        _node_term(to_instance, edges, state.labels),
        state.labels.new_full((1, labels), 1 / labels),
        _node_term(to_label, edges, state.instances),
        structure.instance_share,
    )
    to_labels = _linear_of(to_label.second, cast(Tensor, reading.to_columns))
    return _linear_of(to_instance.second, reading.to_rows), to_labels, reading.kept


def _update(mlp: MLP, parts: list[Tensor]) -> Tensor:
    """An MLP on the concatenation of nodes, some of which may lack the image axis."""
    hidden: Tensor = mlp.first.bias
    for part, weight in zip(parts, mlp.pieces(), strict=True):
        hidden = hidden + _linear(part, weight)
    return _linear_of(mlp.second, hidden.relu())


def _updated(
    mlp: MLP, between: MLP, before: _Edges | None, kept: Tensor | None, states: Hidden
) -> _Edges:
    """Edge update phi([e, rho([v_i, v_j])]), (9)-(12).

    Args:
        mlp: the phi.
        between: the rho.
        before: the edges up to now.
        kept: what phi reads of their hidden state.
        states: rho's hidden state.
    """
    of_edge, of_nodes = mlp.pieces()
    weight = of_nodes @ between.second.weight
    bias = mlp.first.bias + of_nodes @ between.second.bias
    bias = bias + of_edge @ cast(_Edges, before).second.bias
    read = cast(Tensor, kept)
    if isinstance(states, Pair):
        return _Edges(update_grid(read, states, weight, bias), mlp.second)
    return _Edges((read + _linear(states, weight, bias)).relu(), mlp.second)


class Inputs(nn.Module):
    """Standardisation of what the network reads; the statistics are saved with its weights.

    Features and box coordinates get mean 0 and variance 1 over the real regions of the training
    split, each component by itself. A component that varies less than ``least_deviation`` times the
    root mean square over all of them is scaled by that: a detector's features have components that
    are almost always 0, and dividing by their tiny deviation would make single regions stand out
    by a hundred. Label vectors are divided by the root mean square of all their components, which
    keeps their geometry.
    """

    feature_mean: Tensor
    feature_scale: Tensor
    box_mean: Tensor
    box_scale: Tensor
    vector_scale: Tensor

    def __init__(self, feature_size: int, least_deviation: float = 0.1) -> None:
        super().__init__()
        self.least_deviation = least_deviation
        for name, size in (("feature", feature_size), ("box", 4)):
            self.register_buffer(f"{name}_mean", torch.zeros(size))
            self.register_buffer(f"{name}_scale", torch.ones(size))
        self.register_buffer("vector_scale", torch.ones(()))

    def set_statistics(
        self,
        feature_mean: Tensor,
        feature_std: Tensor,
        box_mean: Tensor,
        box_std: Tensor,
        label_vectors: Tensor,
    ) -> None:
        """Take the training split's statistics.

        Args:
            feature_mean, feature_std: (D,).
            box_mean, box_std: (4,).
            label_vectors: (C, W).
        """
        for name, value in (
            ("feature_mean", feature_mean),
            ("feature_scale", _inverse(feature_std, self.least_deviation)),
            ("box_mean", box_mean),
            ("box_scale", _inverse(box_std, _LEAST_BOX_DEVIATION)),
            ("vector_scale", label_vectors.square().mean().rsqrt()),
        ):
            buffer = cast(Tensor, getattr(self, name))
            buffer.copy_(value.reshape(buffer.shape))

    def features(self, features: Tensor) -> Tensor:
        """(..., D) -> (..., D)"""
        return (features - self.feature_mean) * self.feature_scale

    def boxes(self, boxes: Tensor) -> Tensor:
        """(..., 4) -> (..., 4)"""
        return (boxes - self.box_mean) * self.box_scale

    def vectors(self, vectors: Tensor) -> Tensor:
        """(C, W) -> (C, W)"""
        return vectors * self.vector_scale


def _inverse(std: Tensor, least: float) -> Tensor:
    floor = least * std.square().mean().sqrt()
    return 1 / torch.maximum(std, floor).clamp(min=1e-6)


class RegionClassifier(nn.Module):
    """An MLP on a region's feature and box, for each label.

    Args:
        feature_size: D.
        labels: C.
        hidden: its hidden size.
        dropout: on its hidden state.
    """

    def __init__(self, feature_size: int, labels: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.mlp = MLP((feature_size, 4), labels, hidden=hidden)
        self.dropout = nn.Dropout(dropout)

    def forward(self, features: Tensor, boxes: Tensor) -> Tensor:
        """(..., D), (..., 4), both standardised -> (..., C)."""
        hidden = self.mlp.first(torch.cat([features, boxes], dim=-1)).relu()
        return _linear_of(self.mlp.second, self.dropout(hidden))


class MaxPoolNetwork(nn.Module):
    """The baseline without a graph: an MLP on each region's feature and box, then the max.

    Args:
        feature_size: D.
        labels: C.
        settings: hidden size, inputs' scale and dropout, as the matching network reads them.
    """

    def __init__(self, feature_size: int, labels: int, settings: NetworkSettings) -> None:
        super().__init__()
        self.inputs = Inputs(feature_size, settings.least_deviation)
        self.input_dropout = nn.Dropout(settings.input_dropout)
        self.classify = RegionClassifier(
            feature_size, labels, settings.latent_size, settings.dropout
        )

    def forward(self, batch: InstanceBatch, label_vectors: Tensor) -> Tensor:
        """(B, M, C) logits; -inf for padding. The label vectors are not read."""
        features = self.input_dropout(self.inputs.features(batch.features))
        logits: Tensor = self.classify(features, self.inputs.boxes(batch.boxes))
        return logits.masked_fill(~batch.mask[..., None], -torch.inf)


def build_network(
    feature_size: int, labels: int, vector_size: int, settings: NetworkSettings
) -> MatchingNetwork | MaxPoolNetwork:
    """The network that settings describe: sizes D, C and W are the data's."""
    if settings.architecture == "max-pool":
        return MaxPoolNetwork(feature_size, labels, settings)
    return MatchingNetwork(feature_size, vector_size, settings)


def image_logits(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-instance max (14), on logits: the max commutes with the sigmoid.

    Args:
        logits: (B, M, C), -inf for padding.

    Returns:
        (B, C) logits of the image, and (B, C) int64, the instance that won each.
    """
    best: Any = logits.max(dim=1)
    return best.values, best.indices
