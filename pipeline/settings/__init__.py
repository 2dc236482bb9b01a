"""Every setting of params.yaml: its type, bounds, default and meaning.

`Params` is the whole file. Each of its sections holds one block per data set, and each kind of
block is a class here. The descriptions are the text of docs/settings.md.

Importing this package imports nothing heavy, so that a mistake in params.yaml is found before
anything runs.
"""

from pipeline.settings.all import SECTIONS, Params
from pipeline.settings.decisions import DecisionSettings
from pipeline.settings.gm_mlic import GmMlicSettings
from pipeline.settings.heads import (
    FeatureSettings,
    HeadSettings,
    RegionSettings,
    head_of_variant,
    head_variants,
    settings_class,
    variant_changes,
    variant_names,
)
from pipeline.settings.max_pool import MaxPoolSettings
from pipeline.settings.prepare import (
    TREATMENTS,
    BoxFrame,
    CocoSettings,
    DifficultSettings,
    ImportedSettings,
    ListedSettings,
    NuswideSettings,
    PrepareSettings,
    ScenesSettings,
    TableSettings,
    Treatment,
    VocSettings,
    YoloSettings,
    difficult_settings,
)
from pipeline.settings.regions import (
    ArchitectureSettings,
    DetectorSettings,
    ExtractSettings,
    FitSettings,
    Precision,
)
from pipeline.settings.training import (
    AsymmetricLoss,
    FocalLoss,
    Loss,
    OwnLoss,
    SoftmaxSquaredLoss,
    TrainSettings,
    WeightedLoss,
)

__all__ = [
    "SECTIONS",
    "TREATMENTS",
    "ArchitectureSettings",
    "AsymmetricLoss",
    "BoxFrame",
    "CocoSettings",
    "DecisionSettings",
    "DetectorSettings",
    "DifficultSettings",
    "ExtractSettings",
    "FeatureSettings",
    "FitSettings",
    "FocalLoss",
    "GmMlicSettings",
    "HeadSettings",
    "ImportedSettings",
    "ListedSettings",
    "Loss",
    "MaxPoolSettings",
    "NuswideSettings",
    "OwnLoss",
    "Params",
    "Precision",
    "PrepareSettings",
    "RegionSettings",
    "ScenesSettings",
    "SoftmaxSquaredLoss",
    "TableSettings",
    "TrainSettings",
    "Treatment",
    "VocSettings",
    "WeightedLoss",
    "YoloSettings",
    "difficult_settings",
    "head_of_variant",
    "head_variants",
    "settings_class",
    "variant_changes",
    "variant_names",
]
