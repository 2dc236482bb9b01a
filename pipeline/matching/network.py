"""The matching network of GM-MLIC, section 3.3 of the paper.

    regions       label vectors
       \\           /
      assignment graph (1)-(3)      instances, labels, and edges within and between them
             |
         encoder (4)                all nodes and edges to one size
             |
      convolutions (5)-(12)         k modules: nodes read their neighbours, edges their nodes
             |
        decoder (13)                a logit of every instance for every label
             |
    max over instances (14)         `image_logits`

It computes, from the same parameters, what the equations say edge by edge, but faster, by three
identities:

1. A linear layer on a concatenation is a sum of smaller ones. So what an edge reads of its nodes is
   computed once per node and broadcast (`layers`).
2. No nonlinearity stands between an edge's update (linear, ReLU, linear) and the first layer of
   whatever reads the edge. So an edge is kept as its hidden state, and the second layer is folded
   into the readers' first (`states`). All readers' products run as one.
3. A mean commutes with a linear layer: messages are averaged before their second layer
   (`convolution`).

Matching edges and complete label graphs are grids of edges, of which `grids` holds as little as it
can. Edges to listed neighbours (of instances, and of labels in a sparse graph) are few.

What is the same for every image (encoded labels, and the edges between them, before they have read
an instance) is computed once. Nothing reads the last module's instance and label edges, so they are
not computed and have no parameters.

Beyond the paper: inputs are standardised with statistics of the training split (`inputs`), and
nodes pass a LayerNorm after the encoder and each update, which holds what still drifts during
training. It stands on nodes only: identity 2 needs the path from an edge's update to its readers to
be linear, and a normalised edge would have to be materialised. Off unless the settings ask for it:
dropout on the region features, on instance nodes (never on label nodes: a label without its node
can't be told from others) and in the decoder.

Letters: B images, M instances (padding included), C labels, D feature size, W label vector size,
H hidden size.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn

from pipeline.matching.convolution import Convolution
from pipeline.matching.decoder import Decoder
from pipeline.matching.encoder import Encoder
from pipeline.matching.graphs import InstanceBatch, StructureBuilder
from pipeline.matching.inputs import Inputs
from pipeline.matching.max_pool import MaxPoolNetwork
from pipeline.matching.states import AssignmentGraph
from pipeline.settings import NetworkSettings


class MatchingNetwork(nn.Module):
    """Score every instance for every label. Any number of labels goes through the same parameters.

    Args:
        feature_size: D.
        vector_size: W.
        settings: sizes, graphs, neighbours, normalisation and dropout.
    """

    def __init__(self, feature_size: int, vector_size: int, settings: NetworkSettings) -> None:
        super().__init__()
        self.settings = settings
        self._structures = StructureBuilder(settings)
        self.inputs = Inputs(feature_size, settings.least_deviation)
        self.input_dropout = nn.Dropout(settings.input_dropout)
        self.encoder = Encoder(feature_size, vector_size, settings)
        sizes = module_sizes(settings)
        self.convolutions = nn.ModuleList(
            Convolution(before, after, settings, last=number == settings.modules)
            for number, (before, after) in enumerate(pairwise(sizes), 1)
        )
        self.decoder = Decoder(sizes[-1], settings.matching_edges, settings.decoder_dropout)

    def forward(
        self,
        batch: InstanceBatch,
        label_vectors: Tensor,
        *,
        instance_graph: bool = True,
        label_graph: bool = True,
    ) -> Tensor:
        """Encode the assignment graph, convolve it, and decode its matching edges.

        Args:
            batch: B images with up to M instances.
            label_vectors: (C, W), as they come from their source.
            instance_graph, label_graph: False takes the edges of that graph away, so that its
                nodes have no neighbours and their mean message is 0. It changes nothing where the
                settings have no such graph.

        Returns:
            (B, M, C) logits; -inf for padding.
        """
        graph = self.convolved(batch, label_vectors, instance_graph, label_graph)
        logits = self.decoder(graph)
        return cast(Tensor, logits.masked_fill(~batch.mask[..., None], -torch.inf))

    def convolved(
        self,
        batch: InstanceBatch,
        label_vectors: Tensor,
        instance_graph: bool = True,
        label_graph: bool = True,
    ) -> AssignmentGraph:
        """Compute the assignment graph after the last convolution module.

        Args:
            batch, label_vectors, instance_graph, label_graph: as `forward` takes them.
        """
        structure = self._structures.build(batch, label_vectors, instance_graph, label_graph)
        features = self.input_dropout(self.inputs.features(batch.features))
        boxes, vectors = self.inputs.boxes(batch.boxes), self.inputs.vectors(label_vectors)
        graph = self.encoder(features, boxes, vectors, structure)
        for convolution in self.convolutions:
            graph = convolution(graph, structure)
        return cast(AssignmentGraph, graph)

    def label_nodes(self, batch: InstanceBatch, label_vectors: Tensor) -> Tensor:
        """Compute what each image makes of the labels: v_j^l of (8) after the last module.

        Args:
            batch, label_vectors: as `forward` takes them.

        Returns:
            (B, C, H); without matching edges a label reads no image, and all B are the same.
        """
        labels = self.convolved(batch, label_vectors).labels
        return labels.expand(batch.mask.shape[0], -1, -1)


Network = MatchingNetwork | MaxPoolNetwork
"""What the settings' `architecture` names."""


def build_network(
    feature_size: int, labels: int, vector_size: int, settings: NetworkSettings
) -> Network:
    """Build the network that the settings describe for data of sizes D, C and W."""
    if settings.architecture == "max-pool":
        return MaxPoolNetwork(feature_size, labels, settings)
    return MatchingNetwork(feature_size, vector_size, settings)


def module_sizes(settings: NetworkSettings) -> list[int]:
    """List the sizes of nodes and edges: encoded, then after each module; the last is halved."""
    latent = settings.latent_size
    return [latent] * settings.modules + [latent // 2]


def image_logits(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Max over instances (14), on logits, since the max commutes with the sigmoid.

    Args:
        logits: (B, M, C), -inf for padding.

    Returns:
        (B, C) logits of the image, and (B, C) int64, the index of the instance that won each label.
    """
    best: Any = logits.max(dim=1)
    return best.values, best.indices
