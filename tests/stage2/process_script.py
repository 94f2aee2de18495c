"""One process of some fits: `process_script.py STORE OUT PORT INDEX COUNT DEVICES CV CV ...`."""

import os
import sys

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np

from multitap_jax.parallel.distributed import initialize
from multitap_jax.stage2 import DataError, EmbeddingStore, RidgeHead


def main(store: str, out: str, port: str, index: str, count: str, devices: str, *criteria: str) -> None:
    jax.config.update("jax_num_cpu_devices", int(devices))
    if int(count) > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        initialize(f"localhost:{port}", int(count), int(index))
    mesh = jax.make_mesh((len(jax.devices()),), ("data",))
    for cv in criteria:
        head = RidgeHead(np.logspace(2, 5, 4), cv=int(cv) if cv.isdigit() else cv, refine=True)
        try:
            head.fit_store(EmbeddingStore(store), mesh=mesh)
        except DataError as error:
            np.savez(f"{out}.{cv}.{index}.npz", error=str(error))
            continue
        np.savez(
            f"{out}.{cv}.{index}.npz",
            coef=head.coef_,
            intercept=head.intercept_,
            alpha=head.alpha_,
            mse=head.cv_results_["mse"],
            tau=head.tau_,
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
