"""Where every array of a run lies, for each config and a published model: kept as text, so that a change is seen.

python -m tests.shardings    writes tests/goldens/shardings/*.txt anew; read the diff before committing it
"""

import dataclasses
import importlib.util
from pathlib import Path

from multitap_jax.config import MeshConfig, TrainConfig, from_config_dict
from multitap_jax.planning.planner import sharding_listing
from multitap_jax.planning.workload import Assumptions

FOLDER = Path(__file__).parent / "goldens" / "shardings"
CONFIGS = Path(__file__).parents[1] / "configs"
# file in configs/, model, mesh
CASES = (
    ("official", "qwen2-vl-7b", MeshConfig(data=1, fsdp=8, tensor=2)),
    ("official", "llama-3.2-vision-11b", MeshConfig(data=2, fsdp=4, tensor=4)),
    ("official", "internlm-xcomposer2d5-7b", MeshConfig(data=1, fsdp=8, tensor=2)),
    ("lora", "qwen2-vl-2b", MeshConfig(data=1, fsdp=8, tensor=2)),
    ("head_only", "qwen3-vl-8b", MeshConfig(data=2, fsdp=8, tensor=1)),
)


def load(name: str, **changes) -> TrainConfig:
    """The settings of a file in configs/."""
    spec = importlib.util.spec_from_file_location(name, CONFIGS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return dataclasses.replace(from_config_dict(TrainConfig, module.get_config().to_dict()), **changes)


def file_of(config: str, model: str) -> Path:
    """Where a case is kept."""
    return FOLDER / f"{config}_{model}.txt"


def text_of(config: str, model: str, mesh: MeshConfig) -> str:
    """What is kept."""
    devices = mesh.data * mesh.fsdp * mesh.tensor
    return sharding_listing(load(config, mesh=mesh), model, devices, Assumptions())


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    for case in CASES:
        file_of(*case[:2]).write_text(text_of(*case))
