r"""ADD-GCN: a graph over the labels that every image builds anew.

Ye, He, Peng, Li and Qiao, "Attention-Driven Dynamic Graph Convolutional Network for Multi-Label
Image Recognition", ECCV 2020 (arXiv 2012.02994); its equations and settings were read in the
authors' code (Yejin0111/ADD-GCN: models/add_gcn.py, main.py). Every region has logits, and these
say how much of it each label reads:

.. math::

    r_{mc} = F_c\,x_m + f_c ,\quad
    v_c = \frac{\sum_m \sigma(r_{mc})\,T x_m}{\sum_m \sigma(r_{mc})}

A static graph S, which is learnt and the same for all images, then a dynamic one, which reads the
labels' vectors and their mean through g, change what the labels know (LeakyReLU is written ρ):

.. math::

    v' = v + \rho(\rho(S v)\,W_s) ,\quad
    A_{nc} = \sigma\big(D_c\,[\,g(\tfrac1C \textstyle\sum_k v'_k) ;\, v'_n]\big) ,\quad
    z_n = v_n + \rho\big(\rho(\tfrac1C \textstyle\sum_c A_{nc} v'_c)\,W_d\big)

.. math:: s_c = \tfrac12\big(\max_m r_{mc} + V_c z_c + u_c\big)

On regions: positions of a feature map are regions. v is divided by the sum of its weights, since
images differ in their number of regions; the sum over c in z is a mean, which only scales W_d.
Regions are standardised and have mean 0, unlike a ResNet's features, so their classifiers F have a
bias. g is a linear layer, a normalisation and LeakyReLU; the normalisation is over a vector's
components, where the original's is over a batch, so that no image's score depends on the others in
its batch. Lost: 14x14 positions, and the fine-tuning.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import leaky_relu, logsigmoid

from pipeline.heads.contract import Head, HeadOutput, HeadSizes, LabelSet, RegionBatch
from pipeline.heads.label_graphs.classifiers import LabelClassifiers
from pipeline.heads.layers import apply, masked_softmax, scaled_linear
from pipeline.settings.heads import RECIPE, RegionSettings

_SLOPE = 0.2
"""Of the leaky ReLU, as published."""
_GAIN = 2 / (1 + _SLOPE**2)


class AddGcnSettings(RegionSettings):
    """ADD-GCN (ECCV 2020): a graph over the labels that every image builds anew."""

    head: Literal["add-gcn"] = "add-gcn"
    hidden_size: int = Field(256, ge=1, description="Size of the label nodes.")


VARIANTS: dict[str, dict[str, Any]] = {
    "add-gcn": {
        **RECIPE,
        "learning_rate": 0.003,
        "epochs": 10,
        "network": {"head": "add-gcn", "hidden_size": 128, "input_dropout": 0.3},
    },
    "add-gcn-published": {
        **RECIPE,
        "epochs": 50,
        "batch_size": 16,
        "optimizer": "sgd",
        # Published: a rate of 0.05, a decay of 1e-4 and a norm of 10, with a loss that is the mean
        # over the labels. Here it is the sum over VOC's 20, with which these make the same steps.
        # A second drop of the rate after 40 epochs is left out.
        "learning_rate": 0.0025,
        "momentum": 0.9,
        "weight_decay": 0.002,
        "schedule": "step",
        "step_epochs": 30,
        "averaging": 0.0,
        "clip_norm": 200.0,
        "network": {"head": "add-gcn", "hidden_size": 1024},
    },
}


class AddGcn(Head):
    """Score labels by their best regions and by a graph that the image itself defines."""

    attribution = "logits"

    def __init__(self, sizes: HeadSizes, settings: AddGcnSettings) -> None:
        super().__init__(sizes, settings)
        self.dropout = nn.Dropout(settings.input_dropout)
        self.of_regions = scaled_linear(sizes.features, sizes.labels)
        self.transform = scaled_linear(sizes.features, settings.hidden_size)
        self.static = StaticGraph(sizes.labels, settings.hidden_size)
        self.dynamic = DynamicGraph(sizes.labels, settings.hidden_size)
        self.classifiers = LabelClassifiers(sizes.labels, settings.hidden_size)

    def score(
        self, batch: RegionBatch, labels: LabelSet, truth: Tensor | None = None
    ) -> HeadOutput:
        """Score a batch, see `Head.score`. Nothing of the labels is read."""
        features = self.dropout(self.inputs.features(batch.features))
        logits = apply(self.of_regions, features)
        of_regions = logits.masked_fill(~batch.mask[..., None], -torch.inf)
        # The quotient as a softmax of log(sigmoid): all sigmoids of a label may be 0 when rounded.
        shares = masked_softmax(logsigmoid(logits), batch.mask)
        nodes = shares.transpose(1, 2) @ apply(self.transform, features)
        changed = apply(self.dynamic, nodes + apply(self.static, nodes))
        of_nodes = apply(self.classifiers, nodes + changed)
        return HeadOutput((of_regions.amax(dim=1) + of_nodes) / 2, of_regions)


class StaticGraph(nn.Module):
    """The graph that is the same for all images.

    Args:
        labels: C.
        size: H, of the nodes.
    """

    def __init__(self, labels: int, size: int) -> None:
        super().__init__()
        self.graph = nn.Parameter(torch.randn(labels, labels) / labels**0.5)
        self.layer = scaled_linear(size, size, _GAIN)

    def forward(self, nodes: Tensor) -> Tensor:
        """(B, C, H) -> (B, C, H)."""
        return leaky_relu(apply(self.layer, leaky_relu(self.graph @ nodes, _SLOPE)), _SLOPE)


class DynamicGraph(nn.Module):
    """The graph that the nodes of an image define.

    Args:
        labels: C.
        size: H, of the nodes.
    """

    def __init__(self, labels: int, size: int) -> None:
        super().__init__()
        self.of_image = scaled_linear(size, size)
        self.norm = nn.LayerNorm(size)
        self.edges_of_image = scaled_linear(size, labels, _GAIN)
        self.edges_of_nodes = scaled_linear(size, labels, bias=False)
        self.layer = scaled_linear(size, size, _GAIN)

    def forward(self, nodes: Tensor) -> Tensor:
        """(B, C, H) -> (B, C, H)."""
        graph = self.edges(nodes) / nodes.shape[1]
        return leaky_relu(apply(self.layer, leaky_relu(graph @ nodes, _SLOPE)), _SLOPE)

    def edges(self, nodes: Tensor) -> Tensor:
        """A: how much each label reads of each: (B, C, H) -> (B, C, C), each in [0, 1]."""
        image = apply(self.of_image, nodes.mean(dim=1))
        image = leaky_relu(apply(self.norm, image), _SLOPE)
        of_image = apply(self.edges_of_image, image)[:, None]
        return (apply(self.edges_of_nodes, nodes) + of_image).sigmoid()
