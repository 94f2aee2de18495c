"""A run of the toy in a process of its own: WORKDIR KILL DEVICES STEPS; it dies by SIGKILL while taking batch KILL."""

import os
import signal
import sys
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np

from multitap_jax.config import CheckpointConfig, MeshConfig, OptimizerConfig, TrainConfig
from multitap_jax.stage1.train import train
from tests.stage1.toy import ToyDataset, toy_model


class Deadly(ToyDataset):
    """Kills its process at one step."""

    kill: int = -1

    def batch(self, step):
        if step == self.kill:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().batch(step)


def main(workdir: Path, kill: int, devices: int, steps: int) -> None:
    jax.config.update("jax_num_cpu_devices", devices)
    config = TrainConfig(
        optimizer=OptimizerConfig(learning_rate=1e-2, schedule="cosine"),
        mesh=MeshConfig(data=1, fsdp=devices),
        checkpoint=CheckpointConfig(every_steps=2, keep=2),
        log_every=1,
    )
    dataset = Deadly(num_steps=steps)
    dataset.kill = kill
    result = train(config, workdir, toy_model(), dataset)
    np.savez(workdir / "final.npz", *map(np.asarray, jax.tree.leaves(result.model)))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
