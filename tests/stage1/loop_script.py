"""A run of the toy in a process of its own, or in one of several.

WORKDIR KILL STEPS MESH [SETTINGS]: it dies by SIGKILL while taking batch KILL; MESH and SETTINGS of the checkpoints are
JSON. Exit codes are those of the `train` verb.
"""

import json
import os
import signal
import sys
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np

from multitap_jax.config import CheckpointConfig, MeshConfig, ModelConfig, OptimizerConfig, TrainConfig
from multitap_jax.parallel.distributed import barrier, initialize, is_main_process, leave, whole
from multitap_jax.stage1.train import train
from tests.stage1.toy import ToyDataset, toy_model


class Deadly(ToyDataset):
    """Kills its process at one step."""

    kill: int = -1

    def batch(self, step):
        if step == self.kill:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().batch(step)


def main(workdir: Path, kill: int, steps: int, mesh: dict, checkpoint: dict) -> int:
    initialize(heartbeat=10, saves_on_sigterm=True)
    config = TrainConfig(
        model=ModelConfig(dtype="float32"),
        optimizer=OptimizerConfig(learning_rate=1e-2, schedule="cosine"),
        mesh=MeshConfig(**mesh),
        checkpoint=CheckpointConfig(**{"every_steps": 2, "keep": 2, **checkpoint}),
        log_every=1,
    )
    dataset = Deadly(num_steps=steps)
    dataset.kill = kill
    result = train(config, workdir, toy_model(), dataset)
    arrays = [whole(x) for x in jax.tree.leaves(result.model)]
    if is_main_process():
        np.savez(workdir / "final.npz", *arrays)
    barrier("end")
    return 0 if result.finished else 143


if __name__ == "__main__":
    try:
        sys.exit(main(Path(sys.argv[1]), *map(json.loads, [*sys.argv[2:], "{}"][:4])))
    except Exception as error:
        leave(1, error, explained=False)
        raise
