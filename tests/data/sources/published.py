"""Small files of exactly the form that each dataset is published in."""

import csv
import io
import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from scipy.io import savemat

from multitap_jax.data.records import load_records
from multitap_jax.data.sources import convert


def picture(colour: int, kind: str = "PNG") -> bytes:
    """The bytes of a picture of its own."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (colour, 0, 0)).save(buffer, kind)
    return buffer.getvalue()


def hub_image(colour: int) -> dict:
    """A picture as the Hub's tables embed it."""
    return {"bytes": picture(colour), "path": f"{colour}.png"}


def write(path: Path, content) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, str):
        path.write_text(content)
    else:
        path.write_text(json.dumps(content))
    return path


def parquet(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def table(path: Path, rows: list[dict], delimiter: str = ",") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return path


def flickr_json(path: Path, ratings: list[list[float]]) -> Path:
    """One picture each; ratings of one candidate."""
    content = {
        f"im{i}": {
            "human_judgement": [
                {
                    "image_id": f"im{i}",
                    "image_path": f"Flickr8k_Dataset/im{i}.jpg",
                    "caption": f"a  dog {i} .",
                    "rating": r,
                }
                for r in given
            ],
            "image_id": f"im{i}",
            "image_path": f"Flickr8k_Dataset/im{i}.jpg",
            "ground_truth": ["a dog"] * 5,
        }
        for i, given in enumerate(ratings)
    }
    return write(path, content)


def pascal_mats(folder: Path, pairs: list[tuple[str, str, str, int, int]]) -> None:
    """(picture, first, second, category, votes for the first of 48) as MATLAB's cells and structures have them."""

    def cell(text: str) -> np.ndarray:
        out = np.empty((1, 1), object)
        out[0, 0] = text
        return out

    fields = [("a", object), ("b", object), ("c", object)]
    inputs = np.empty((1, len(pairs)), fields)
    triplets = np.empty((1, 48 * len(pairs)), [*fields, ("d", object)])
    for i, (name, first, second, _, votes) in enumerate(pairs):
        inputs[0, i] = (name, first, second)
        for j in range(48):
            chosen, swapped = j < votes, j % 2 == 1
            shown = (second, first) if swapped else (first, second)
            winner = 1 if chosen != swapped else -1
            triplets[0, 48 * i + j] = (cell(f"reference {j}"), cell(shown[0]), cell(shown[1]), float(winner))
    folder.mkdir(parents=True, exist_ok=True)
    savemat(folder / "pair_pascal.mat", {"new_input": inputs, "category": np.array([[p[3] for p in pairs]], float)})
    savemat(folder / "consensus_pascal.mat", {"triplets": triplets})


def records_of(name, source, **options):
    """{id without the dataset's name and split: record} of a small set; pictures are not taken unless asked for."""
    output = source.parent / f"out-{name}-{len(list(source.parent.iterdir()))}"
    settings = {"images": "none", "allow_subset": True} | options
    done = convert(name, source, output, **settings)
    found = load_records(output, max_rejected=1.0) if "images" in options else None
    lines = [json.loads(line) for line in (output / "records.jsonl").read_text().splitlines()]
    assert done.written == len(lines) == (len(found.records) if found else len(lines))
    rejected = [json.loads(line)["reason"] for line in (output / "rejected.jsonl").read_text().splitlines()]
    return {re.sub(rf"^{name}/((train|validation|test|all)/)?", "", line["id"]): line for line in lines}, rejected
