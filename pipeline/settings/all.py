"""The whole of params.yaml."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from pipeline.names import Name
from pipeline.settings.blocks import Settings
from pipeline.settings.prepare import PrepareSettings
from pipeline.settings.regions import DetectorSettings, ExtractSettings
from pipeline.settings.training import TrainSettings

SECTIONS = ("prepare", "detector", "extract", "train")
"""The sections of params.yaml. Each holds one block per data set."""


class Params(Settings):
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
