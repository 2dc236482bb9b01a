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
    max over instances (14)         a logit of the image for every label

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
residual nodes (a node's state is added to its update), dropout on the region features, on instance
nodes (never on label nodes: a label without its node can't be told from others) and in the decoder.

Letters: B images, M instances (padding included), C labels, D feature size, W label vector size,
H hidden size.
"""

from __future__ import annotations

from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn

from pipeline.heads.contract import Head, HeadOutput, HeadSizes, LabelSet, RegionBatch
from pipeline.heads.matching.convolution import Convolution
from pipeline.heads.matching.decoder import Decoder
from pipeline.heads.matching.encoder import Encoder
from pipeline.heads.matching.graphs import StructureBuilder
from pipeline.heads.matching.states import AssignmentGraph
from pipeline.settings import GmMlicSettings


class GmMlic(Head):
    """Score every instance for every label. Any number of labels goes through the same parameters.

    Args:
        sizes: of the data.
        settings: sizes, graphs, neighbours, normalisation and dropout.
    """

    attribution = "logits"

    def __init__(self, sizes: HeadSizes, settings: GmMlicSettings) -> None:
        super().__init__(sizes, settings)
        self.settings = settings
        self._structures = StructureBuilder(settings)
        self.input_dropout = nn.Dropout(settings.input_dropout)
        self.encoder = Encoder(sizes.features, sizes.vectors, settings)
        states = module_sizes(settings)
        self.convolutions = nn.ModuleList(
            Convolution(before, after, settings, last=number == settings.modules)
            for number, (before, after) in enumerate(pairwise(states), 1)
        )
        self.decoder = Decoder(states[-1], settings.matching_states, settings.decoder_dropout)

    def score(
        self,
        batch: RegionBatch,
        labels: LabelSet,
        truth: Tensor | None = None,
        *,
        instance_graph: bool = True,
        label_graph: bool = True,
    ) -> HeadOutput:
        """Encode the assignment graph, convolve it, decode its matching edges, and take their max.

        The max (14) is taken on logits, with which it commutes.

        Args:
            batch: B images with up to M instances.
            labels: of which only the vectors are read.
            truth: not read.
            instance_graph, label_graph: False takes the edges of that graph away, so that its
                nodes have no neighbours and their mean message is 0. It changes nothing where the
                settings have no such graph.
        """
        graph = self.convolved(batch, labels.vectors, instance_graph, label_graph)
        logits = self.decoder(graph).masked_fill(~batch.mask[..., None], -torch.inf)
        return HeadOutput(logits.max(dim=1).values, logits)

    def convolved(
        self,
        batch: RegionBatch,
        label_vectors: Tensor,
        instance_graph: bool = True,
        label_graph: bool = True,
    ) -> AssignmentGraph:
        """Compute the assignment graph after the last convolution module.

        Args:
            batch: B images with up to M instances.
            label_vectors: (C, W), as they come from their source.
            instance_graph, label_graph: as `score` takes them.
        """
        structure = self._structures.build(batch, label_vectors, instance_graph, label_graph)
        features = self.input_dropout(self.inputs.features(batch.features))
        boxes, vectors = self.inputs.boxes(batch.boxes), self.inputs.vectors(label_vectors)
        graph = self.encoder(features, boxes, vectors, structure)
        for convolution in self.convolutions:
            graph = convolution(graph, structure)
        return cast(AssignmentGraph, graph)

    def label_nodes(self, batch: RegionBatch, label_vectors: Tensor) -> Tensor:
        """Compute what each image makes of the labels: v_j^l of (8) after the last module.

        Args:
            batch, label_vectors: as `convolved` takes them.

        Returns:
            (B, C, H); without matching edges a label reads no image, and all B are the same.
        """
        if self.reads_whole_region:
            batch = batch.with_whole_region()
        labels = self.convolved(batch, label_vectors).labels
        return labels.expand(batch.mask.shape[0], -1, -1)


def module_sizes(settings: GmMlicSettings) -> list[int]:
    """List the sizes of nodes and edges: encoded, then after each module; the last is halved."""
    latent = settings.latent_size
    return [latent] * settings.modules + [latent // 2]
