"""OID*: pictures of Open Images with exactly two rated captions, the better against the worse."""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from multitap_jax.data.sources.base import Dataset, Draft, Item, Layout, Request, mapped, rejected
from multitap_jax.data.sources.files import number, rows

RATING = "ROUNDED_AVG_USER_RATING"


def _read(paths: Sequence[Path], request: Request) -> Iterator[Item]:
    captions = Counter(row["IMAGE_KEY"] for row in rows(paths, request.at, quoted=False))
    seen: Counter[str] = Counter()
    for row in rows(paths, request.at, quoted=False):
        key = row["IMAGE_KEY"]
        if captions[key] != 2:
            continue
        name = f"{key}/{seen[key]}"
        seen[key] += 1
        try:
            rating = number(row[RATING], RATING)
            if rating is None:
                raise ValueError(f"no {RATING}")
            score = mapped(rating, 0, 1, RATING)
        except ValueError as error:
            yield rejected(name, str(error))
            continue
        yield Draft(name, f"{key}.jpg", row["CAPTION_PRED"], score=score, group=key)


OID = Dataset(
    name="oid-star",
    title="OID*",
    layouts=(Layout("*.tsv", frozenset({"IMAGE_KEY", "CAPTION_PRED", RATING}), _read, by_split=True),),
    split="validation",
    gives="two records a picture (group: the picture); score: the rounded mean rating",
    origin="Levinboim et al., NAACL 2021; OID-rated-image-captions.v2.dev.alignment.tsv",
    protocols=("oid-star",),
)
