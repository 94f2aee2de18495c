"""An artefact in other layouts, one module each; docs/exporting.md shows how others read them."""

from multitap_jax.scoring.exports.copy import export_artefact
from multitap_jax.scoring.exports.heads import export_heads
from multitap_jax.scoring.exports.official import ContractWarning, export_official
from multitap_jax.scoring.exports.stablehlo import export_stablehlo
from multitap_jax.scoring.exports.vllm import export_vllm

__all__ = [
    "ContractWarning",
    "export_artefact",
    "export_heads",
    "export_official",
    "export_stablehlo",
    "export_vllm",
]
