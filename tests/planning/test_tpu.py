"""Plans for TPUs that are not there; they need libtpu, which compiles without one."""

import importlib.util
import json

import pytest

from multitap_jax import cli
from multitap_jax.config import ConfigError, MeshConfig
from multitap_jax.parallel.mesh import make_mesh
from multitap_jax.planning.chips import CHIPS, Topology
from tests.shardings import CONFIGS
from tests.tiny_qwen2_vl import tiny_config

pytestmark = [
    pytest.mark.tpu_plan,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu (extra tpu-plan)"),
]


@pytest.mark.parametrize("name", ["v5e:2x4", "v5p:2x2x2", "v6e:2x2"])
def test_topologies_have_the_chips_their_names_say(name):
    topology = Topology.parse(name)
    devices = topology.devices()
    assert len(devices) == topology.size
    assert {device.platform for device in devices} == {"tpu"}
    kinds = {"TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v6 lite": "v6e"}
    assert {kinds[device.device_kind] for device in devices} == {name.partition(":")[0]}
    assert len(topology.sides) == CHIPS[name.partition(":")[0]].dimensions


def test_a_topology_that_does_not_exist_is_named():
    with pytest.raises(ConfigError, match=r"topology v5e:3x5 is not one that libtpu knows .*sides are even"):
        Topology.parse("v5e:3x5").devices()


def test_only_data_spans_slices():
    mesh = make_mesh(MeshConfig(data=-1, fsdp=2, tensor=2), Topology.parse("v5e:2x2", slices=2).devices())
    assert mesh.shape["data"] == 2
    assert [{device.slice_index for device in share.flat} for share in mesh.devices] == [{0}, {1}]


def test_a_tiny_model_is_planned_whole(tmp_path, capfd):
    (tmp_path / "config.json").write_text(json.dumps(tiny_config()))
    command = [f"--config={CONFIGS / 'official.py'}", f"--model={tmp_path}", "--topology=v5e:2x4", "--effort=quick"]
    command += ["--config.data.image_policy=square:56", "--config.batch_size=8", "--config.accumulation=1"]
    command += ["--config.mesh.fsdp=4", "--config.mesh.tensor=2", f"--json={tmp_path / 'plan.json'}"]
    assert cli.main(["plan", *command]) == 0
    said = capfd.readouterr().out
    assert "FITS: " in said
    assert "of 15.75 GiB on each chip at the peak" in said
    found = json.loads((tmp_path / "plan.json").read_text())
    for name, formula in (("training", 1.0), ("scoring", 1.0)):
        step = found["steps"][name]
        assert 0 < step["roofline"]["mfu"] < formula
        assert step["memory"]["peak"] > step["memory"]["arguments"] > 0
        assert step["collectives"]


def test_what_does_not_fit_is_refused_with_a_remedy(capfd):
    """A plan of a published size; memory runs out early in compiling, so this takes no longer than the tiny one."""
    command = [f"--config={CONFIGS / 'official.py'}", "--model=qwen2-vl-2b", "--topology=v5e:2x2", "--effort=quick"]
    command += ["--config.data.image_policy=square:560", "--config.mesh.data=4", "--config.mesh.fsdp=1"]
    assert cli.main(["plan", *command, "--step=training"]) == 1
    said = capfd.readouterr().out
    assert "DOES NOT FIT: the training step needs more than 15.75 GiB on each chip" in said
    assert "--config.mesh.data=1 --config.mesh.fsdp=4" in said
