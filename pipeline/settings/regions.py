"""The sections `detector` and `extract`: what finds the regions, and which are kept."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipeline.settings.blocks import Settings

Side = Annotated[int, Field(ge=1)]
Precision = Literal["float32", "tf32", "bfloat16", "float16"]
"""In which a detector computes features."""


class ArchitectureSettings(Settings):
    """A ResNet50-FPN Faster R-CNN, by default torchvision's `fasterrcnn_resnet50_fpn`."""

    width_per_group: int = Field(64, ge=1, description="Width of the bottlenecks in ResNet.")
    fpn_channels: int = Field(256, ge=1, description="Channels of each pyramid level.")
    feature_size: int = Field(1024, ge=1, description="Size d of the box head's vector.")
    anchor_sizes: tuple[Side, Side, Side, Side, Side] = Field(
        (32, 64, 128, 256, 512), description="Anchor side for each pyramid level, in pixels."
    )
    proposals: int = Field(
        1000,
        ge=1,
        description="Proposals that are kept: per level before the RPN's NMS, and in all after it.",
    )
    norm: Literal["frozen", "batch"] = Field(
        "frozen",
        description="`frozen`: FrozenBatchNorm2d with eps 0, as in torchvision's COCO weights. "
        "`batch`: BatchNorm2d, for a network that is fitted from scratch.",
    )


class FitSettings(Settings):
    """How a detector is fitted to the boxes of the data set's training split."""

    size: int = Field(
        448, ge=32, le=8192, multiple_of=32, description="Side of the square view, in pixels."
    )
    steps: int = Field(400, ge=1, description="Number of optimiser steps.")
    batch_size: int = Field(8, ge=1, description="Images per step.")
    sampled_proposals: int = Field(
        512,
        ge=4,
        description="Proposals per image that the box head learns from (torchvision: 512).",
    )
    learning_rate: float = Field(1e-3, gt=0, description="Peak rate of AdamW's one-cycle schedule.")
    weight_decay: float = Field(1e-4, ge=0, le=1000, description="AdamW's weight decay.")
    holdout: float = Field(
        0.1, gt=0, lt=1, description="Share of the training split held out to measure recall."
    )
    seed: int = Field(
        0, ge=0, description="Seed of the initial weights, the holdout and the batches."
    )


class DetectorSettings(Settings):
    """The detector that finds the regions."""

    source: Literal["torchvision", "file", "fit", "imported"] = Field(
        description="`torchvision`: its COCO weights. `file`: the file `weights`. `fit`: fitted to "
        "the data set's own boxes, from scratch or from `weights`. `imported`: no detector; the "
        "regions were made elsewhere, and `gmpipe import-regions` imports them."
    )
    weights: str | None = Field(
        None,
        description="A state dict saved with torch.save. Required for `file`, optional for `fit`.",
    )
    architecture: ArchitectureSettings = ArchitectureSettings()
    fit: FitSettings | None = Field(None, description="Block for source `fit`, described below.")

    @model_validator(mode="after")
    def _check_source(self) -> DetectorSettings:
        if self.source == "file" and self.weights is None:
            raise ValueError("source `file` requires `weights`, the path of a state dict")
        if (self.source == "fit") != (self.fit is not None):
            raise ValueError("source `fit` requires the block `fit`, and no other source takes it")
        if self.source in ("torchvision", "imported") and (
            self.weights is not None
            or self.architecture != ArchitectureSettings(proposals=self.architecture.proposals)
        ):
            raise ValueError(
                f"source `{self.source}` takes neither `weights` nor `architecture`, except for "
                "`architecture.proposals`"
            )
        return self


class ExtractSettings(Settings):
    """The regions that stage one stores. All settings but the last four decide the features."""

    size: int = Field(448, ge=32, multiple_of=32, description="Side of the square view, in pixels.")
    regions: int = Field(
        10, ge=1, le=10_000, description="m: regions kept per image, by descending score."
    )
    score_threshold: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Lowest detection score. 0 keeps m regions of every image in which the "
        "detector finds any.",
    )
    nms_threshold: float = Field(0.5, gt=0, le=1, description="IoU of the per-class NMS.")
    boxes: Literal["detector", "annotations", "file"] = Field(
        "detector",
        description="Where the regions are. `detector`: where it finds them. `annotations`: at the "
        "data set's own boxes, the largest first. `file`: at the boxes of `boxes_file`.",
    )
    boxes_file: str | None = Field(
        None,
        description="An npz or a Parquet file of boxes, relative to data/DATASET/. Required for "
        "`file`.",
    )
    views: int = Field(
        1, ge=1, description="Views per training image: the plain one and views-1 random crops."
    )
    flip: bool = Field(True, description="Mirror half of the random crops.")
    seed: int = Field(0, ge=0, description="Seed of the random crops.")
    precision: Precision = Field(
        "float32",
        description="Number format in which the detector's convolutions and box head compute. "
        "Boxes and scores are float32 in any case. `tf32` differs from `float32` on GPUs only.",
    )
    feature_dtype: Literal["float16", "float32"] = Field(
        "float16", description="Type of the stored features."
    )
    whole: bool = Field(
        True,
        description="Store the vector of the whole view, too, which some heads need. An import "
        "stores it where its file has it.",
    )
    hash_images: bool = Field(
        True,
        description="Identify images by their content in the cache's fingerprint. If false, by "
        "their file size, which is faster.",
    )
    rows_per_shard: int = Field(512, ge=1, description="Largest number of rows in a shard.")
    batch_size: int = Field(8, ge=1, description="Images that the detector processes at once.")
    max_failures: int = Field(
        0,
        ge=0,
        description="Number of images without regions that are tolerated. Such an image can't be "
        "decoded, or has no regions in an import.",
    )

    @model_validator(mode="after")
    def _check_boxes(self) -> ExtractSettings:
        if (self.boxes == "file") != (self.boxes_file is not None):
            raise ValueError(
                "boxes `file` requires `boxes_file`, the path of an npz or a Parquet file, and no "
                "other value of `boxes` takes it"
            )
        for name in ("score_threshold", "nms_threshold"):
            default = type(self).model_fields[name].default
            if self.boxes != "detector" and getattr(self, name) != default:
                raise ValueError(
                    f"boxes `{self.boxes}` does not read `{name}`, since no detector chooses among "
                    f"the boxes; remove it, or set it to its default, {default}"
                )
        return self
