"""The two networks of `benchmarks.matching`: their inputs, and whether they are equal.

Letters: B images, M instances, C labels, L neighbours of a label, W label vector size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from pipeline.heads.contract import HeadSizes, LabelSet, RegionBatch
from pipeline.heads.inputs import InputStatistics
from pipeline.heads.matching.network import GmMlic
from pipeline.learning.losses import matching_loss
from pipeline.settings import GmMlicSettings


@dataclass(frozen=True)
class Size:
    """Sizes of a batch and a network; ``label_neighbors`` None is the complete label graph."""

    images: int
    instances: int
    labels: int
    label_neighbors: int | None = None
    feature_size: int = 1024
    vector_size: int = 300
    latent_size: int = 512

    def settings(self) -> GmMlicSettings:
        return GmMlicSettings(latent_size=self.latent_size, label_neighbors=self.label_neighbors)


TINY = Size(2, 3, 4, feature_size=8, vector_size=8, latent_size=16)
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Inputs:
    """A batch, its truth (B, C), and what is known of the labels."""

    batch: RegionBatch
    labels: LabelSet
    truth: Tensor

    def to(self, device: torch.device) -> Inputs:
        """Copy everything to a device."""
        batch = self.batch.each(lambda x: x.to(device))
        return Inputs(batch, self.labels.to(device), self.truth.to(device))


def make_inputs(size: Size, dtype: torch.dtype = torch.float32, padding: int = 0) -> Inputs:
    """Make random inputs; the last image has as many instances of padding as are asked for."""
    generator = torch.Generator().manual_seed(0)
    images, instances, labels = size.images, size.instances, size.labels

    def rand(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=dtype)

    mask = torch.ones(images, instances, dtype=torch.bool)
    mask[-1, instances - padding :] = False
    corners = rand(images, instances, 2, 2).sort(dim=2).values
    features = torch.randn((images, instances, size.feature_size), generator=generator, dtype=dtype)
    batch = RegionBatch(
        features * mask[..., None],
        corners.reshape(images, instances, 4) * mask[..., None],
        rand(images, instances) * mask,
        torch.zeros(images, instances, dtype=torch.int64),
        mask,
    )
    vectors = torch.randn((labels, size.vector_size), generator=generator, dtype=dtype)
    truth = (rand(images, labels) < 0.1).to(dtype)
    return Inputs(batch, LabelSet(vectors, torch.full((labels,), 0.1, dtype=dtype)), truth)


@dataclass
class Side:
    """One of the two networks, and a function that gives its (B, C) logits of the images.

    Attributes:
        network, scores, inputs: these, all on one device.
        half: whether the scores are computed under autocast to bfloat16, as in a training.
    """

    network: nn.Module
    scores: Callable[[], Tensor]
    inputs: Inputs
    half: bool = False

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.SGD(self.network.parameters(), lr=1e-4, momentum=0.9)

    def logits(self) -> Tensor:
        """Compute the scores in the precision that `half` asks for."""
        with torch.autocast(self.inputs.truth.device.type, torch.bfloat16, enabled=self.half):
            scores = self.scores()
        return scores.float() if self.half else scores

    def loss(self) -> Tensor:
        ratio = self.inputs.labels.ratio
        return matching_loss(self.logits(), self.inputs.truth, ratio, beta=0.4)

    @torch.no_grad()
    def forward(self) -> None:
        self.logits()

    def train(self) -> None:
        self.optimizer.zero_grad()
        self.loss().backward()
        self.optimizer.step()


def our_side(
    size: Size,
    inputs: Inputs,
    settings: GmMlicSettings | None = None,
    device: torch.device = CPU,
) -> Side:
    """Make `GmMlic` on a device, with the statistics of the inputs."""
    torch.manual_seed(0)
    sizes = HeadSizes(size.feature_size, size.labels, size.vector_size, classes=1)
    network = GmMlic(sizes, settings or size.settings())
    network.to(inputs.labels.vectors.dtype)
    features = inputs.batch.features[inputs.batch.mask]
    boxes = inputs.batch.boxes[inputs.batch.mask]
    statistics = InputStatistics(
        features.mean(0),
        features.std(0),
        boxes.mean(0),
        boxes.std(0),
        whole_mean=None,
        whole_std=None,
        classes=1,
    )
    network.start(statistics, inputs.labels)
    network.to(device)
    inputs = inputs.to(device)
    return Side(network, lambda: network(inputs.batch, inputs.labels).image, inputs)


def their_side(
    size: Size,
    inputs: Inputs,
    settings: GmMlicSettings | None = None,
    device: torch.device = CPU,
) -> Side:
    """Make PyTorch Geometric's network on a device, with parameters of its own."""
    # Here, since `benchmarks.gpu` measures our network where the package is not installed.
    from benchmarks.networks.geometric import GraphNetwork, graph_image_logits, make_graph

    settings = settings or size.settings()
    network = GraphNetwork(size.feature_size, size.vector_size, settings)
    network.to(device, inputs.labels.vectors.dtype)
    graph = make_graph(inputs.batch, inputs.labels.vectors, settings).to(device)
    return Side(network, lambda: graph_image_logits(network(graph), graph), inputs.to(device))


def largest_differences(
    size: Size, dtype: torch.dtype, settings: GmMlicSettings | None = None, padding: int = 0
) -> tuple[float, float]:
    """Measure the largest difference of the networks' scores, and of any parameter's gradients.

    They are relative to the largest score, and to the parameter's largest gradient.
    """
    inputs = make_inputs(size, dtype, padding)
    ours, theirs = our_side(size, inputs, settings), their_side(size, inputs, settings)
    theirs.network.load_state_dict(ours.network.state_dict())

    def relative(actual: Tensor, expected: Tensor) -> float:
        scale = expected.abs().max()
        difference = (actual - expected).abs().max()
        return float(difference / scale if scale else difference)

    scores = relative(ours.scores().detach(), theirs.scores().detach())
    for side in (ours, theirs):
        side.loss().backward()
    expected = dict(theirs.network.named_parameters())
    gradients = 0.0
    for name, parameter in ours.network.named_parameters():
        if (parameter.grad is None) != (expected[name].grad is None):
            raise SystemExit(f"only one of the networks has a gradient for {name}")
        if parameter.grad is not None:
            gradients = max(gradients, relative(parameter.grad, expected[name].grad))
    return scores, gradients


SCORES_LIMIT = {torch.float32: 1e-4, torch.float64: 1e-9}
GRADIENTS_LIMIT = 1e-9
"""In float64. In float32 two regions may tie for an image's max, and either gets the gradient."""


HALF_LIMIT = 0.05
"""Of the difference of scores in bfloat16, which has 8 significant bits, from those in float32."""


def require_close(sides: Iterable[Side]) -> None:
    """Stop unless each network's scores in bfloat16 are near its scores in float32."""
    for side in sides:
        with torch.no_grad():
            exact, half = side.scores(), replace(side, half=True).logits()
        difference = float((half - exact).abs().max() / exact.abs().max())
        print(f"scores in bfloat16 differ by {difference:.1e} from those in float32", flush=True)
        if not difference <= HALF_LIMIT:
            raise SystemExit("bfloat16 is not close to float32; nothing was timed in it")


def require_equal(size: Size) -> None:
    """Stop unless both networks compute the same scores and gradients."""
    for dtype, limit in SCORES_LIMIT.items():
        scores, gradients = largest_differences(size, dtype, padding=size.instances // 3)
        line = f"M = {size.instances}, C = {size.labels}, {str(dtype).removeprefix('torch.')}: "
        line += f"scores differ by {scores:.1e}"
        if dtype is torch.float64:
            line += f", gradients by {gradients:.1e}"
        print(line, flush=True)
        if scores > limit or (dtype is torch.float64 and gradients > GRADIENTS_LIMIT):
            raise SystemExit("the networks are not equal; nothing was timed")
