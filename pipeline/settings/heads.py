"""The heads that exist, and what their blocks of settings have in common.

A head turns the regions of an image into a score for each label (`pipeline.heads.contract`). Its
file in `pipeline/heads` holds the network, its settings, and the built-in variants that use it.
`HEADS` is the registry: to add a head, write its file and add a line here.

Heads are imported when their settings are first needed, since importing torch takes a second and
most commands do without it. The settings of `gm-mlic` and `max-pool`, which params.yaml ships with,
therefore have files of their own in this package.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field
from pydantic_core import PydanticCustomError

from pipeline.settings.blocks import Settings


class HeadSettings(Settings):
    """The settings that every head has. A head adds its own, with `head: Literal[...]`.

    Attributes:
        own_loss: whether the head computes its loss itself, so that no other one can be set.
        needs_whole: whether it reads the vector of the whole view.
        reads_conditional: whether it reads how labels occur together.
        decides: whether its scores say which labels an image has. If not, they only rank images and
            labels, and metrics of decisions, such as CF1, are not defined.
        ranks: whether its scores rank the images for a label. If not, AP is not defined.
    """

    own_loss: ClassVar[bool] = False
    decides: ClassVar[bool] = True
    ranks: ClassVar[bool] = True

    head: str

    @property
    def needs_whole(self) -> bool:
        return False

    @property
    def reads_conditional(self) -> bool:
        return False

    @property
    def scores_new_labels(self) -> bool:
        """Whether a trained head can score labels that it was not trained with, given only their
        vectors: no weight or statistic belongs to a label."""
        return False


class FeatureSettings(HeadSettings):
    """Settings of heads that read features."""

    least_deviation: float = Field(
        0.1,
        gt=0,
        description="Each feature component is divided by its standard deviation, or by this share "
        "of the root mean square of all standard deviations, whichever is larger. With 0.1, nearly "
        "all components vary equally; with 1, weak components stay weak.",
    )
    input_dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the features.")


class RegionSettings(FeatureSettings):
    """Settings of heads that read the features of regions."""

    whole_region: bool = Field(
        False,
        description="Read the whole view as one more region. It needs a cache that holds the "
        "vectors of whole views.",
    )

    @property
    def needs_whole(self) -> bool:
        return self.whole_region


@dataclass(frozen=True)
class Entry:
    """Where a head lives.

    Attributes:
        module: holds the network, the class `name`.
        name: of that class. Its settings are the class `<name>Settings`.
        variants: names of the built-in variants that `compare --heads all` trains.
        further: names of others, such as ablations and published settings.
        settings_module: holds the settings and the dict `VARIANTS`, which gives the train settings
            of each of these variants; None if ``module`` does.
    """

    module: str
    name: str
    variants: tuple[str, ...]
    further: tuple[str, ...] = ()
    settings_module: str | None = None

    @property
    def file(self) -> Path:
        """The file of the network, relative to the checkout."""
        return Path(*self.module.split(".")).with_suffix(".py")


_ABLATIONS = (
    "without-label-graph",
    "without-instance-graph",
    "without-matching-edges",
    "stateless-matching-edges",
)

HEADS: dict[str, Entry] = {
    "gm-mlic": Entry(
        "pipeline.heads.matching.network",
        "GmMlic",
        ("full",),
        _ABLATIONS,
        "pipeline.settings.gm_mlic",
    ),
    "max-pool": Entry(
        "pipeline.heads.pooling.max_pool",
        "MaxPool",
        ("max-pool",),
        settings_module="pipeline.settings.max_pool",
    ),
    "linear": Entry(
        "pipeline.heads.pooling.linear", "Linear", ("linear-whole", "linear-mean", "linear-max")
    ),
    "linear-scores": Entry(
        "pipeline.heads.pooling.linear_scores", "LinearScores", ("linear-scores",)
    ),
    "csra": Entry("pipeline.heads.pooling.csra", "Csra", ("csra",), ("csra-published",)),
    "hcp": Entry("pipeline.heads.pooling.hcp", "Hcp", ("hcp", "hcp-bce"), ("hcp-published",)),
    "wsddn": Entry("pipeline.heads.pooling.wsddn", "Wsddn", ("wsddn",), ("wsddn-published",)),
    "query2label": Entry(
        "pipeline.heads.attention.query2label",
        "Query2Label",
        ("query2label",),
        ("query2label-published",),
    ),
    "ml-decoder": Entry(
        "pipeline.heads.attention.ml_decoder",
        "MlDecoder",
        ("ml-decoder",),
        ("ml-decoder-published",),
    ),
    "srn": Entry("pipeline.heads.attention.srn", "Srn", ("srn",), ("srn-published",)),
    "ml-gcn": Entry(
        "pipeline.heads.label_graphs.ml_gcn",
        "MlGcn",
        ("ml-gcn", "ml-gcn-identity", "ml-gcn-regions"),
        ("ml-gcn-published",),
    ),
    "ssgrl": Entry(
        "pipeline.heads.label_graphs.ssgrl",
        "Ssgrl",
        ("ssgrl", "ssgrl-without-graph"),
        ("ssgrl-published",),
    ),
    "add-gcn": Entry(
        "pipeline.heads.label_graphs.add_gcn", "AddGcn", ("add-gcn",), ("add-gcn-published",)
    ),
    "cma": Entry("pipeline.heads.label_graphs.cma", "Cma", ("cma",), ("cma-published",)),
    "pla": Entry("pipeline.heads.sequences.pla", "Pla", ("pla",), ("pla-published",)),
    "cnn-rnn": Entry(
        "pipeline.heads.sequences.cnn_rnn", "CnnRnn", ("cnn-rnn",), ("cnn-rnn-published",)
    ),
    "rma-style": Entry(
        "pipeline.heads.sequences.rma_style", "RmaStyle", ("rma-style",), ("rma-style-published",)
    ),
}
"""The registry: name of a head, as in `network.head` -> where it lives."""

DEFAULT_HEAD = "gm-mlic"

RECIPE: dict[str, Any] = {
    "epochs": 20,
    "batch_size": 32,
    "optimizer": "adamw",
    "learning_rate": 0.001,
    "weight_decay": 0.01,
    "schedule": "cosine",
    "averaging": 0.99,
    "loss": {"name": "weighted", "beta": 0.0},
}
"""Train settings that suit most heads on 1,000 to 5,000 images. A head's variants start from them,
and change what docs/heads.md says was chosen for it."""


def variant_names() -> list[str]:
    """Names of all built-in variants, head by head."""
    return [name for entry in HEADS.values() for name in (*entry.variants, *entry.further)]


def head_variants() -> list[str]:
    """Names of the built-in variants that stand for the heads, without ablations and the like."""
    return [name for entry in HEADS.values() for name in entry.variants]


def head_of_variant(variant: str) -> str | None:
    """Name of the head that a built-in variant uses; None if there is no such variant."""
    for head, entry in HEADS.items():
        if variant in (*entry.variants, *entry.further):
            return head
    return None


def variant_changes(variant: str) -> Mapping[str, Any]:
    """The train settings that a built-in variant changes."""
    head = head_of_variant(variant)
    if head is None:
        raise KeyError(variant)
    changes: Mapping[str, Any] = _settings_module(head).VARIANTS[variant]
    return changes


def head_changes(head: str) -> Mapping[str, Any]:
    """The train settings that the head's first variant changes."""
    return variant_changes(HEADS[head].variants[0])


def settings_class(head: str) -> type[HeadSettings]:
    """The class that checks the settings of a head."""
    found: type[HeadSettings] = getattr(_settings_module(head), f"{HEADS[head].name}Settings")
    return found


def _settings_module(head: str) -> Any:
    entry = HEADS[head]
    return import_module(entry.settings_module or entry.module)


def head_settings(block: Any) -> Any:
    """Check a block `network` with the class of the head that it names.

    Raises:
        ValidationError, PydanticCustomError: the head is unknown, or a setting is.
    """
    if isinstance(block, HeadSettings) or not isinstance(block, Mapping):
        return block
    head = block.get("head", DEFAULT_HEAD)
    if not isinstance(head, str) or head not in HEADS:
        raise PydanticCustomError(
            "head", "unknown head {head!r}", {"head": head, "heads": ", ".join(HEADS)}
        )
    return settings_class(head).model_validate({**block, "head": head})
