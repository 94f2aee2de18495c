"""HPDv2: pictures of one prompt, ranked in the test split and chosen by pairs in the training split."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from multitap_jax.data.sources.base import Dataset, Draft, Item, Layout, Request, rejected
from multitap_jax.data.sources.files import entries, minus, number, read_json, told_apart


def _drafts(group: str, prompt: str, pictures: Sequence[str], preferences: Sequence[Any]) -> Iterator[Item]:
    if len(pictures) != len(preferences):
        yield rejected(group, f"{len(pictures)} pictures, but {len(preferences)} judgements")
        return
    for side, (picture, preference) in enumerate(zip(pictures, preferences, strict=True)):
        rating = {"preference": number(preference, "preference")}
        yield Draft(f"{group}/{side}", picture, prompt, ratings=rating, group=group)


def _read_rankings(paths: Sequence[Path], request: Request) -> Iterator[Item]:
    for path, name in zip(paths, told_apart(paths), strict=True):
        for place, entry in enumerate(entries(path, request.at, read_json(path))):
            group = f"{name}/{place:06d}"
            yield from _drafts(group, entry["prompt"], entry["image_path"], [minus(rank) for rank in entry["rank"]])


def _read_choices(paths: Sequence[Path], request: Request) -> Iterator[Item]:
    for path, name in zip(paths, told_apart(paths), strict=True):
        for place, entry in enumerate(entries(path, request.at, read_json(path))):
            group = f"{name}/{place:06d}"
            yield from _drafts(group, entry["prompt"], entry["file_path"], entry["human_preference"])


HPD = Dataset(
    name="hpdv2",
    title="HPDv2",
    layouts=(
        Layout("*.json", frozenset({"prompt", "image_path", "rank"}), _read_rankings, by_split=True),
        Layout("*.json", frozenset({"prompt", "file_path", "human_preference"}), _read_choices, by_split=True),
    ),
    gives="preference: minus the rank, or 1 and 0; group: the prompt",
    origin="Wu et al., 2023; huggingface.co/datasets/ymhao/HPDv2",
    protocols=("hpdv2",),
)
