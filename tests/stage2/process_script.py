"""One process of some fits: `process_script.py FOLDER OUT PORT INDEX COUNT DEVICES STORE:CV STORE:CV ...`."""

import os
import sys

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np

from multitap_jax.parallel.distributed import OtherProcessError, initialize
from multitap_jax.stage2 import DataError, EmbeddingStore, RidgeHead, StoreError


def main(folder: str, out: str, port: str, index: str, count: str, devices: str, *fits: str) -> None:
    jax.config.update("jax_num_cpu_devices", int(devices))
    if int(count) > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        initialize(f"localhost:{port}", int(count), int(index))
    mesh = jax.make_mesh((len(jax.devices()),), ("data",))
    for fit in fits:
        store, cv = fit.split(":")
        head = RidgeHead(np.logspace(2, 5, 4), cv=int(cv) if cv.isdigit() else cv, refine=True)
        try:
            head.fit_store(EmbeddingStore(f"{folder}/{store}"), mesh=mesh)
        except (DataError, StoreError, OtherProcessError) as error:
            np.savez(f"{out}.{fit}.{index}.npz", error=str(error))
            continue
        np.savez(
            f"{out}.{fit}.{index}.npz",
            coef=head.coef_,
            intercept=head.intercept_,
            alpha=head.alpha_,
            mse=head.cv_results_["mse"],
            tau=head.tau_,
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
