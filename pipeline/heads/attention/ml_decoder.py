r"""ML-Decoder: fixed random queries, each for a group of labels, attend to the regions.

Ridnik et al., "ML-Decoder: Scalable and Versatile Classification Head", WACV 2023
(arXiv 2111.12933); everything was read in the authors' code (Alibaba-MIIL/ML_Decoder:
ml_decoder.py, train.py).

.. math::

    z_m = \mathrm{ReLU}(W x_m) ,\qquad t_k = \mathrm{LN}(2 q_k) ,\qquad
    t \leftarrow \mathrm{FF}(\mathrm{LN}(t + \mathrm{attend}(t,\; z + p,\; z))) ,\qquad
    s_c = V_{kj} \cdot t_k + u_c

with label c the j-th of group k, and FF(x) = LN(x + linear(ReLU(linear(x)))). :math:`x_m` is the
feature of region m and :math:`q_k` the query of group k, which is drawn at random and stays so.
There is no self-attention; what is left of it is that a query is added to itself, in training
after dropout. With `queries: vectors`, the code's mode for zero-shot learning, each label has a
query of its own, ReLU of a linear layer of its vector, and all share one V and one u.

On regions: positions of a feature map are regions, and padding is masked, which the code can't do.
The positions :math:`p_m` of the boxes are this project's addition; the original has none, which is
`boxes: none`. Groups hold ceil(C / groups) labels as in the code, but a query that is left without
a label is not made. Lost: the fine-tuning and augmentation. Sizes are smaller by default
(published: 768 with 2048, 8 heads, 40 epochs).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from pipeline.heads.attention.layers import AttentionLayer, AttentionSettings, BoxPositions
from pipeline.heads.contract import Head, HeadOutput, HeadSizes, LabelSet, RegionBatch
from pipeline.heads.layers import apply, scaled_linear
from pipeline.settings.heads import RECIPE


class MlDecoderSettings(AttentionSettings):
    """ML-Decoder (WACV 2023): fixed queries, each for a group of labels."""

    head: Literal["ml-decoder"] = "ml-decoder"
    queries: Literal["fixed", "vectors"] = Field(
        "fixed",
        description="Where queries come from: `fixed` random ones, as published, or the label "
        "`vectors`, as published for labels that were not trained.",
    )
    groups: int = Field(
        100,
        ge=1,
        description="Largest number of `fixed` queries; if there are more labels, several share "
        "one. With `vectors`, each label has its own.",
    )

    @property
    def scores_new_labels(self) -> bool:
        return self.queries == "vectors"


VARIANTS: dict[str, dict[str, Any]] = {
    "ml-decoder": {
        **RECIPE,
        "network": {"head": "ml-decoder", "input_dropout": 0.3, "dropout": 0.3},
    },
    "ml-decoder-published": {
        **RECIPE,
        "epochs": 40,
        "batch_size": 56,
        "schedule": "one-cycle",
        "warm_up": 0.2,
        "learning_rate": 0.0001,
        "weight_decay": 0.0001,
        "averaging": 0.9997,
        "loss": {"name": "asymmetric", "negative_gamma": 4.0, "positive_gamma": 0.0, "clip": 0.05},
        "network": {
            "head": "ml-decoder",
            "hidden_size": 768,
            "feedforward_size": 2048,
            "attention_heads": 8,
            "boxes": "none",
        },
    },
}


class MlDecoder(Head):
    """Score labels by what the query of their group finds among the regions.

    The attribution is the attention of the label's group, the mean over the attention heads.
    """

    attribution = "weights"
    queries: Tensor

    def __init__(self, sizes: HeadSizes, settings: MlDecoderSettings) -> None:
        super().__init__(sizes, settings)
        size = settings.hidden_size
        self.of_vectors = settings.queries == "vectors"
        self.group_size = 1 if self.of_vectors else -(-sizes.labels // settings.groups)
        self.input_dropout = nn.Dropout(settings.input_dropout)
        self.project = scaled_linear(sizes.features, size)
        self.positions = BoxPositions(size, settings.boxes)
        if self.of_vectors:
            self.project_vectors = scaled_linear(sizes.vectors, size)
            classifiers, biases = 1, 1
        else:
            classifiers, biases = -(-sizes.labels // self.group_size), sizes.labels
            self.register_buffer("queries", torch.randn(classifiers, size))
        self.norm_query = nn.LayerNorm(size)
        self.layer = AttentionLayer(settings)
        self.dropout = nn.Dropout(settings.dropout)
        self.classifiers = nn.Parameter(torch.randn(classifiers, size, self.group_size) / size**0.5)
        self.bias = nn.Parameter(torch.zeros(biases))

    def score(
        self, batch: RegionBatch, labels: LabelSet, truth: Tensor | None = None
    ) -> HeadOutput:
        """Score a batch, see `Head.score`."""
        count = len(labels.vectors)
        features = apply(self.input_dropout, self.inputs.features(batch.features))
        regions = apply(self.project, features).relu()
        keys = regions + self.positions(batch.boxes, self.inputs)
        queries = self._queries(labels).expand(regions.shape[0], -1, -1)
        states = apply(self.norm_query, queries + apply(self.dropout, queries))
        states, attention = self.layer(states, states, keys, regions, batch.mask)
        # (B, K, 1, E) x (K, E, labels of a group), of which the last group may have too many.
        logits = (states[:, :, None] @ self.classifiers).flatten(1)[:, :count] + self.bias
        of_labels = attention.repeat_interleave(self.group_size, dim=1)[:, :count]
        return HeadOutput(logits, of_labels.transpose(1, 2))

    def _queries(self, labels: LabelSet) -> Tensor:
        """The queries (K, E) of the groups."""
        if not self.of_vectors:
            return self.queries
        return apply(self.project_vectors, self.inputs.vectors(labels.vectors)).relu()
