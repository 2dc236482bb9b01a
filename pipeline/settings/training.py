"""The section `train`: how stage two trains."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, SerializeAsAny, field_validator, model_validator
from pydantic_core import PydanticCustomError

from pipeline.names import Name
from pipeline.settings.blocks import Settings
from pipeline.settings.decisions import DecisionSettings
from pipeline.settings.gm_mlic import GmMlicSettings
from pipeline.settings.heads import HeadSettings, head_settings


class WeightedLoss(Settings):
    """Cross-entropy, weighted by how frequent a label is: equation (15) of the paper."""

    name: Literal["weighted"] = "weighted"
    beta: float = Field(
        0.0,
        ge=0,
        le=1000,
        description="Class balance of equation (15). 0: plain cross-entropy.",
    )
    largest_positive_weight: float = Field(
        1.0,
        ge=1,
        le=1e6,
        description="Upper bound of the factor on the loss of a label's positives, which is its "
        "number of negative per positive training images; images that ignore the label count as "
        "negatives. 1: no factor.",
    )


class AsymmetricLoss(Settings):
    """The asymmetric loss (Ridnik et al., ICCV 2021), which lowers the weight of easy negatives."""

    name: Literal["asymmetric"]
    negative_gamma: float = Field(
        4.0, ge=0, le=100, description="Focusing of negatives: their loss is multiplied by p^gamma."
    )
    positive_gamma: float = Field(
        1.0,
        ge=0,
        le=100,
        description="Focusing of positives: their loss is multiplied by (1-p)^gamma.",
    )
    clip: float = Field(
        0.05,
        ge=0,
        lt=1,
        description="Probability that is subtracted from p of negatives; those below it carry no "
        "loss.",
    )


class FocalLoss(Settings):
    """The focal loss (Lin et al., ICCV 2017)."""

    name: Literal["focal"]
    gamma: float = Field(2.0, ge=0, le=100, description="Focusing: 0 gives the cross-entropy.")
    alpha: float | None = Field(
        None, gt=0, lt=1, description="Weight of positives; negatives get 1 - alpha. null: none."
    )


class SoftmaxSquaredLoss(Settings):
    """The squared loss of HCP: softmax of the scores against the normalised labels.

    Scores that are trained with it rank labels, but say nothing at a threshold.
    """

    name: Literal["softmax-squared"]


class OwnLoss(Settings):
    """The head's own loss, for heads that predict labels one after another."""

    name: Literal["own"]


Loss = WeightedLoss | AsymmetricLoss | FocalLoss | SoftmaxSquaredLoss | OwnLoss


class TrainSettings(Settings):
    """How stage two trains (section 4.2 of the paper)."""

    network: SerializeAsAny[HeadSettings] = Field(default_factory=GmMlicSettings)
    label_vectors: str = Field(
        "wordllama",
        description="`wordllama`: static embeddings that need no download. Otherwise a path: a "
        "GloVe text file (*.txt), a zip that holds one (*.zip), a text file in a zip "
        "(data/glove/glove.6B.zip/glove.6B.300d.txt), or an npz with the arrays `labels` and "
        "`vectors`.",
    )
    epochs: int = Field(60, ge=1, description="Passes over the images that are trained on.")
    batch_size: int = Field(32, ge=1, description="Images per step and process.")
    regions: int | None = Field(
        None,
        ge=1,
        description="Number of regions used per image, by descending score. null: all regions in "
        "the cache.",
    )
    precision: Literal["float32", "tf32", "bfloat16", "auto"] = Field(
        "float32",
        description="Precision of training. `bfloat16`: that of the forward pass; the loss is "
        "computed in float32. `tf32`: products of float32 matrices may round their factors to "
        "TF32's 10 bits; a processor without such units computes as in float32. `auto`: `bfloat16` "
        "on a GPU or CPU with units for it, else `float32`; the run's settings.yaml says which. "
        "Scores of trained runs are always computed in float32.",
    )
    optimizer: Literal["sgd", "adamw"] = Field(
        "sgd", description="Optimiser. The paper uses `sgd`."
    )
    learning_rate: float = Field(
        0.01, gt=0, le=1e30, description="Learning rate, before the schedule lowers it."
    )
    momentum: float = Field(0.9, ge=0, lt=1, description="Momentum of SGD.")
    weight_decay: float = Field(1e-4, ge=0, description="Weight decay.")
    schedule: Literal["step", "cosine", "constant", "one-cycle"] = Field(
        "step",
        description="`step`: divide the learning rate by 10 every `step_epochs` (as the paper). "
        "`cosine`: lower it to zero, epoch by epoch. `constant`: keep it. `one-cycle`: raise it to "
        "`learning_rate` during `warm_up`, then lower it to nearly zero, step by step.",
    )
    warm_up: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Share of all steps in which the learning rate rises: along a cosine from a "
        "25th of `learning_rate` under `one-cycle`, in a line from zero under the others.",
    )
    step_epochs: int = Field(30, ge=1, description="Epochs between two steps of schedule `step`.")
    averaging: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Decay of an exponential moving average of the weights over the steps; the "
        "average is then the result. 0: no averaging. 0.99 averages about the last 100 steps.",
    )
    clip_norm: float = Field(5.0, gt=0, description="Largest norm of the gradient of a step.")
    loss: Annotated[Loss, Field(discriminator="name")] = WeightedLoss()
    validation: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Share of the training split that is not trained on. The mAP on it is written "
        "to history.csv after each epoch, for tuning without the test split. A data set with a "
        "`val` split is validated on that, and keeps 0 here.",
    )
    training_share: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Share of the training images that are trained on, for learning curves: at "
        "least one image, drawn with the run's seed after the validation part was taken away. Of "
        "the same seed, the images of a smaller share are among those of a larger one. An epoch is "
        "a pass over the drawn images, so that a smaller share makes fewer steps.",
    )
    repeat_threshold: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Share of the training images below which a label is rare. An image with a "
        "rare label of share f is drawn sqrt(repeat_threshold / f) times as often as one without "
        "(LVIS, Gupta et al., CVPR 2019). Epochs keep their length, so some of them leave out "
        "images without a rare label. 0: an epoch draws each image once.",
    )
    selection: Literal["last", "best"] = Field(
        "last",
        description="Epoch whose weights are the result: the `last` one, or the one with the "
        "`best` mAP on the validation part or the `val` split.",
    )
    patience: int | None = Field(
        None,
        ge=1,
        description="Number of epochs without a better mAP on the validation part or the `val` "
        "split after which the training stops. null: it makes all `epochs`.",
    )
    decisions: DecisionSettings = DecisionSettings()
    variants: dict[Name, dict[str, object]] = Field(
        default_factory=dict,
        description="Settings above that a variant changes, e.g. "
        "`max-pool: {learning_rate: 0.003}`. A new name defines a new variant.",
    )

    @property
    def decides(self) -> bool:
        """Whether the scores say which labels an image has (`HeadSettings.decides`)."""
        return self.network.decides and not isinstance(self.loss, SoftmaxSquaredLoss)

    @property
    def ranks(self) -> bool:
        """Whether the scores rank the images for a label (`HeadSettings.ranks`)."""
        return self.network.ranks

    @field_validator("network", mode="before")
    @classmethod
    def _check_network(cls, block: Any) -> Any:
        return head_settings(block)

    @field_validator("loss", mode="before")
    @classmethod
    def _default_loss(cls, block: Any) -> Any:
        return {"name": "weighted", **block} if isinstance(block, dict) else block

    @model_validator(mode="after")
    def _check_own_loss(self) -> TrainSettings:
        own = isinstance(self.loss, OwnLoss)
        if own != self.network.own_loss:
            raise PydanticCustomError(
                "own_loss",
                "the head {head!r} and the loss {loss!r} do not belong together",
                {"head": self.network.head, "loss": self.loss.name},
            )
        return self

    @model_validator(mode="after")
    def _check_decisions(self) -> TrainSettings:
        decisions, head = self.decisions, self.network.head
        kinds, usual = (decisions.thresholds, decisions.calibration), DecisionSettings().precision
        if decisions.fitted and not self.ranks:
            problem = f"the head `{head}` gives sets of labels, whose scores have nothing to fit"
            remedy = "Set `decisions: {thresholds: fixed, calibration: none}` for it."
        elif not self.decides and kinds == ("fixed", "temperature"):
            problem = (
                f"with the head `{head}` and the loss `{self.loss.name}`, scores only rank the "
                "labels, so that with `thresholds: fixed` a temperature decides nothing"
            )
            remedy = "Set `thresholds: common` for it, or `calibration` to `platt` or `none`."
        elif decisions.precision != usual and decisions.thresholds != "precision":
            problem = (
                f"`precision` is {decisions.precision}, but only `thresholds: precision` reads it, "
                f"and `thresholds` is `{decisions.thresholds}`"
            )
            remedy = f"Set `thresholds: precision`, or `precision: {usual}`, the default."
        else:
            return self
        raise PydanticCustomError("decisions", "{problem}", {"problem": problem, "remedy": remedy})
