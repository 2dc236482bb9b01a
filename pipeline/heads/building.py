"""Heads by their names: from settings to a network."""

from __future__ import annotations

from importlib import import_module

from pipeline.heads.contract import Head, HeadSizes
from pipeline.settings import HeadSettings
from pipeline.settings.heads import HEADS


def head_class(name: str) -> type[Head]:
    """The class of a head, given its name in `network.head`."""
    entry = HEADS[name]
    found: type[Head] = getattr(import_module(entry.module), entry.name)
    return found


def build_head(sizes: HeadSizes, settings: HeadSettings) -> Head:
    """Build the head that the settings describe, with random weights."""
    return head_class(settings.head)(sizes, settings)
