"""Rows that devices share: states and gradients of one device, for decoders of both kinds and their towers."""

import pytest

from multitap_jax.config import MeshConfig
from tests.families import mllama, qwen2_vl
from tests.families.checks import check_mesh
from tests.families.qwen_checks import PAIRS

# No sharded weights beside: XLA's CPU runtime (jaxlib 0.10.2) gathers them in no fixed order beside the ring, and hangs
# now and then (docs/performance.md).
CASES = {
    "qwen2_vl": (qwen2_vl, PAIRS, MeshConfig(data=4, context=2)),
    "mllama": (mllama, mllama.PAIRS, MeshConfig(data=2, context=4)),
}


@pytest.mark.parametrize("name", CASES)
def test_a_mesh_with_context_changes_nothing(tmp_path, name):
    family, pairs, mesh = CASES[name]
    folder = family.oracle().write_without_torch(tmp_path)
    check_mesh(folder, pairs, gradient=True, config=mesh, image_policy=family.POLICY)
