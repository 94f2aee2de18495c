"""Runs verbs one after another in one process of a run: verbs_script.py COMMANDS, a JSON list of lists of arguments."""

import json
import os
import sys

from multitap_jax import cli
from multitap_jax.parallel.distributed import initialize

if __name__ == "__main__":
    initialize(saves_on_sigterm=True)
    os.environ.pop("MULTITAP_COORDINATOR", None)  # joined above, once for all verbs
    for command in json.loads(sys.argv[1]):
        if code := cli.main(command):
            sys.exit(code)
