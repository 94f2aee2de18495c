"""Rows that devices share: states and gradients of one device, for decoders of both kinds and their towers."""

import pytest

from multitap_jax.config import MeshConfig
from tests.families import mllama, qwen2_vl
from tests.families.checks import check_mesh
from tests.families.qwen_checks import PAIRS

CASES = {
    "qwen2_vl": (qwen2_vl, PAIRS, MeshConfig(data=2, tensor=2, context=2)),
    "mllama": (mllama, mllama.PAIRS, MeshConfig(data=1, fsdp=2, context=4)),
}


@pytest.mark.parametrize("name", CASES)
def test_a_mesh_with_context_changes_nothing(tmp_path, name):
    family, pairs, mesh = CASES[name]
    folder = family.oracle().write_without_torch(tmp_path)
    check_mesh(folder, pairs, gradient=True, config=mesh, image_policy=family.POLICY)
