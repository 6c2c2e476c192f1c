"""Read rows, encode them as tokens, and batch them. A batch depends on data, seed and step only."""

from compress.data.dataset import Data, open_data
from compress.data.interface import ModelInterface
from compress.data.sources import DataSpec, ParallelText, Source
from compress.data.split import Batch, Example, Split

__all__ = ["Batch", "Data", "DataSpec", "Example", "ModelInterface", "ParallelText", "Source", "Split", "open_data"]
