"""Regions on disk: the contents of a shard, and how shards are written, read and checked."""
