"""A scorer without a model, and records without pictures worth seeing, for the tests of scoring jobs."""

import json
import resource
import sys
import time
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image


@dataclass
class FakeScores:
    overall: np.ndarray
    objectives: np.ndarray
    names: tuple[str, ...]
    n_tokens: np.ndarray
    truncated: np.ndarray
    errors: list[str | None]


class FakeScorer:
    """Scores a text by its checksum; a text holding "fail" has an error, one holding "long" is cut if it may be."""

    def __init__(self, fingerprint: str = "model-1", delay: float = 0.0, checkpoint: str = "folder"):
        self.fingerprint, self.checkpoint = fingerprint, checkpoint
        self.settings = {"dtype": "float32"}
        self.trained_on = {"target": "ratings.fit", "target_range": [1, 5]}
        self.seen = {}
        self.conditions = {"prompt": "official-eval"}
        self.delay = delay
        self.calls: list[int] = []

    def score_stream(self, lists, *, truncate, occupancy):
        return (self.score([pair.text for pair in pairs], truncate) for pairs in lists)

    def score(self, texts, truncate):
        self.calls.append(len(texts))
        time.sleep(self.delay)
        overall = np.asarray([zlib.crc32(text.encode()) / 2**32 for text in texts], np.float32)
        return FakeScores(
            overall=overall,
            objectives=np.stack([overall * np.float32(2), -overall], axis=1),
            names=("safety", "detail"),
            n_tokens=np.asarray([len(text) for text in texts]),
            truncated=np.asarray(["long" in text and truncate for text in texts]),
            errors=["made to fail" if "fail" in text else None for text in texts],
        )


def write_records(folder: Path, count: int, texts: dict[int, str] | None = None, name: str = "pairs.jsonl") -> Path:
    """`count` records on one picture; `texts` replaces single ones."""
    folder.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4)).save(folder / "picture.png")
    path = folder / name
    with path.open("w") as file:
        for index in range(count):
            text = (texts or {}).get(index, f"text {index}")
            file.write(json.dumps({"id": f"r{index}", "image": "picture.png", "text": text}) + "\n")
    return path


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


if __name__ == "__main__":  # a job in a process of its own: INPUT OUTPUT WINDOW DELAY MAX_FILE_BYTES (0: no limit)
    from multitap_jax.scoring.job import score_file

    if limit := int(sys.argv[5]):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    print(score_file(FakeScorer(delay=float(sys.argv[4])), sys.argv[1], sys.argv[2], window=int(sys.argv[3])))
