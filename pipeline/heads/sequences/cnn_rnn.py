r"""CNN-RNN: an LSTM that predicts the labels of the whole view, the most frequent ones first.

Wang et al., "CNN-RNN: A Unified Framework for Multi-label Image Classification", CVPR 2016 (arXiv
1604.04573). That the image and the recurrent output give a label's probability together, in one
low-dimensional space of images and labels, was read in the abstract and the caption of Figure 4.
The equations are from memory: the paper's text was not at hand, and no public code was found that
follows it (an unfinished one has the same embedding and projections; others that bear its name are
captioning models, or feed the true labels). With the embedding :math:`u_l` of the symbol l,

.. math::

    o_t = \mathrm{LSTM}(u_{l_{t-1}}, o_{t-1}) ,\quad
    x_t = \mathrm{ReLU}(U_o o_t + U_I g) ,\quad
    P(l \mid l_1 \dots l_{t-1}) = \mathrm{softmax}_l\, u_l^\top x_t

The symbols are the labels and END. Training feeds the true labels in the order of their frequency
in the training part, then END; prediction looks for the most probable path with a beam search.

On regions: g is the vector of the whole view, and no region is read. Lost: only the fine-tuning.
The bias of :math:`U_I` is ours, since features are centred here. The score of a label is ours, too:
its highest probability at a step of the path that was found, END's included.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import pad

from pipeline.heads.contract import Head, HeadOutput, HeadSizes, LabelSet, RegionBatch
from pipeline.heads.layers import apply, scaled_linear
from pipeline.heads.sequences.symbols import log_complement, sequence_loss
from pipeline.settings.heads import RECIPE, FeatureSettings


class CnnRnnSettings(FeatureSettings):
    """CNN-RNN (CVPR 2016): an LSTM that predicts the labels of the whole view in turn."""

    own_loss: ClassVar[bool] = True
    decides: ClassVar[bool] = False

    head: Literal["cnn-rnn"] = "cnn-rnn"
    hidden_size: int = Field(256, ge=1, description="Size of the LSTM's state. The paper: 512.")
    embedding_size: int = Field(
        64, ge=1, description="Size of the space of images and labels. The paper: 64."
    )
    steps: int = Field(
        20,
        ge=1,
        description="Longest path: at least one more than the most labels of an image.",
    )
    beams: int = Field(5, ge=1, description="Paths that are searched side by side. 1: greedy.")

    @property
    def needs_whole(self) -> bool:
        return True


VARIANTS: dict[str, dict[str, Any]] = {
    "cnn-rnn": {
        **RECIPE,
        "learning_rate": 0.003,
        "epochs": 10,
        "loss": {"name": "own"},
        "network": {"head": "cnn-rnn", "hidden_size": 128, "least_deviation": 1.0},
    },
    "cnn-rnn-published": {
        **RECIPE,
        "optimizer": "sgd",
        "learning_rate": 0.01,
        "momentum": 0.9,
        "weight_decay": 1e-4,
        "averaging": 0.0,
        "loss": {"name": "own"},
        "network": {"head": "cnn-rnn", "hidden_size": 512, "embedding_size": 64},
    },
}


class CnnRnn(Head):
    """Predict labels in the order of their frequency, each given those before."""

    def __init__(self, sizes: HeadSizes, settings: CnnRnnSettings) -> None:
        super().__init__(sizes, settings)
        self.steps, self.beams = settings.steps, settings.beams
        self.hidden_size = settings.hidden_size
        self.end = sizes.labels
        embedding = settings.embedding_size
        self.dropout = nn.Dropout(settings.input_dropout)
        self.embeddings = nn.Parameter(torch.randn(sizes.labels + 1, embedding) / embedding**0.5)
        self.first_embedding = nn.Parameter(torch.randn(embedding) / embedding**0.5)
        self.cell = nn.LSTMCell(embedding, settings.hidden_size)
        self.of_hidden = scaled_linear(settings.hidden_size, embedding, bias=False)
        self.of_image = scaled_linear(sizes.features, embedding)

    def score(
        self, batch: RegionBatch, labels: LabelSet, truth: Tensor | None = None
    ) -> HeadOutput:
        """Score a batch, see `Head.score`. Of the labels, only the ratio is read, for the loss.

        In training, the scores are those along the true path, which costs no search.
        """
        whole = self.dropout(self.inputs.whole(batch.of_whole()))
        image = apply(self.of_image, whole)
        if truth is None:
            return HeadOutput(_log_odds(self._search(image)))
        targets = ordered_targets(truth, labels.ratio, self.steps)
        scores = self._follow(image, targets)
        loss = sequence_loss(scores, targets, truth)
        if not self.training:
            return HeadOutput(_log_odds(self._search(image)), loss=loss)
        log_p = scores.log_softmax(dim=2)[..., :-1]
        best = log_p.masked_fill((targets < 0)[..., None], -torch.inf).amax(dim=1)
        return HeadOutput(_log_odds(best), loss=loss)

    def _step(
        self, symbol: Tensor, image: Tensor, state: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """One step of N paths.

        Args:
            symbol: (N, E), embeddings of the symbols before.
            image: (N, E), projections of the images.
            state: (N, H) each, of the LSTM.

        Returns:
            scores of the symbols (N, C + 1), and the state.
        """
        state = self.cell(symbol, state)
        return (apply(self.of_hidden, state[0]) + image).relu() @ self.embeddings.T, state

    def _start(self, image: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The embeddings (N, E) that N paths start with, and their states."""
        # Not len(image), which the export to ONNX would take for a constant.
        zeros = image.new_zeros(image.shape[0], self.hidden_size)
        return self.first_embedding.expand(image.shape[0], -1), (zeros, zeros)

    def _follow(self, image: Tensor, targets: Tensor) -> Tensor:
        """The scores (B, T, C + 1) of the symbols along given paths (B, T)."""
        symbol, state = self._start(image)
        steps = []
        for target in targets.unbind(dim=1):
            scores, state = self._step(symbol, image, state)
            steps.append(scores)
            symbol = self.embeddings[target.clamp(min=0)]
        return torch.stack(steps, dim=1)

    def _search(self, image: Tensor) -> Tensor:
        """Find the most probable path.

        Args:
            image: (B, E), projections of the images.

        Returns:
            (B, C), the log of each label's highest probability along the path.
        """
        images, beams, symbols = image.shape[0], self.beams, self.end + 1
        number = torch.arange(beams, device=image.device)
        of_image = torch.arange(images, device=image.device)[:, None] * beams
        image = image.repeat_interleave(beams, dim=0)
        symbol, state = self._start(image)
        # All beams start alike, so all but one are impossible.
        total = image.new_zeros(images, beams).masked_fill(number > 0, -torch.inf)
        ended = torch.zeros_like(total, dtype=torch.bool)
        best = image.new_full((images, beams, self.end), -torch.inf)
        # A path that has ended continues with END, at no cost.
        stay = image.new_zeros(symbols).masked_fill(
            torch.arange(symbols, device=image.device) < self.end, -torch.inf
        )
        for _ in range(self.steps):
            scores, state = self._step(symbol, image, state)
            log_p = scores.log_softmax(dim=1).view(images, beams, symbols)
            best = torch.where(ended[..., None], best, best.maximum(log_p[..., :-1]))
            log_p = torch.where(ended[..., None], stay, log_p)
            total, chosen = (total[..., None] + log_p).flatten(1).topk(beams, dim=1)
            parent, following = chosen // symbols, chosen % symbols
            ended = ended.gather(1, parent) | (following == self.end)
            best = best.gather(1, parent[..., None].expand(-1, -1, self.end))
            rows = (of_image + parent).flatten()
            state = (state[0][rows], state[1][rows])
            symbol = self.embeddings[following.flatten()]
        return best[:, 0]


def ordered_targets(truth: Tensor, ratio: Tensor, steps: int) -> Tensor:
    """The labels of each image, the most frequent one first, then END.

    Args:
        truth: (B, C) in {1, 0, -1}.
        ratio: (C,), the share of the training images that have the label.
        steps: T. If an image has T labels or more, only the first T count, without END.

    Returns:
        (B, T) int64; -1 after END.
    """
    order = ratio.argsort(descending=True, stable=True)
    positive = truth[:, order] == 1
    first = (~positive).byte().argsort(dim=1, stable=True)
    labels = pad(order[first], (0, max(steps - len(order), 0)))[:, :steps]
    step = torch.arange(steps, device=truth.device)
    count = positive.sum(dim=1, keepdim=True)
    return labels.masked_fill(step >= count, -1).masked_fill(step == count, len(order))


def _log_odds(log_p: Tensor) -> Tensor:
    """log p - log(1 - p), given log p."""
    return log_p - log_complement(log_p)
