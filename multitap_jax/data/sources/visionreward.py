"""VisionRewardDB-Image: about 18 dimensions, each on a scale of its own, and the answers to a checklist.

Dimensions are whatever `annotation` names; the answers of `meta_result` are meta_00, meta_01, ... as published.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from multitap_jax.data.sources.base import Dataset, Draft, Item, Layout, Request, rejected
from multitap_jax.data.sources.files import embedded, number, rows

COLUMNS = ("image", "prompt", "annotation", "meta_result")


def _read(paths: Sequence[Path], request: Request) -> Iterator[Item]:
    for place, row in enumerate(rows(paths, request.at, COLUMNS)):
        name = f"{place:06d}"
        try:
            ratings = {str(key): number(value, key) for key, value in (row["annotation"] or {}).items()}
            answers = enumerate(row["meta_result"] or [])
            ratings |= {f"meta_{index:02d}": number(value, f"meta_result {index}") for index, value in answers}
            draft = Draft(name, embedded(row["image"]), row["prompt"] or "", ratings=ratings)
        except ValueError as error:
            yield rejected(name, str(error))
            continue
        yield draft


VISIONREWARD = Dataset(
    name="visionreward-image",
    title="VisionRewardDB-Image",
    layouts=(Layout("*.parquet", frozenset(COLUMNS), _read, by_split=True),),
    split="train",
    gives="ratings: the dimensions of annotation, and meta_00, ... of meta_result",
    origin="Xu et al., 2024; huggingface.co/datasets/THUDM/VisionRewardDB-Image",
)
