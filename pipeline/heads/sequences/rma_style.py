r"""RMA-style: an LSTM that moves a window over the image, and scores what it sees through it.

After Wang et al., "Multi-label Image Recognition by Recurrently Discovering Attentional Regions",
ICCV 2017 (arXiv 1711.02816), whose abstract was read; the equations are those of a
re-implementation by others (James-Yip/AttentionImageClass). For k = 0 to K,

.. math::

    h_k, c_k = \mathrm{LSTM}(F f_k, h_{k-1}, c_{k-1}) ,\quad z_k = \mathrm{ReLU}(W h_k) ,\quad
    (s^x, s^y, t^x, t^y)_{k+1} = U z_k

    s_c = \max_{k \ge 1}\, (V z_k)_c

with K = 5, :math:`f_0` the whole image, and :math:`f_k` what the window of step k shows: the
rectangle with the centre t and half of the size s, in coordinates from -1 to 1. The loss is

.. math::

    \sum_c \Big(\mathrm{softmax}(s)_c - \frac{y_c}{\lVert y \rVert_1}\Big)^2
    + 0.1\,(L_S + 0.01\,L_A + 0.1\,L_P)

with, summed over k and where s stands for both axes, :math:`L_S = \max(|s| - 0.5, 0)^2`,
:math:`L_P = \max(0.1 - s, 0)`, and :math:`L_A = \frac12 \lVert t_k - a_k \rVert^2` for the anchors
(0, 0) and (±0.5, ±0.5).

On regions: the window does not sample a feature map. It reads the regions by how well it fits them,

.. math::

    f_k = \sum_m \mathrm{softmax}_m \big(10\,\mathrm{IoU}(w_k, b_m) - \lVert t_k - m_m \rVert^2\big)
    \,x_m

with the boxes :math:`b_m` and their centres :math:`m_m`; the second term pulls a window towards
boxes that it does not overlap. This is not the method itself, but one in its style: it was made to
do without proposals, and here can see nothing but these. Lost, too, is the fine-tuning. An image
without a label carries no squared loss, and the softmax leaves ignored labels out.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from pipeline.heads.contract import Head, HeadOutput, HeadSizes, LabelSet, RegionBatch
from pipeline.heads.layers import (
    apply,
    at_least_float32,
    masked_softmax,
    scaled_linear,
    softmax_squared_loss,
)
from pipeline.settings.heads import RECIPE, RegionSettings

_ANCHORS = ((0.0, 0.0), (0.5, 0.5), (0.5, -0.5), (-0.5, 0.5), (-0.5, -0.5))
"""Where the windows should be, (x, y), K of them."""
_LARGEST, _SMALLEST = 0.5, 0.1
"""Of half of a window's size."""
_SHARPNESS = 10.0


class RmaStyleSettings(RegionSettings):
    """An LSTM that moves a window over the image, in the style of RMA (ICCV 2017)."""

    own_loss: ClassVar[bool] = True
    decides: ClassVar[bool] = False

    head: Literal["rma-style"] = "rma-style"
    hidden_size: int = Field(
        256, ge=1, description="Size of the LSTM's input and state. The paper: 4,096."
    )

    @property
    def needs_whole(self) -> bool:
        return True


VARIANTS: dict[str, dict[str, Any]] = {
    "rma-style": {
        **RECIPE,
        "loss": {"name": "own"},
        "network": {
            "head": "rma-style",
            "whole_region": True,
            "least_deviation": 1.0,
            "input_dropout": 0.3,
        },
    },
    "rma-style-published": {
        **RECIPE,
        "batch_size": 16,
        "weight_decay": 0.0,
        "averaging": 0.0,
        "loss": {"name": "own"},
        # With the published size of 4,096 it has more than 150 million parameters.
        "network": {"head": "rma-style", "hidden_size": 512},
    },
}


class RmaStyle(Head):
    """Look at the image through five windows in turn; a label's best window scores it."""

    attribution = "weights"
    anchors: Tensor

    def __init__(self, sizes: HeadSizes, settings: RmaStyleSettings) -> None:
        super().__init__(sizes, settings)
        hidden = settings.hidden_size
        self.hidden_size = hidden
        self.dropout = nn.Dropout(settings.input_dropout)
        self.read = scaled_linear(sizes.features, hidden)
        self.cell = nn.LSTMCell(hidden, hidden)
        self.after = scaled_linear(hidden, hidden)
        self.output = scaled_linear(hidden, sizes.labels, gain=2.0)
        self.window = nn.Linear(hidden, 4)
        nn.init.zeros_(self.window.weight)
        with torch.no_grad():
            self.window.bias.copy_(torch.tensor([1.0, 1.0, 0.0, 0.0]))  # the whole image
        self.register_buffer("anchors", torch.tensor(_ANCHORS), persistent=False)

    def score(
        self, batch: RegionBatch, labels: LabelSet, truth: Tensor | None = None
    ) -> HeadOutput:
        """Score a batch, see `Head.score`. Nothing of the labels is read.

        The attribution of a label is how its best window weighs the regions.
        """
        scores, windows, weights = self._look(batch)
        image, best = scores.max(dim=1)
        steps = nn.functional.one_hot(best, scores.shape[1]).to(weights.dtype)  # (B, C, K)
        regions = (steps @ weights).transpose(1, 2)
        if truth is None:
            return HeadOutput(image, regions)
        loss = softmax_squared_loss(image, truth) + 0.1 * constraints(windows, self.anchors)
        return HeadOutput(image, regions, loss=loss)

    def _look(self, batch: RegionBatch) -> tuple[Tensor, Tensor, Tensor]:
        """What K windows see.

        Returns:
            scores (B, K, C), windows (B, K, 4) as (sx, sy, tx, ty), and the weights of regions
            (B, K, M).
        """
        features = self.dropout(self.inputs.features(batch.features))
        boxes = 2 * batch.boxes - 1
        seen = self.dropout(self.inputs.whole(batch.of_whole()))
        # Not len(seen), which the export to ONNX would take for a constant.
        zeros = seen.new_zeros(seen.shape[0], self.hidden_size)
        state = (zeros, zeros)
        steps: list[tuple[Tensor, Tensor, Tensor]] = []
        for _ in _ANCHORS:
            state = self.cell(apply(self.read, seen), state)
            window = apply(self.window, apply(self.after, state[0]).relu())
            weights = masked_softmax(affinity(window, boxes)[..., None], batch.mask)
            seen = (weights * features).sum(dim=1)
            steps.append((state[0], window, weights[..., 0]))
        last = self.cell(apply(self.read, seen), state)[0]
        hidden, windows, of_regions = (torch.stack(parts, 1) for parts in zip(*steps, strict=True))
        hidden = torch.cat([hidden[:, 1:], last[:, None]], dim=1)
        return apply(self.output, apply(self.after, hidden).relu()), windows, of_regions


def affinity(window: Tensor, boxes: Tensor) -> Tensor:
    """How well a window fits each box: 10 IoU, less the squared distance of their centres.

    Args:
        window: (B, 4), (sx, sy, tx, ty) in coordinates from -1 to 1; |s| is half of the size.
        boxes: (B, M, 4), xyxy in the same coordinates.

    Returns:
        (B, M).
    """
    half, centre = window[:, None, :2].abs(), window[:, None, 2:]
    low, high = boxes[..., :2], boxes[..., 2:]
    shared = _area((high.minimum(centre + half) - low.maximum(centre - half)).clamp(min=0))
    union = _area(high - low) + _area(2 * half) - shared
    distance = (centre - (low + high) / 2).square().sum(dim=-1)
    return _SHARPNESS * shared / union.clamp(min=1e-6) - distance


def _area(sides: Tensor) -> Tensor:
    """(..., 2) -> (...). The gradient of `prod` would look for zeros, and wait for the device."""
    return sides[..., 0] * sides[..., 1]


def constraints(windows: Tensor, anchors: Tensor) -> Tensor:
    """What windows cost that are too large, too small or far from their anchors, a mean over B.

    Args:
        windows: (B, K, 4), (sx, sy, tx, ty).
        anchors: (K, 2).
    """
    windows = at_least_float32(windows)
    size, centre = windows[..., :2], windows[..., 2:]
    large = (size.abs() - _LARGEST).clamp(min=0).square().sum()
    small = (_SMALLEST - size).clamp(min=0).sum()
    far = 0.5 * (centre - anchors).square().sum()
    return (large + 0.01 * far + 0.1 * small) / len(windows)
