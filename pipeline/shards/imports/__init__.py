"""Files of regions that were made elsewhere: an npz of arrays, or bottom-up-attention TSV."""

from pipeline.shards.imports.bottom_up import BottomUpFiles as BottomUpFiles
from pipeline.shards.imports.image_regions import ImageRegions as ImageRegions
from pipeline.shards.imports.image_regions import region_rows as region_rows
from pipeline.shards.imports.matching import KnownImage as KnownImage
from pipeline.shards.imports.matching import match_lines as match_lines
from pipeline.shards.imports.npz import NpzFile as NpzFile
