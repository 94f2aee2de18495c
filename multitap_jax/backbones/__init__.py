"""Vision-language backbones: one file a family. `multitap_jax.families` picks one for a checkpoint."""

from multitap_jax.backbones.base import Backbone
from multitap_jax.backbones.stack import Execution

__all__ = ["Backbone", "Execution"]
