"""ImageRewardDB: pictures of one prompt, ranked (1 is best, ties allowed) and rated from 1 to 7.

Rankings are in data/test.json of the code's repository; ratings in Parquet of the Hub, pictures embedded or beside.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from multitap_jax.data.sources.base import Dataset, Draft, Item, Layout, Request, mapped, rejected
from multitap_jax.data.sources.files import embedded, entries, minus, number, read_json, rows

RATINGS = {
    "overall": "overall_rating",
    "alignment": "image_text_alignment_rating",
    "fidelity": "fidelity_rating",
}


def _read_rankings(paths: Sequence[Path], request: Request) -> Iterator[Item]:
    for path in paths:
        for entry in entries(path, request.at, read_json(path)):
            pictures, ranks = entry["generations"], entry["ranking"]
            if len(pictures) != len(ranks):
                yield rejected(entry["id"], f"{len(pictures)} pictures, but {len(ranks)} ranks")
                continue
            for place, (picture, rank) in enumerate(zip(pictures, ranks, strict=True)):
                rating = {"preference": minus(rank)}
                yield Draft(f"{entry['id']}/{place}", picture, entry["prompt"], ratings=rating, group=entry["id"])


def _read_ratings(paths: Sequence[Path], request: Request) -> Iterator[Item]:
    seen: Counter[str] = Counter()
    for row in rows(paths, request.at):
        group = str(row["prompt_id"])
        name = f"{group}/{seen[group]}"
        seen[group] += 1
        try:
            picture = embedded(row["image"]) if row.get("image") else row["image_path"]
            ratings = {ours: number(row.get(theirs), theirs) for ours, theirs in RATINGS.items()}
            rank, overall = number(row.get("rank"), "rank"), ratings["overall"]
            score = None if overall is None else mapped(overall, 1, 7, "overall_rating")
        except ValueError as error:
            yield rejected(name, str(error))
            continue
        ratings["preference"] = None if rank is None else -rank
        yield Draft(name, picture, row["prompt"] or "", score=score, ratings=ratings, group=group)


_RATED = frozenset({"prompt_id", "prompt", "rank", "overall_rating"})

IMAGEREWARD = Dataset(
    name="imagereward",
    title="ImageRewardDB",
    layouts=(
        Layout("*.json", frozenset({"id", "prompt", "generations", "ranking"}), _read_rankings, by_split=True),
        Layout("*.parquet", _RATED | {"image"}, _read_ratings, by_split=True),
        Layout("metadata-*.parquet", _RATED | {"image_path"}, _read_ratings, by_split=True),
    ),
    counts={"test": 2720},
    gives="overall, alignment, fidelity 1-7; score: overall on 0..1; preference: minus the rank; group: the prompt",
    origin="Xu et al., NeurIPS 2023; huggingface.co/datasets/THUDM/ImageRewardDB, github.com/THUDM/ImageReward",
    protocols=("imagereward",),
)
