"""The gradients of a training step, on CUDA as one recorded graph of kernels.

On a GPU a step of these heads is a thousand small kernels, and launching them one by one takes
longer than they run. So the kernels of the first full batch are recorded as a CUDA graph
(https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs), and every batch of that size
replays them. The numbers are the same, dropout included.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pipeline.errors import InputError
from pipeline.heads.contract import Head, LabelSet
from pipeline.learning.batches import Batch
from pipeline.learning.distributed import Processes
from pipeline.learning.losses import compute_loss
from pipeline.settings import TrainSettings
from pipeline.settings.heads import HEADS

_WARM_UPS = 2
"""Steps before a recording, in which libraries choose their algorithms and allocate workspace."""


class Gradients:
    """Compute the loss of a batch and its gradients, which are left in the parameters.

    Nothing waits for an accelerator, except the recording and heads that are not `recordable`.

    Args:
        network: on the device of ``processes``.
        labels: what is known of the labels, on the same device.
        settings: precision and loss.
        processes: that share a step.
    """

    def __init__(
        self, network: Head, labels: LabelSet, settings: TrainSettings, processes: Processes
    ) -> None:
        self._network = network
        self._parallel = processes.parallel(network)
        self._labels = labels
        self._settings = settings
        self._processes = processes
        self._recorded: _Recorded | None = None

    def compute(self, batch: Batch, share: float) -> tuple[Tensor, Tensor]:
        """Compute the gradients of a batch.

        Args:
            batch: this process's images of the step.
            share: of the step's images that these are.

        Returns:
            The loss times ``share``, and the norm of the step's gradient: scalars.

        Raises:
            InputError: the head's step can't be recorded.
        """
        recorded = self._recorded
        if recorded is None and self._can_record(batch):
            recorded = self._recorded = self._record(batch)
        if recorded is not None and recorded.fits(batch):
            return recorded.replay(batch)
        return self._compute(batch, share)

    def _compute(self, batch: Batch, share: float) -> tuple[Tensor, Tensor]:
        instances, truth = batch
        half = self._settings.precision == "bfloat16"
        device = self._processes.device.type
        # A recorded graph could not refresh the weights that autocast keeps in bfloat16.
        with torch.autocast(device, torch.bfloat16, enabled=half, cache_enabled=device != "cuda"):
            output = self._parallel(instances, self._labels, truth)
        # This process's part of the mean over the step's images.
        loss = compute_loss(output, truth, self._labels.ratio, self._settings.loss) * share
        self._network.zero_grad()
        # The gradients are averaged over the processes, but their sum is needed.
        (loss * self._processes.count).backward()
        gradients = [p.grad for p in self._network.parameters() if p.grad is not None]
        return loss.detach(), nn.utils.get_total_norm(gradients)

    def _can_record(self, batch: Batch) -> bool:
        instances, _ = batch
        return (
            instances.mask.is_cuda
            and self._network.recordable
            and self._processes.count == 1
            and len(instances.mask) == self._settings.batch_size
        )

    def _record(self, batch: Batch) -> _Recorded:
        """Record the step of a batch, without taking random numbers from later steps.

        The batch is all of its step, since there is one process.
        """
        static = _copied(batch)
        random, stream = torch.cuda.get_rng_state(), torch.cuda.Stream()
        buffers = [(buffer, buffer.clone()) for buffer in self._network.buffers()]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                self._compute(static, 1.0)
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.set_rng_state(random)
        for buffer, before in buffers:
            buffer.copy_(before)
        self._network.zero_grad()
        graph = torch.cuda.CUDAGraph()
        try:
            # Another thread may pin the memory of the next batches meanwhile.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                loss, norm = self._compute(static, 1.0)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise InputError(
                f"The training step of {HEADS[self._settings.network.head].file} can't be recorded "
                f"as a CUDA graph: an operation in it waits for the GPU, or its result's size "
                f"depends on the data ({str(error).splitlines()[0]}).",
                "Replace the operation, such as `.item()`, `nonzero` or an index by a mask, or set "
                "`recordable = False` in the head's class.",
            ) from error
        return _Recorded(graph, static, loss, norm, self._network)


class _Recorded:
    """A recorded step: its graph, and the tensors that the graph reads and writes."""

    def __init__(
        self,
        graph: torch.cuda.CUDAGraph,
        batch: Batch,
        loss: Tensor,
        norm: Tensor,
        network: nn.Module,
    ) -> None:
        self._graph = graph
        self._batch = batch
        self._results = loss, norm
        self._gradients = [(one, one.grad) for one in network.parameters()]

    def fits(self, batch: Batch) -> bool:
        """Whether the batch has the recorded one's shapes."""
        found, recorded = ([x.shape for x in _tensors(one)] for one in (batch, self._batch))
        return found == recorded

    def replay(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Do to a batch what was done to the recorded one."""
        for static, tensor in zip(_tensors(self._batch), _tensors(batch), strict=True):
            static.copy_(tensor)
        # A batch of another size has left other gradients.
        for parameter, gradient in self._gradients:
            parameter.grad = gradient
        self._graph.replay()
        loss, norm = self._results
        return loss.clone(), norm.clone()


def _tensors(batch: Batch) -> list[Tensor]:
    instances, truth = batch
    return [*instances.tensors().values(), truth]


def _copied(batch: Batch) -> Batch:
    instances, truth = batch
    return instances.each(Tensor.clone), truth.clone()
