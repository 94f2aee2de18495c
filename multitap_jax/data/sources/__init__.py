"""Public datasets -> records: a reader for each (one small file), the table of them, and the conversion."""

from multitap_jax.data.sources.base import Dataset, SourceError
from multitap_jax.data.sources.convert import Conversion, convert, read_dataset_note
from multitap_jax.data.sources.registry import DATASETS, dataset_named

__all__ = ["DATASETS", "Conversion", "Dataset", "SourceError", "convert", "dataset_named", "read_dataset_note"]
