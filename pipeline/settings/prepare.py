"""The section `prepare`: where data sets come from."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field, model_validator

from pipeline.names import check_columns, check_splits
from pipeline.settings.blocks import Settings


class ScenesSettings(Settings):
    """The scenes of the demo, which `prepare` draws."""

    source: Literal["scenes"]
    train: int = Field(1000, ge=10, description="Number of training scenes to draw.")
    test: int = Field(500, ge=1, description="Number of test scenes to draw.")
    size: int = Field(128, ge=64, description="Side of a scene, in pixels.")
    seed: int = Field(0, ge=0, description="Seed of the drawing.")


Treatment = Literal["ignored", "positive", "negative"]
TREATMENTS: tuple[Treatment, ...] = get_args(Treatment)


class DifficultSettings(Settings):
    """What difficult labels count as: those that the files give as neither positive nor negative.
    In VOC, they are the classes of which an image shows only objects marked `difficult`; in an
    imported npz, the labels coded 0. An ignored label carries no loss, and is left out of the
    metrics."""

    train: Treatment = Field(
        "ignored", description="In the images to train on, and those that `validation` takes away."
    )
    val: Treatment = Field(
        "ignored", description="In the images of a split `val`, which validate each training."
    )
    test: Treatment = Field("ignored", description="In the images to test on.")


class _ListedSettings(Settings):
    """What data sets of files have in common. All paths are relative to data/<dataset>/."""

    drop_missing: bool = Field(
        False,
        description="Leave out images whose file is missing. If false, a missing file is an error.",
    )
    drop_unlabelled: bool = Field(
        False, description="Leave out images without any positive or difficult label."
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
    """PASCAL VOC 2007 in the folders of its devkit: `trainval` is trained on, `test` tested on. For
    VOC 2012, whose test labels are not public, set `folder`, `train: train` and `test: val`."""

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
    difficult: DifficultSettings = DifficultSettings()


class CocoSettings(_BoxedSettings):
    """MS-COCO in its publisher's folders: annotations/instances_<split>.json beside <split>/."""

    source: Literal["coco"]
    train: str = Field("train2014", description="Split to train on. `train2014` is the paper's.")
    test: str = Field(
        "val2014",
        description="Split to test on. `val2014` is the paper's, but torchvision's detector was "
        "trained on 35,504 of its 40,504 images; it has not seen those of `val2017`.",
    )


class YoloSettings(_BoxedSettings):
    """Photographs with YOLO's labels in Ultralytics' layout: data.yaml, images/ and labels/."""

    source: Literal["yolo"]
    file: str = Field("data.yaml", description="File with the names of the classes and the splits.")
    train: str = Field("train", description="Key of data.yaml with the split to train on.")
    test: str = Field(
        "test", description="Key with the split to test on: `val`, if there is no `test`."
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


def _as_texts(value: Any) -> Any:
    """A list of texts; a single one, and numbers, as YAML reads -1, become texts."""
    texts = value if isinstance(value, list) else [value]
    return [str(one) if type(one) in (int, float) else one for one in texts]


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
    unknown: Annotated[list[str], BeforeValidator(_as_texts)] = Field(
        [],
        description="Cells that mean, in columns of 0 and 1, that it is not known whether the "
        'image has the label: for example `["", "?", -1]`. Such a label is ignored in training and '
        "metrics.",
    )
    vocabulary: list[str] | None = Field(
        None, description="The labels, in order. null: the labels in the table, sorted."
    )
    split_name: str = Field("own", description="Name of the split in results.")


class ImportedSettings(Settings):
    """A manifest that `gmpipe import-regions` writes, from a file with regions."""

    source: Literal["imported"]
    difficult: DifficultSettings = DifficultSettings()


ListedSettings = VocSettings | CocoSettings | YoloSettings | NuswideSettings | TableSettings
PrepareSettings = ScenesSettings | ListedSettings | ImportedSettings


def difficult_settings(source: PrepareSettings) -> DifficultSettings:
    """What difficult labels count as; the default for a source that has none."""
    if isinstance(source, VocSettings | ImportedSettings):
        return source.difficult
    return DifficultSettings()
