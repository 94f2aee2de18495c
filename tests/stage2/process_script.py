"""One process of a fit: `process_script.py STORE OUT PORT INDEX COUNT DEVICES CV`."""

import os
import sys

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np

from multitap_jax.parallel.distributed import initialize
from multitap_jax.stage2 import EmbeddingStore, RidgeHead


def main(store: str, out: str, port: str, index: str, count: str, devices: str, cv: str) -> None:
    jax.config.update("jax_num_cpu_devices", int(devices))
    if int(count) > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        initialize(f"localhost:{port}", int(count), int(index))
    mesh = jax.make_mesh((len(jax.devices()),), ("data",))
    head = RidgeHead(np.logspace(2, 5, 4), cv=int(cv) if cv.isdigit() else cv, refine=True)
    head.fit_store(EmbeddingStore(store), mesh=mesh)
    np.savez(
        f"{out}.{index}.npz",
        coef=head.coef_,
        intercept=head.intercept_,
        alpha=head.alpha_,
        mse=head.cv_results_["mse"],
        tau=head.tau_,
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
