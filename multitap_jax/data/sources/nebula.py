"""Nebula: 32,978 judgements of captions (from 0 to 1), as Parquet of the Hub."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from multitap_jax.data.sources.base import Dataset, Draft, Item, Layout, Request, mapped, rejected
from multitap_jax.data.sources.files import embedded, number, rows

COLUMNS = ("file_name", "image", "mt", "human_score")


def _read(paths: Sequence[Path], request: Request) -> Iterator[Item]:
    for place, row in enumerate(rows(paths, request.at, COLUMNS)):
        name = f"{place:05d}"
        try:
            score = number(row["human_score"], "human_score")
            if score is None:
                raise ValueError("no human_score")
            draft = Draft(name, embedded(row["image"]), row["mt"] or "", score=mapped(score, 0, 1, "human_score"))
        except ValueError as error:
            yield rejected(name, str(error))
            continue
        yield draft


NEBULA = Dataset(
    name="nebula",
    title="Nebula",
    layouts=(Layout("*.parquet", frozenset({*COLUMNS, "refs"}), _read, by_split=True),),
    counts={"train": 26382, "validation": 3298, "test": 3298},
    gives="score: human_score, as it is",
    origin="Matsuda et al., ACCV 2024; huggingface.co/datasets/Ka2ukiMatsuda/Nebula",
    protocols=("nebula",),
)
