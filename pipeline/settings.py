"""Every setting of params.yaml: its type, bounds, default and meaning.

`Params` is the whole file. Each of its sections holds one block per data set, and each kind of
block is a class here. The descriptions are the text of docs/settings.md.

Importing this module imports nothing heavy, so that a mistake in params.yaml is found before
anything runs.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)

from pipeline.names import Name, check_columns, check_splits

VARIANTS: dict[str, dict[str, object]] = {
    "full": {},
    "without-label-graph": {"network": {"label_graph": False}},
    "without-instance-graph": {"network": {"instance_graph": False}},
    "without-matching-edges": {"network": {"matching_edges": False}},
    "max-pool": {"network": {"architecture": "max-pool"}},
}
"""The variants that every data set has, and which train settings each changes. `full` is the
paper's network, and the three `without-` are its ablations (Table 4). `max-pool` is the baseline
without any graph: an MLP on each region's feature and box, then the maximum over the regions."""

Side = Annotated[int, Field(ge=1)]


class _Settings(BaseModel):
    """A block of settings. It is immutable, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ScenesSettings(_Settings):
    """The scenes of the demo, which `prepare` draws."""

    source: Literal["scenes"]
    train: int = Field(1000, ge=10, description="Number of training scenes to draw.")
    test: int = Field(500, ge=1, description="Number of test scenes to draw.")
    size: int = Field(128, ge=64, description="Side of a scene, in pixels.")
    seed: int = Field(0, ge=0, description="Seed of the drawing.")


class _ListedSettings(_Settings):
    """What data sets of files have in common. All paths are relative to data/<dataset>/."""

    drop_missing: bool = Field(
        False,
        description="Leave out images whose file is missing. If false, a missing file is an error.",
    )
    drop_unlabelled: bool = Field(
        False, description="Leave out images without any positive or ignored label."
    )


BoxFrame = Literal["auto", "upright", "stored"]


class _BoxedSettings(_ListedSettings):
    """What data sets with boxes have in common."""

    train: str
    test: str
    val: str | None = Field(
        None,
        description="Name of the split that validates each training, as for `train` and `test`. "
        "null: none.",
    )
    box_frame: BoxFrame = Field(
        "auto",
        description="The picture that boxes were drawn on, if an EXIF orientation turns it: "
        "`upright`, as viewers show it, or `stored`, as it was before turning. `auto`: the listed "
        "sizes decide, and boxes for which they can't are left out with a note.",
    )

    test_share: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="If only `train` is a split of the files: share of its images to test on, "
        "approximately. A hash of the path decides, as for tables.",
    )

    @model_validator(mode="after")
    def _check_splits(self) -> _BoxedSettings:
        named = self.test not in (type(self).model_fields["test"].default, self.train)
        check_splits(self.train, self.val, self.test, self.test_share is not None, named)
        return self

    @property
    def splits(self) -> dict[Literal["train", "val", "test"], str]:
        """Each split -> its name in the data set's files, in the manifest's order."""
        if self.test_share is not None:
            return {"train": self.train}
        if self.val is None:
            return {"train": self.train, "test": self.test}
        return {"train": self.train, "val": self.val, "test": self.test}


class VocSettings(_BoxedSettings):
    """PASCAL VOC 2007 in the folders of its devkit: `trainval` is trained on, `test` tested on."""

    source: Literal["voc"]
    folder: str = Field("VOCdevkit/VOC2007", description="Folder that holds ImageSets.")
    train: str = Field(
        "trainval", description="List of the training split, ImageSets/Main/<train>.txt."
    )
    test: str = Field("test", description="List of the test split, ImageSets/Main/<test>.txt.")
    labels: Literal["annotations", "lists"] = Field(
        "annotations",
        description="Where labels are read from. `annotations`: the XML files, which also give "
        "boxes. `lists`: ImageSets/Main/<class>_<split>.txt.",
    )
    vocabulary: list[str] | None = Field(
        None,
        min_length=1,
        max_length=2**15,
        description="The classes, in order, of your own photographs in the same folders. null: "
        "VOC's 20 classes.",
    )


class CocoSettings(_BoxedSettings):
    """MS-COCO in its publisher's folders: annotations/instances_<split>.json beside <split>/."""

    source: Literal["coco"]
    train: str = Field("train2014", description="Split to train on. `train2014` is the paper's.")
    test: str = Field(
        "val2014",
        description="Split to test on. `val2014` is the paper's, but torchvision's detector was "
        "trained on 35,504 of its 40,504 images; it has not seen those of `val2017`.",
    )


class NuswideSettings(_ListedSettings):
    """NUS-WIDE, in one of the three forms in which it is distributed."""

    source: Literal["nuswide"]
    form: Literal["official", "csv", "multi-hot"] = Field(
        "official",
        description="`official`: ImageList/, Groundtruth/ and Concepts81.txt. `csv`: one file with "
        "file name, list of labels and split. `multi-hot`: two lists whose lines hold a path and "
        "81 times 0 or 1.",
    )
    images: str = Field("Flickr", description="Folder that the paths in the lists are relative to.")
    concepts: str = Field("Concepts81.txt", description="File with the 81 concepts, in order.")
    file: str = Field(
        "nus_wid_data.csv",
        description="File of form `csv`, with the columns `filepath`, `label` and `split_name`.",
    )
    train_list: str = Field(
        "database.txt", description="Training list of form `multi-hot`. It may end in .gz."
    )
    test_list: str = Field(
        "test.txt", description="Test list of form `multi-hot`. It may end in .gz."
    )
    split_name: str | None = Field(
        None, description="Name of the split in results. null: named after the form."
    )


class TableSettings(_ListedSettings):
    """Any data set, from a CSV or Parquet file with one row per image, or one per label of it."""

    source: Literal["table"]
    file: str = Field("labels.csv", description="The table, a .csv, .tsv or .parquet file.")
    images: str = Field(
        ".",
        description="Folder that the paths in the table are relative to. `.`: the folder of the "
        "data set.",
    )
    image: str = Field("image", description="Column with the path of the image.")
    labels: Annotated[str | list[str], BeforeValidator(check_columns)] = Field(
        "labels",
        description="Column with the labels of the image. Or a list of columns, each named after "
        "a label, with 1 in the rows of images that have it and 0 in the others.",
    )
    split: str = Field(
        "split",
        description="Column that says `train`, `test` or, for images to validate on, `val`.",
    )
    test_share: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="For a table without a column of splits: share of the images to test on, "
        "approximately. A hash of the path decides, so that an image stays in its split when "
        "others are added or removed.",
    )
    separator: str = Field(
        ";", min_length=1, description="Text between two labels, unless a cell holds a list."
    )
    vocabulary: list[str] | None = Field(
        None, description="The labels, in order. null: the labels in the table, sorted."
    )
    split_name: str = Field("own", description="Name of the split in results.")


class ImportedSettings(_Settings):
    """A manifest that `gmpipe import-regions` writes, from a file with regions."""

    source: Literal["imported"]


ListedSettings = VocSettings | CocoSettings | NuswideSettings | TableSettings
PrepareSettings = ScenesSettings | ListedSettings | ImportedSettings


class ArchitectureSettings(_Settings):
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


class FitSettings(_Settings):
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


class DetectorSettings(_Settings):
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


class ExtractSettings(_Settings):
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
    views: int = Field(
        1, ge=1, description="Views per training image: the plain one and views-1 random crops."
    )
    flip: bool = Field(True, description="Mirror half of the random crops.")
    seed: int = Field(0, ge=0, description="Seed of the random crops.")
    feature_dtype: Literal["float16", "float32"] = Field(
        "float16", description="Type of the stored features."
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


class NetworkSettings(_Settings):
    """The matching network (section 3.3 of the paper) or its baseline."""

    architecture: Literal["matching", "max-pool"] = Field(
        "matching",
        description="`matching`: the paper's network. `max-pool`: an MLP on each region's feature "
        "and box, then the maximum over the regions; it reads only `latent_size` and the dropouts.",
    )
    instance_graph: bool = Field(True, description="Use edges between instances, equation (1).")
    label_graph: bool = Field(True, description="Use edges between labels, equation (2).")
    matching_edges: bool = Field(
        True,
        description="Use edges between instances and labels, equation (3). Without them, the "
        "decoder reads the two nodes.",
    )
    latent_size: int = Field(
        512,
        ge=2,
        multiple_of=2,
        description="H: size of the encoded nodes and edges. The last convolution module halves "
        "it, as in the paper's [512, 256].",
    )
    modules: int = Field(2, ge=1, description="k: number of graph convolution modules.")
    neighbors: int = Field(
        5, ge=1, description="K: number of nearest instances that an instance gathers from."
    )
    label_neighbors: int | None = Field(
        None,
        ge=1,
        description="Number of labels that a label gathers from, nearest by cosine. null: all "
        "others.",
    )
    node_norm: bool = Field(
        True,
        description="Apply LayerNorm to encoded and updated nodes. (Ours; the paper has none.)",
    )
    least_deviation: float = Field(
        0.1,
        gt=0,
        description="Each feature component is divided by its standard deviation, or by this share "
        "of the root mean square of all standard deviations, whichever is larger. With 0.1, nearly "
        "all components vary equally; with 1, weak components stay weak.",
    )
    input_dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on region features.")
    dropout: float = Field(
        0.0, ge=0, lt=1, description="Dropout on encoded and updated nodes of instances."
    )
    decoder_dropout: float = Field(
        0.0, ge=0, lt=1, description="Dropout on the decoder's hidden state."
    )


class TrainSettings(_Settings):
    """How stage two trains (section 4.2 of the paper)."""

    network: NetworkSettings = NetworkSettings()
    label_vectors: str = Field(
        "wordllama",
        description="`wordllama`: static embeddings that need no download. Otherwise a path: a "
        "GloVe text file (*.txt), a zip that holds one (*.zip), a text file in a zip "
        "(data/glove/glove.6B.zip/glove.6B.300d.txt), or an npz with the arrays `labels` and "
        "`vectors`.",
    )
    epochs: int = Field(60, ge=1, description="Passes over the training split.")
    batch_size: int = Field(32, ge=1, description="Images per step and process.")
    regions: int | None = Field(
        None,
        ge=1,
        description="Number of regions used per image, by descending score. null: all regions in "
        "the cache.",
    )
    precision: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="Precision of the forward pass in training. The loss and all scores are "
        "computed in float32.",
    )
    optimizer: Literal["sgd", "adamw"] = Field(
        "sgd", description="Optimiser. The paper uses `sgd`."
    )
    learning_rate: float = Field(0.01, gt=0, le=1e30, description="Initial learning rate.")
    momentum: float = Field(0.9, ge=0, lt=1, description="Momentum of SGD.")
    weight_decay: float = Field(1e-4, ge=0, description="Weight decay.")
    schedule: Literal["step", "cosine", "constant"] = Field(
        "step",
        description="`step`: divide the learning rate by 10 every `step_epochs` (as the paper). "
        "`cosine`: lower it to zero. `constant`: keep it.",
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
    beta: float = Field(0.0, ge=0, le=1000, description="Class balance of the loss, equation (15).")
    validation: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Share of the training split that is not trained on. The mAP on it is written "
        "to history.csv after each epoch, for tuning without the test split. A data set with a "
        "`val` split is validated on that, and keeps 0 here.",
    )
    selection: Literal["last", "best"] = Field(
        "last",
        description="Epoch whose weights are the result: the `last` one, or the one with the "
        "`best` mAP on the validation part or the `val` split.",
    )
    variants: dict[Name, dict[str, object]] = Field(
        default_factory=dict,
        description="Settings above that a variant changes, e.g. "
        "`max-pool: {learning_rate: 0.003}`. A new name defines a new variant.",
    )


SECTIONS = ("prepare", "detector", "extract", "train")
"""The sections of params.yaml. Each holds one block per data set."""


class Params(_Settings):
    """All of params.yaml."""

    datasets: list[Name] = Field(
        min_length=1,
        description="Data sets that `dvc repro` runs. The first is the default of `--dataset`.",
    )
    variants: list[Name] = Field(
        min_length=1, description="Variants that `dvc repro` trains on each data set."
    )
    seeds: list[Annotated[int, Field(ge=0)]] = Field(
        min_length=1,
        description="Seeds that `dvc repro` trains each variant with. The first is the default of "
        "`--seed`.",
    )
    prepare: dict[Name, Annotated[PrepareSettings, Field(discriminator="source")]]
    detector: dict[Name, DetectorSettings]
    extract: dict[Name, ExtractSettings]
    train: dict[Name, TrainSettings]

    @field_validator("datasets", "variants", "seeds")
    @classmethod
    def _check_unique(cls, names: list[Any]) -> list[Any]:
        # DVC expands stages over these lists: a repeated name would define the same stage twice.
        if len(set(names)) != len(names):
            raise ValueError("every entry must be unique")
        return names

    @model_validator(mode="after")
    def _check_stages(self) -> Params:
        # DVC joins the names with `-`, and drops the first of two stages with the same name.
        stages: dict[str, tuple[str, str]] = {}
        for dataset in self.datasets:
            for variant in self.variants:
                other = stages.setdefault(f"{dataset}-{variant}", (dataset, variant))
                if other != (dataset, variant):
                    raise ValueError(
                        f"the data set {dataset!r} with the variant {variant!r} and the data set "
                        f"{other[0]!r} with the variant {other[1]!r} would be one stage of DVC, "
                        f"train@{dataset}-{variant}-SEED: rename one of them"
                    )
        return self
