r"""PLA: an LSTM that attends to regions and emits a set of labels, in an order of its own.

Yazici et al., "Orderless Recurrent Models for Multi-label Classification", CVPR 2020 (arXiv
1911.09996); its equations were read in the authors' code (voyazici/orderless-rnn-classification).

.. math::

    h_0 = W_h g ,\quad c_0 = W_c g ,\qquad
    a^t_m = \mathrm{softmax}_m\, v^\top \mathrm{ReLU}(U x_m + W h_{t-1})

    h_t, c_t = \mathrm{LSTM}\Big(\big[e(l_{t-1}),\ \sigma(V h_{t-1}) \odot \sum_m a^t_m x_m\big],
               h_{t-1}, c_{t-1}\Big) ,\quad
    s_t = Z h_t ,\quad l_t = \arg\max_c s_{tc}

with the vector g of the whole view, the embedding e of a symbol, and :math:`l_0` the symbol START.
The symbols are the labels and END; those that are emitted before END are the predicted set. In
training, too, the head reads what it emitted itself. The targets follow it, which is the predicted
label alignment: of an image with n labels, those that the first n steps emit are the targets where
they are emitted first, the others are assigned to the remaining steps so that the sum of
:math:`-\log p` is least, and END is the target of the step after them.

On regions: positions of a feature map are regions, and the mean over the map is the whole view.
Ours are three details. The dropout of the regions is drawn once, not at every step, so that U x is
computed once. The loss is summed over the steps of an image, where theirs is the mean over all
steps of a batch. The authors' code leaves a label that is emitted only after step n where it stood;
here it is assigned as one that was not emitted. Lost: the fine-tuning of the encoder, and the mean
of the weights at the ends of cycles of the learning rate, for which a moving average stands.

It predicts a set: logits are above 0 exactly for its labels. Their order is ours, by each label's
highest probability p at a step, END's included: -log(1 - p) for the set, log p for the others.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn.functional import one_hot

from pipeline.heads.contract import Head, HeadOutput, HeadSizes, LabelSet, RegionBatch
from pipeline.heads.layers import apply, masked_softmax, scaled_linear
from pipeline.heads.sequences.symbols import log_complement, mask_ignored, sequence_loss
from pipeline.settings.heads import RECIPE, RegionSettings


class PlaSettings(RegionSettings):
    """PLA (CVPR 2020): an LSTM with attention that emits a set of labels."""

    own_loss: ClassVar[bool] = True
    ranks: ClassVar[bool] = False

    head: Literal["pla"] = "pla"
    hidden_size: int = Field(
        256, ge=1, description="Size of the LSTM's state and of the attention. The paper: 512."
    )
    embedding_size: int = Field(
        64, ge=1, description="Size of the embeddings of labels. The paper: 256."
    )
    steps: int = Field(
        20,
        ge=1,
        description="Symbols that are emitted: at least one more than the most labels of an image.",
    )
    input_dropout: float = Field(0.5, ge=0, lt=1, description="Dropout on the regions' features.")

    @property
    def needs_whole(self) -> bool:
        return True


VARIANTS: dict[str, dict[str, Any]] = {
    "pla": {
        **RECIPE,
        "loss": {"name": "own"},
        "network": {
            "head": "pla",
            "hidden_size": 128,
            "least_deviation": 1.0,
            "input_dropout": 0.3,
        },
    },
    "pla-published": {
        **RECIPE,
        "epochs": 30,
        "weight_decay": 0.0,
        "loss": {"name": "own"},
        "network": {"head": "pla", "hidden_size": 512, "embedding_size": 256},
    },
}


class _Decoded(NamedTuple):
    """What the LSTM makes of B images in T steps."""

    scores: Tensor
    """(B, T, C + 1), of the symbols."""
    symbols: Tensor
    """(B, T) int64, those that are emitted."""
    attention: Tensor
    """(B, T, M), 0 for padding."""


class Pla(Head):
    """Emit one label after another, looking at the regions anew for each."""

    attribution = "weights"
    recordable = False  # labels are aligned to steps on the CPU

    def __init__(self, sizes: HeadSizes, settings: PlaSettings) -> None:
        super().__init__(sizes, settings)
        hidden, embedding = settings.hidden_size, settings.embedding_size
        self.steps = settings.steps
        self.end, self.start_symbol = sizes.labels, sizes.labels + 1
        self.dropout = nn.Dropout(settings.input_dropout)
        self.first_hidden = scaled_linear(sizes.features, hidden)
        self.first_cell = scaled_linear(sizes.features, hidden)
        self.embeddings = nn.Embedding(sizes.labels + 2, embedding)
        self.of_region = scaled_linear(sizes.features, hidden, bias=False)
        self.of_hidden = scaled_linear(hidden, hidden)
        # A bias would be the same for all regions, and the softmax does not see it.
        self.affinity = scaled_linear(hidden, 1, gain=2.0, bias=False)
        self.gate = scaled_linear(hidden, sizes.features)
        self.cell = nn.LSTMCell(embedding + sizes.features, hidden)
        self.output = scaled_linear(hidden, sizes.labels + 1)

    def score(
        self, batch: RegionBatch, labels: LabelSet, truth: Tensor | None = None
    ) -> HeadOutput:
        """Score a batch, see `Head.score`. Nothing of the labels is read.

        The attribution of a label is the attention at the step that emitted it; 0 for the others.
        """
        decoded = self._decode(batch, truth)
        image, regions = self._emitted(decoded)
        if truth is None:
            return HeadOutput(image, regions)
        with torch.no_grad():
            log_p = mask_ignored(decoded.scores, truth).log_softmax(dim=2)
            targets = aligned_targets(log_p, decoded.symbols, truth)
        return HeadOutput(image, regions, loss=sequence_loss(decoded.scores, targets, truth))

    def _decode(self, batch: RegionBatch, truth: Tensor | None) -> _Decoded:
        """Emit symbols, but no ignored label if they are known."""
        regions = self.dropout(self.inputs.features(batch.features))
        of_regions = apply(self.of_region, regions)
        whole = self.inputs.whole(batch.of_whole())
        hidden, cell = apply(self.first_hidden, whole), apply(self.first_cell, whole)
        symbol = torch.full_like(batch.mask[:, 0], self.start_symbol, dtype=torch.int64)
        steps: list[tuple[Tensor, Tensor, Tensor]] = []
        for _ in range(self.steps):
            joint = (of_regions + apply(self.of_hidden, hidden)[:, None]).relu()
            attention = masked_softmax(apply(self.affinity, joint), batch.mask)
            seen = apply(self.gate, hidden).sigmoid() * (attention * regions).sum(dim=1)
            read = torch.cat([apply(self.embeddings, symbol), seen], dim=1)
            hidden, cell = self.cell(read, (hidden, cell))
            scores = apply(self.output, hidden)
            possible = scores if truth is None else mask_ignored(scores, truth)
            symbol = possible.argmax(dim=1)
            steps.append((scores, symbol, attention[..., 0]))
        return _Decoded(*(torch.stack(parts, dim=1) for parts in zip(*steps, strict=True)))

    def _emitted(self, decoded: _Decoded) -> tuple[Tensor, Tensor]:
        """The logits of the images (B, C), and the attention that emitted labels (B, M, C)."""
        scores, symbols, attention = decoded
        ends = (symbols == self.end).long().cumsum(dim=1)
        before = ends == 0
        reached = before | ((ends == 1) & (symbols == self.end))
        emits = (one_hot(symbols, self.end + 1)[..., :-1] == 1) & before[..., None]
        log_p = scores.log_softmax(dim=2)[..., :-1]
        best = log_p.masked_fill(~reached[..., None], -torch.inf).amax(dim=1)
        image = torch.where(emits.any(dim=1), -log_complement(best), best)
        first = emits & (emits.long().cumsum(dim=1) == 1)
        return image, attention.transpose(1, 2) @ first.to(attention.dtype)


def aligned_targets(log_p: Tensor, symbols: Tensor, truth: Tensor) -> Tensor:
    """The targets of the predicted label alignment.

    If an image has T labels or more, T of them are targets, and END is none.

    Args:
        log_p: (B, T, C + 1), log probabilities of the symbols.
        symbols: (B, T) int64, those that were emitted.
        truth: (B, C) in {1, 0, -1}.

    Returns:
        (B, T) int64; -1 for the steps after END.
    """
    # The assignment is computed on the CPU, one small problem an image. Where scores are not
    # finite, any assignment will do, since the loss then shows that the training diverged.
    cost_of_all = np.nan_to_num(-log_p.cpu().double().numpy(), nan=0.0, posinf=0.0, neginf=0.0)
    emitted, positive = symbols.cpu().numpy(), (truth == 1).cpu().numpy()
    targets = np.full(emitted.shape, -1)
    for image, has in enumerate(positive):
        labels = np.flatnonzero(has)
        steps = min(len(labels), emitted.shape[1])
        costs = cost_of_all[image, :steps][:, labels]
        right = emitted[image, :steps, None] == labels
        first = right & (right.cumsum(axis=0) == 1)
        costs[first] = -(1 + costs.sum())  # better than anything that the others can gain
        rows, columns = linear_sum_assignment(costs)
        targets[image, rows] = labels[columns]
        targets[image, steps : steps + 1] = truth.shape[1]
    return torch.from_numpy(targets).to(symbols.device)
