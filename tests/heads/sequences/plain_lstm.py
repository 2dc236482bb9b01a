"""An LSTM, a linear layer and logarithms of probabilities, written for one vector at a time."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def linear(layer: nn.Linear, x: Tensor) -> Tensor:
    values = layer.weight @ x
    return values if layer.bias is None else values + layer.bias


def lstm(cell: nn.LSTMCell, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """One step for a vector x and the state (h, c)."""
    h, c = state
    size = len(h)
    gates = cell.weight_ih @ x + cell.bias_ih + cell.weight_hh @ h + cell.bias_hh
    enter, forget, new, leave = (gates[n * size : (n + 1) * size] for n in range(4))
    c = torch.sigmoid(forget) * c + torch.sigmoid(enter) * torch.tanh(new)
    return torch.sigmoid(leave) * torch.tanh(c), c


def log_probabilities(scores: Tensor) -> list[Tensor]:
    total = torch.log(sum((torch.exp(s) for s in scores), torch.zeros(())))
    return [s - total for s in scores]
