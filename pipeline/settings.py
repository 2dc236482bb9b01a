"""Every setting of params.yaml: its type, bounds, default and meaning.

One class a section of params.yaml; a section holds one such block per data set. Importing this
module imports nothing heavy, so that a mistake in params.yaml is found before anything runs.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

VARIANTS: dict[str, dict[str, object]] = {
    "full": {},
    "without-label-graph": {"network": {"label_graph": False}},
    "without-instance-graph": {"network": {"instance_graph": False}},
    "without-matching-edges": {"network": {"matching_edges": False}},
    "max-pool": {"network": {"architecture": "max-pool"}},
}
"""The variants that every data set has, and what each changes of its train settings. `full` is the
paper's network, the three `without-` its ablations (Table 4); `max-pool` is the baseline without
any graph: an MLP on each region's feature and box, max over regions."""

VariantName = Annotated[str, Field(pattern=r"^[a-z0-9]+([.-][a-z0-9]+)*$")]


Side = Annotated[int, Field(ge=1)]


class _Settings(BaseModel):
    """Immutable; an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ScenesSettings(_Settings):
    """`prepare` draws the demo's scenes."""

    source: Literal["scenes"]
    train: int = Field(1000, ge=10, description="training scenes to draw")
    test: int = Field(500, ge=1, description="test scenes to draw")
    size: int = Field(128, ge=64, description="side of a drawn scene, in pixels")
    seed: int = Field(0, ge=0, description="seed of the drawing")


class _ListedSettings(_Settings):
    """What data sets of files have in common; all paths are relative to data/<dataset>/."""

    drop_missing: bool = Field(
        False, description="leave out images whose file is missing; if false, they are an error"
    )
    drop_unlabelled: bool = Field(
        False, description="leave out images without any positive or ignored label"
    )


class VocSettings(_ListedSettings):
    """PASCAL VOC 2007 as its devkit lays it out: trainval trains, test tests."""

    source: Literal["voc"]
    folder: str = Field("VOCdevkit/VOC2007", description="the folder that holds ImageSets")
    labels: Literal["annotations", "lists"] = Field(
        "annotations",
        description="where labels are read: `annotations`, the XML files, which also give boxes; "
        "`lists`, ImageSets/Main/<class>_<split>.txt",
    )
    vocabulary: list[str] | None = Field(
        None,
        min_length=1,
        description="the classes, in their order, of photographs of your own that are laid out "
        "alike; null: VOC's 20",
    )


class CocoSettings(_ListedSettings):
    """MS-COCO as its publisher lays it out: annotations/instances_<split>.json beside <split>/."""

    source: Literal["coco"]
    train: str = Field("train2014", description="the split that trains")
    test: str = Field("val2014", description="the split that tests")


class NuswideSettings(_ListedSettings):
    """NUS-WIDE, in one of the forms that are around."""

    source: Literal["nuswide"]
    form: Literal["official", "csv", "multi-hot"] = Field(
        "official",
        description="`official`: ImageList/, Groundtruth/ and Concepts81.txt; `csv`: one file "
        "with file name, label list and split; `multi-hot`: two lists of path and 81 times 0 or 1",
    )
    images: str = Field("Flickr", description="folder that the lists' paths are relative to")
    concepts: str = Field("Concepts81.txt", description="the 81 concepts, in order")
    file: str = Field(
        "nus_wid_data.csv", description="for `csv`: columns `filepath`, `label`, `split_name`"
    )
    train_list: str = Field("database.txt", description="for `multi-hot`; may end in .gz")
    test_list: str = Field("test.txt", description="for `multi-hot`; may end in .gz")
    split_name: str | None = Field(
        None, description="how the split is called in results; null: after the form"
    )


class TableSettings(_ListedSettings):
    """Any data set, from a CSV or Parquet file with a row an image."""

    source: Literal["table"]
    file: str = Field("labels.csv", description="the table, .csv or .parquet")
    images: str = Field(
        ".",
        description="folder that the table's paths are relative to; `.`: data/<dataset>/ itself",
    )
    image: str = Field("image", description="column of the image's path")
    labels: str = Field("labels", description="column of its labels")
    split: str = Field("split", description="column that says `train` or `test`")
    test_share: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="for a table without the column `split`: about this share of the images tests, "
        "chosen by a hash of each path, so that an image stays on its side when others come or go",
    )
    separator: str = Field(";", min_length=1, description="between labels, unless they are a list")
    vocabulary: list[str] | None = Field(
        None, description="the labels in their order; null: those in the table, sorted"
    )
    split_name: str = Field("own", description="how the split is called in results")


class ImportedSettings(_Settings):
    """The manifest came with regions: `gmpipe import-regions` wrote it."""

    source: Literal["imported"]


ListedSettings = VocSettings | CocoSettings | NuswideSettings | TableSettings
PrepareSettings = ScenesSettings | ListedSettings | ImportedSettings


class ArchitectureSettings(_Settings):
    """A ResNet50-FPN Faster R-CNN; the defaults are torchvision's `fasterrcnn_resnet50_fpn`."""

    width_per_group: int = Field(64, ge=1, description="width of ResNet's bottlenecks")
    fpn_channels: int = Field(256, ge=1, description="channels of every pyramid level")
    feature_size: int = Field(1024, ge=1, description="size d of the box head's vector")
    anchor_sizes: tuple[Side, Side, Side, Side, Side] = Field(
        (32, 64, 128, 256, 512), description="anchor side per pyramid level, in pixels"
    )
    proposals: int = Field(
        1000, ge=1, description="proposals kept, per level before the RPN's NMS and of all after it"
    )
    norm: Literal["frozen", "batch"] = Field(
        "frozen",
        description="`frozen`: FrozenBatchNorm2d with eps 0, as in torchvision's COCO weights; "
        "`batch`: BatchNorm2d, for a network that is fitted from scratch",
    )


class FitSettings(_Settings):
    """How a detector is fitted on the boxes of the data set's training split."""

    size: int = Field(448, ge=32, multiple_of=32, description="side of the square view, in pixels")
    steps: int = Field(400, ge=1, description="optimiser steps")
    batch_size: int = Field(8, ge=1, description="images a step")
    sampled_proposals: int = Field(
        512, ge=4, description="proposals an image that the box head learns from (torchvision: 512)"
    )
    learning_rate: float = Field(1e-3, gt=0, description="peak rate of AdamW's one-cycle schedule")
    weight_decay: float = Field(1e-4, ge=0, description="AdamW's weight decay")
    holdout: float = Field(
        0.1, gt=0, lt=1, description="share of the training split held out to measure recall"
    )
    seed: int = Field(0, ge=0, description="seed of initial weights, holdout and batches")


class DetectorSettings(_Settings):
    """Which detector finds the regions."""

    source: Literal["torchvision", "file", "fit", "imported"] = Field(
        description="`torchvision`: its COCO weights; `file`: `weights`; `fit`: fitted on the data "
        "set's own boxes, from scratch or from `weights`; `imported`: none, the regions were made "
        "elsewhere and `gmpipe import-regions` brings them"
    )
    weights: str | None = Field(
        None, description="a state dict saved by torch.save, for `file` and, optionally, `fit`"
    )
    architecture: ArchitectureSettings = ArchitectureSettings()
    fit: FitSettings | None = Field(None, description="for `fit` only")

    @model_validator(mode="after")
    def _check_source(self) -> DetectorSettings:
        if self.source == "file" and self.weights is None:
            raise ValueError("source `file` needs `weights`, the path of a state dict")
        if (self.source == "fit") != (self.fit is not None):
            raise ValueError("the block `fit` goes with source `fit`, and only with it")
        if self.source in ("torchvision", "imported") and (
            self.weights is not None
            or self.architecture != ArchitectureSettings(proposals=self.architecture.proposals)
        ):
            raise ValueError(f"source `{self.source}` takes neither `weights` nor an architecture")
        return self


class ExtractSettings(_Settings):
    """Which regions stage one stores. All but the last four decide the features."""

    size: int = Field(448, ge=32, multiple_of=32, description="side of the square view, in pixels")
    regions: int = Field(10, ge=1, description="m: regions kept of an image, best scores first")
    score_threshold: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="least detection score; 0 keeps m regions wherever any is found",
    )
    nms_threshold: float = Field(0.5, gt=0, le=1, description="IoU of the per-class NMS")
    views: int = Field(
        1, ge=1, description="views a training image: the plain one and views-1 random crops"
    )
    flip: bool = Field(True, description="whether the random crops are mirrored half of the time")
    seed: int = Field(0, ge=0, description="seed of the random crops")
    feature_dtype: Literal["float16", "float32"] = Field("float16", description="as stored")
    hash_images: bool = Field(
        True, description="fingerprint images by content; if false, by file size (faster)"
    )
    rows_per_shard: int = Field(512, ge=1, description="rows a shard holds at most")
    batch_size: int = Field(8, ge=1, description="images the detector takes at once")
    max_failures: int = Field(
        0,
        ge=0,
        description="images that may be without regions, since they can't be decoded or an import "
        "has none of them, before that is an error",
    )


class NetworkSettings(_Settings):
    """The matching network (section 3.3 of the paper), or its baseline."""

    architecture: Literal["matching", "max-pool"] = Field(
        "matching",
        description="`matching`: the paper's; `max-pool`: an MLP on each region's feature and box, "
        "max over regions, which reads `latent_size` and the dropouts only",
    )
    instance_graph: bool = Field(True, description="edges between instances, equation (1)")
    label_graph: bool = Field(True, description="edges between labels, equation (2)")
    matching_edges: bool = Field(
        True,
        description="edges between instances and labels, equation (3); without them the decoder "
        "reads the two nodes",
    )
    latent_size: int = Field(
        512,
        ge=2,
        multiple_of=2,
        description="H: size of encoded nodes and edges; the last "
        "convolution module halves it, as the paper's [512, 256] does",
    )
    modules: int = Field(2, ge=1, description="k: graph convolution modules")
    neighbors: int = Field(5, ge=1, description="K: nearest instances an instance gathers from")
    label_neighbors: int | None = Field(
        None, ge=1, description="labels a label gathers from, by cosine; null: from all others"
    )
    node_norm: bool = Field(
        True, description="LayerNorm on encoded and updated nodes (ours; the paper has none)"
    )
    least_deviation: float = Field(
        0.1,
        gt=0,
        description="a feature component is divided by its standard deviation, or by this share of "
        "the root mean square of all, whichever is more: 0.1 makes nearly all vary alike, 1 leaves "
        "weak components weak",
    )
    input_dropout: float = Field(0.0, ge=0, lt=1, description="dropout on region features")
    dropout: float = Field(
        0.0, ge=0, lt=1, description="dropout on encoded and updated nodes of instances"
    )
    decoder_dropout: float = Field(
        0.0, ge=0, lt=1, description="dropout on the decoder's hidden state"
    )
    direct_size: int | None = Field(
        None,
        ge=1,
        description="hidden size of a direct term: what an MLP makes of a region's feature and box "
        "for each label, which the matching edges' logits are added to; null: none, as in the "
        "paper",
    )
    direct_dropout: float = Field(
        0.5, ge=0, lt=1, description="dropout on the direct term's hidden state"
    )


class TrainSettings(_Settings):
    """How stage two trains (section 4.2 of the paper)."""

    network: NetworkSettings = NetworkSettings()
    label_vectors: str = Field(
        "wordllama",
        description="`wordllama` (static embeddings that need no download), or a path: GloVe's "
        "text (*.txt), a zip with it (*.zip), a text in a zip "
        "(data/glove/glove.6B.zip/glove.6B.300d.txt), or an npz with arrays `labels` and `vectors`",
    )
    epochs: int = Field(60, ge=1, description="passes over the training split")
    batch_size: int = Field(32, ge=1, description="images a step, of each process")
    regions: int | None = Field(
        None,
        ge=1,
        description="the best regions of an image that are used; null: all that the cache holds",
    )
    precision: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="of the forward pass in training; the loss, and all scores, are in float32",
    )
    optimizer: Literal["sgd", "adamw"] = Field("sgd", description="sgd is the paper's")
    learning_rate: float = Field(0.01, gt=0, description="initial learning rate")
    momentum: float = Field(0.9, ge=0, lt=1, description="SGD's momentum")
    weight_decay: float = Field(1e-4, ge=0, description="weight decay")
    schedule: Literal["step", "cosine", "constant"] = Field(
        "step", description="`step`: a tenth every `step_epochs` (the paper's); `cosine`: to zero"
    )
    step_epochs: int = Field(30, ge=1, description="epochs between two steps of schedule `step`")
    averaging: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="decay of an exponential moving average of the weights over the steps, which "
        "is then the result; 0: none. 0.99 is the mean of about the last 100 steps",
    )
    clip_norm: float = Field(5.0, gt=0, description="largest norm of a step's gradient")
    beta: float = Field(0.0, ge=0, description="class balance of the loss, equation (15)")
    validation: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of the training split kept out of training, on which "
        "mAP is written to history.csv each epoch; for tuning without the test split",
    )
    selection: Literal["last", "best"] = Field(
        "last",
        description="the epoch whose weights are the result: the `last`, or the one with the "
        "`best` mAP on the `validation` part",
    )
    variants: dict[VariantName, dict[str, object]] = Field(
        default_factory=dict,
        description="what a variant changes of the settings above, e.g. "
        "`max-pool: {learning_rate: 0.003}`; a name of your own makes a variant of its own",
    )

    @model_validator(mode="after")
    def _check_selection(self) -> TrainSettings:
        if self.selection == "best" and not self.validation:
            raise ValueError("selection `best` needs `validation` above 0, e.g. 0.1")
        return self


SECTIONS = ("prepare", "detector", "extract", "train")
"""The sections of params.yaml; each holds one block per data set."""


class Params(_Settings):
    """All of params.yaml."""

    datasets: list[str] = Field(
        min_length=1,
        description="the data sets that `dvc repro` runs; the first is the default of `--dataset`",
    )
    variants: list[VariantName] = Field(
        min_length=1, description="the variants that `dvc repro` trains on each data set"
    )
    seeds: list[Annotated[int, Field(ge=0)]] = Field(
        min_length=1,
        description="the seeds that `dvc repro` trains each variant with; the first is the default "
        "of `--seed`",
    )
    prepare: dict[str, Annotated[PrepareSettings, Field(discriminator="source")]]
    detector: dict[str, DetectorSettings]
    extract: dict[str, ExtractSettings]
    train: dict[str, TrainSettings]

    @field_validator("datasets", "variants", "seeds")
    @classmethod
    def _check_unique(cls, names: list[Any]) -> list[Any]:
        # DVC expands stages over these lists: a repeated name would define the same stage twice.
        if len(set(names)) != len(names):
            raise ValueError("expected each entry once")
        return names
