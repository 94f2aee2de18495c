"""What transformers gives for the tiny Qwen2-VL, kept as numbers for where torch is absent.

python -m tests.goldens    writes tests/goldens/qwen2_vl.json anew; needs torch
"""

import json
from pathlib import Path

import numpy as np

from tests.tiny_qwen2_vl import Group, random_group, tiny_config, torch_model, torch_pooled

FILE = Path(__file__).parent / "goldens" / "qwen2_vl.json"
MODES = ("mrope", "flat")
CASES = {
    "text only": [[], []],
    "one image": [[(4, 6)]],
    "two images": [[(4, 6), (6, 4)]],
    "mixed sizes": [[(2, 2)], [(8, 4), (4, 4)], [], [(2, 10)]],
}


def groups(seed: int, grids: list) -> list[Group]:
    """One pair for each list of picture grids; the texts grow longer by three tokens each."""
    rng = np.random.default_rng(seed)
    return [random_group(rng, grid, [4 + 3 * index]) for index, grid in enumerate(grids)]


def write() -> None:
    """Writes the pooled states float32[pairs, H] of every case in both position modes."""
    oracle = torch_model(tiny_config())
    found = {
        f"{case}, {mode}": [
            [float(f"{x:.8g}") for x in row] for row in torch_pooled(oracle, groups(1, grids), mode=mode)
        ]
        for case, grids in CASES.items()
        for mode in MODES
    }
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    write()
