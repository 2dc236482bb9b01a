"""The matching network of GM-MLIC, section 3.3, on its fast path.

Naming: ``X_from_Y`` gathers for nodes X from neighbours Y (the rho of equations (5) and (7));
``X_node`` and ``X_edge`` update (the phi of (6), (8) and (9)-(12)); ``X_edge_from_nodes`` is the
rho of (9)-(11). X and Y are `instance`, `label` or `matching`.

Letters: B images, M instances (padding included), C labels, K neighbours of an instance,
L neighbours of a label, D feature size, W label vector size, H hidden size.

The fast path computes what `pipeline.matching.reference` computes edge by edge, from the same
parameters, by three identities:

1. A linear layer on a concatenation is a sum of smaller ones. So what an edge reads of its nodes
   is computed once a node and broadcast.
2. Between an edge's update (linear, ReLU, linear) and the first layer of whoever reads the edge
   stands no nonlinearity. So an edge is kept as its hidden state, and the second layer is folded
   into the readers' first (`_Edges`). All readers' products run as one.
3. A mean commutes with a linear layer: messages are averaged before their second layer.

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
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from pipeline.matching.graphs import InstanceBatch, Neighbors, instance_neighbors, label_neighbors
from pipeline.settings import NetworkSettings

_LEAST_DEVIATION = 0.1  # of the root mean square deviation of all components


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
    """Edges as the hidden state of their last update: the attribute is ``second(hidden)``."""

    hidden: Tensor  # (..., H)
    second: nn.Linear

    def read(self, *weights: Tensor) -> tuple[Tensor, ...]:
        """``attribute @ weight.T`` for each weight (H', H), as one product (identity 2)."""
        stacked = torch.cat(weights)
        product = nn.functional.linear(
            self.hidden, stacked @ self.second.weight, stacked @ self.second.bias
        )
        return torch.split(product, [len(weight) for weight in weights], dim=-1)


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

    Label nodes and label edges have no image axis (they broadcast) until labels have seen
    instances.
    """

    instances: Tensor  # (B, M, H)
    labels: Tensor  # (C, H) or (B, C, H)
    instance_edges: _Edges | None  # (B, M, K, H)
    label_edges: _Edges | None  # (C, L, H) or (B, C, L, H)
    matching_edges: _Edges | None  # (B, M, C, H)


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
        self.inputs = Inputs(feature_size)
        self.dropout = nn.Dropout(settings.dropout)
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
        sizes = module_sizes(settings)
        self.convolutions = nn.ModuleList(
            Convolution(before, after, settings, last=place == len(sizes) - 2)
            for place, (before, after) in enumerate(pairwise(sizes))
        )
        pieces = (sizes[-1],) if settings.matching_edges else (sizes[-1],) * 2
        self.decode = MLP(pieces, 1, hidden=sum(pieces))

    def forward(self, batch: InstanceBatch, label_vectors: Tensor) -> Tensor:
        """Encoder (4), convolution modules (5)-(12), decoder (13).

        Args:
            batch: B images with up to M instances.
            label_vectors: (C, W), as they come from their source.

        Returns:
            (B, M, C) logits; -inf for padding.
        """
        neighbors = instance_neighbors(batch, self.settings.neighbors)
        label_index = label_neighbors(label_vectors, self.settings.label_neighbors)
        state = self._encode(batch, label_vectors, neighbors, label_index)
        for module in self.convolutions:
            state = self._convolve(
                cast(Convolution, module), state, batch.mask, neighbors, label_index
            )
        logits = self._decode(state)
        return logits.masked_fill(~batch.mask[..., None], -torch.inf)

    def _settle(self, nodes: Tensor, norm: nn.Module) -> Tensor:
        return cast(Tensor, self.dropout(norm(nodes)))

    def _encode(
        self, batch: InstanceBatch, vectors: Tensor, neighbors: Neighbors, label_index: Tensor
    ) -> _State:
        features = self.input_dropout(self.inputs.features(batch.features))
        boxes = self.inputs.boxes(batch.boxes)
        words = self.inputs.vectors(vectors)
        instance_edges = label_edges = matching_edges = None
        if (mlp := self.encode_instance_edge) is not None:
            own, other = mlp.pieces()
            there = _neighbor_rows(_linear(boxes, other), neighbors.index)
            here = _linear(boxes, own, mlp.first.bias)[:, :, None]
            instance_edges = _Edges((here + there).relu(), mlp.second)
        if (mlp := self.encode_label_edge) is not None:
            own, other = mlp.pieces()
            there = _linear(words, other)[label_index]
            here = _linear(words, own, mlp.first.bias)[:, None]
            label_edges = _Edges((here + there).relu(), mlp.second)
        if (mlp := self.encode_matching_edge) is not None:
            own, other = mlp.pieces()
            here = _linear(features, own, mlp.first.bias)[:, :, None]
            matching_edges = _Edges((here + _linear(words, other)).relu(), mlp.second)
        return _State(
            self._settle(self.encode_instance(features), self.encoded_instance_norm),
            self._settle(self.encode_label(words), self.encoded_label_norm),
            instance_edges,
            label_edges,
            matching_edges,
        )

    def _convolve(
        self,
        module: Convolution,
        state: _State,
        mask: Tensor,
        neighbors: Neighbors,
        label_index: Tensor,
    ) -> _State:
        instance_parts, label_parts = [state.instances], [state.labels]
        instance_read = label_read = matching_read = None  # what the edge updates read of edges
        if (mlp := module.instance_from_instance) is not None:
            edge, node = mlp.pieces()
            read, instance_read = _read(state.instance_edges, edge, module.instance_edge)
            there = _neighbor_rows(_linear(state.instances, node, mlp.first.bias), neighbors.index)
            messages = (read + there).relu()
            instance_parts.append(_masked_mean(messages, neighbors.mask, mlp.second))
        if (mlp := module.label_from_label) is not None:
            edge, node = mlp.pieces()
            read, label_read = _read(state.label_edges, edge, module.label_edge)
            there = _linear(state.labels, node, mlp.first.bias)[..., label_index, :]
            messages = (read + there).relu()
            exists = torch.ones_like(label_index, dtype=torch.bool)
            label_parts.append(_masked_mean(messages, exists, mlp.second))
        if (mlp := module.instance_from_label) is not None:
            back = cast(MLP, module.label_from_instance)
            edge, node = mlp.pieces()
            back_edge, back_node = back.pieces()
            to_instance, to_label, matching_read = cast(_Edges, state.matching_edges).read(
                edge, back_edge, cast(MLP, module.matching_edge).pieces()[0]
            )
            words = _linear(state.labels, node, mlp.first.bias)
            messages = (to_instance + words.unsqueeze(-3)).relu()  # (B, M, C, H)
            instance_parts.append(_linear_of(mlp.second, messages.mean(dim=2)))
            regions = _linear(state.instances, back_node, back.first.bias)[:, :, None]
            messages = (to_label + regions).relu().transpose(1, 2)  # (B, C, M, H)
            label_parts.append(_masked_mean(messages, mask[:, None], back.second))
        instances = self._settle(
            _update(module.instance_node, instance_parts), module.instance_norm
        )
        labels = self._settle(_update(module.label_node, label_parts), module.label_norm)

        instance_edges = label_edges = matching_edges = None
        if (mlp := module.instance_edge) is not None:
            between = cast(MLP, module.instance_edge_from_nodes)
            own, other = between.pieces()
            there = _neighbor_rows(_linear(instances, other), neighbors.index)
            here = _linear(instances, own, between.first.bias)[:, :, None]
            instance_edges = _updated(mlp, cast(Tensor, instance_read), between, here + there)
        if (mlp := module.label_edge) is not None:
            between = cast(MLP, module.label_edge_from_nodes)
            own, other = between.pieces()
            there = _linear(labels, other)[..., label_index, :]
            here = _linear(labels, own, between.first.bias)[..., None, :]
            label_edges = _updated(mlp, cast(Tensor, label_read), between, here + there)
        if (mlp := module.matching_edge) is not None:
            between = cast(MLP, module.matching_edge_from_nodes)
            own, other = between.pieces()
            here = _linear(instances, own, between.first.bias)[:, :, None]
            there = _linear(labels, other).unsqueeze(-3)
            matching_edges = _updated(mlp, cast(Tensor, matching_read), between, here + there)
        return _State(instances, labels, instance_edges, label_edges, matching_edges)

    def _decode(self, state: _State) -> Tensor:
        first = self.decode.first
        if state.matching_edges is not None:
            (hidden,) = state.matching_edges.read(first.weight)
            hidden = hidden + first.bias
        else:
            own, other = self.decode.pieces()
            there = _linear(state.labels, other).unsqueeze(-3)
            hidden = _linear(state.instances, own, first.bias)[:, :, None] + there
        return cast(Tensor, self.decode.second(hidden.relu()).squeeze(-1))


def module_sizes(settings: NetworkSettings) -> list[int]:
    """Sizes of nodes and edges: encoded, then after each module; the last has half the size."""
    latent = settings.latent_size
    return [latent] * settings.modules + [latent // 2]


def _linear_of(layer: nn.Linear, x: Tensor) -> Tensor:
    return cast(Tensor, layer(x))


def _masked_mean(messages: Tensor, mask: Tensor, second: nn.Linear) -> Tensor:
    """Mean over the neighbours that exist, then the second layer (identity 3); 0 for none.

    (..., K, H), (..., K) -> (..., H')
    """
    count = mask.sum(dim=-1, keepdim=True)
    weights = mask.to(messages.dtype) / count.clamp(min=1)
    mean = torch.einsum("...kh,...k->...h", messages, weights)
    return _linear_of(second, mean) * (count > 0)


def _read(
    edges: _Edges | None, gathered: Tensor, update: MLP | None
) -> tuple[Tensor, Tensor | None]:
    """What the aggregation and, unless the module is the last, the update read of edges."""
    present = cast(_Edges, edges)
    if update is None:
        return present.read(gathered)[0], None
    read, kept = present.read(gathered, update.pieces()[0])
    return read, kept


def _update(mlp: MLP, parts: list[Tensor]) -> Tensor:
    """An MLP on the concatenation of nodes, some of which may lack the image axis."""
    hidden: Tensor = mlp.first.bias
    for part, weight in zip(parts, mlp.pieces(), strict=True):
        hidden = hidden + _linear(part, weight)
    return _linear_of(mlp.second, hidden.relu())


def _updated(mlp: MLP, kept: Tensor, between: MLP, pair: Tensor) -> _Edges:
    """Edge update phi([e, rho([v_i, v_j])]), from phi's reading of e and rho's first layer."""
    weight = mlp.pieces()[1]
    bias = mlp.first.bias + weight @ between.second.bias
    hidden = kept + _linear(pair.relu(), weight @ between.second.weight, bias)
    return _Edges(hidden.relu(), mlp.second)


class Inputs(nn.Module):
    """Standardisation of what the network reads; the statistics are saved with its weights.

    Features and box coordinates get mean 0 and variance 1 over the real regions of the training
    split, each component by itself. A component that varies less than a tenth of the root mean
    square over all of them is scaled by that tenth: a detector's features have components that
    are almost always 0, and dividing by their tiny deviation would make single regions stand out
    by a hundred. Label vectors are divided by the root mean square of all their components, which
    keeps their geometry.
    """

    feature_mean: Tensor
    feature_scale: Tensor
    box_mean: Tensor
    box_scale: Tensor
    vector_scale: Tensor

    def __init__(self, feature_size: int) -> None:
        super().__init__()
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
            ("feature_scale", _inverse(feature_std)),
            ("box_mean", box_mean),
            ("box_scale", _inverse(box_std)),
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


def _inverse(std: Tensor) -> Tensor:
    floor = _LEAST_DEVIATION * std.square().mean().sqrt()
    return 1 / torch.maximum(std, floor).clamp(min=1e-6)


class MaxPoolNetwork(nn.Module):
    """The baseline without a graph: an MLP on each region's feature and box, then the max.

    Args:
        feature_size: D.
        labels: C.
        settings: hidden size and dropout, as the matching network reads them.
    """

    def __init__(self, feature_size: int, labels: int, settings: NetworkSettings) -> None:
        super().__init__()
        self.inputs = Inputs(feature_size)
        self.input_dropout = nn.Dropout(settings.input_dropout)
        self.dropout = nn.Dropout(settings.dropout)
        self.classify = MLP((feature_size, 4), labels, hidden=settings.latent_size)

    def forward(self, batch: InstanceBatch, label_vectors: Tensor) -> Tensor:
        """(B, M, C) logits; -inf for padding. The label vectors are not read."""
        features = self.input_dropout(self.inputs.features(batch.features))
        x = torch.cat([features, self.inputs.boxes(batch.boxes)], dim=-1)
        hidden = self.dropout(self.classify.first(x).relu())
        return _linear_of(self.classify.second, hidden).masked_fill(
            ~batch.mask[..., None], -torch.inf
        )


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
