"""Composite: how correct a caption is, from 1 to 5; one JSON, or the three tables as published.

The tables of Flickr30k and COCO may hold more captions a picture than the 11,985 pairs that are usually counted.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from multitap_jax.data.sources.base import Dataset, Draft, Item, Layout, Request, mapped, rejected
from multitap_jax.data.sources.files import entries, number, read_json, rows, told_apart


def _draft(name: str, picture: str, caption: str, rating: object) -> Item:
    try:
        value = number(rating, "correctness")
        if value is None:
            return rejected(name, "no rating of correctness")
        score = mapped(value, 1, 5, "correctness")
    except ValueError as error:
        return rejected(name, str(error))
    return Draft(name, picture, " ".join(caption.split()), score=score, ratings={"correctness": value})


def _read_json(paths: Sequence[Path], request: Request) -> Iterator[Item]:
    for path, name in zip(paths, told_apart(paths), strict=True):
        for place, entry in enumerate(entries(path, request.at, read_json(path)["dataset"])):
            yield _draft(f"{name}/{place:05d}", entry["image"], entry["caption"], entry["human"])


def _read_tables(paths: Sequence[Path], request: Request) -> Iterator[Item]:
    for path in paths:
        part = path.stem.partition("_")[0]
        for place, row in enumerate(rows([path], request.at, ragged=True)):
            address = row["Input.image_url"] or ""
            if "/" not in address:
                continue  # the tables end with lines of sums
            for key in row:
                if found := re.fullmatch(r"Input\.text(\d)", key or ""):
                    rating = row.get(f"Answer.Q{found[1]}Answer")
                    if row[key] and rating:
                        yield _draft(f"{part}/{place:04d}/{found[1]}", Path(address).name, row[key], rating)


COMPOSITE = Dataset(
    name="composite",
    title="Composite",
    layouts=(
        Layout("*composite*.json", frozenset({"image", "caption", "human"}), _read_json),
        Layout("*_correctness.csv", frozenset({"Input.image_url", "Input.text1", "Answer.Q1Answer"}), _read_tables),
    ),
    counts={"test": 11985},
    gives="correctness 1-5; score: the same on 0..1",
    origin="Aditya et al., CVIU 2018; pictures of Flickr8k, Flickr30k and COCO",
    protocols=("composite",),
)
