"""Weights in and out: invertible rule tables, streaming safetensors, errors that list every problem."""

from multitap_jax.weights.files import FolderError, read_tensors
from multitap_jax.weights.hub import abstract_backbone, export_tensors, load_backbone, save_backbone
from multitap_jax.weights.mapping import WeightError

__all__ = [
    "FolderError",
    "WeightError",
    "abstract_backbone",
    "export_tensors",
    "load_backbone",
    "read_tensors",
    "save_backbone",
]
