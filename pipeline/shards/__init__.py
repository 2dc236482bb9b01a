"""Regions on disk: what a shard holds (schema), how it is written, how it is read."""
