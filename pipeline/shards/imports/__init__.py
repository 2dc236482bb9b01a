"""Files of regions that were made elsewhere: each form has a reader."""

from pipeline.shards.imports.bottom_up import BottomUpFiles as BottomUpFiles
from pipeline.shards.imports.image_regions import ImageRegions as ImageRegions
from pipeline.shards.imports.image_regions import region_rows as region_rows
from pipeline.shards.imports.matching import KnownImage as KnownImage
from pipeline.shards.imports.matching import Line as Line
from pipeline.shards.imports.matching import match_lines as match_lines
from pipeline.shards.imports.npy_folder import IDS as IDS
from pipeline.shards.imports.npy_folder import NpyFolder as NpyFolder
from pipeline.shards.imports.npz import NpzFile as NpzFile
from pipeline.shards.imports.npz_folder import NpzFolder as NpzFolder
from pipeline.shards.imports.parquet import ParquetFiles as ParquetFiles
