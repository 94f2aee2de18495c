"""Flickr8k-Expert and Flickr8k-CF: JSON as CLIPScore, PAC-S and FLEUR use it, or the annotations as published.

Expert: three experts rate each pair from 1 to 4. CF: the share of the crowd that said yes. Candidates that are captions
of their own picture are left out of Expert (the JSON form has done so already), as its users do.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from multitap_jax.data.sources.base import Dataset, Draft, Item, Layout, Request, SourceError, mapped, rejected
from multitap_jax.data.sources.files import lines, read_json

TOKENS = "Flickr8k.token.txt"
EXPERTS = ("expert_1", "expert_2", "expert_3")


def _entries(paths: Sequence[Path], each: int) -> Iterator[tuple[str, str, str, list[float]]]:
    """(id, picture, caption, ratings) of each pair, in order; its `each` judgements stand in a row."""
    for path in paths:
        for name, entry in read_json(path).items():
            judged = entry["human_judgement"]
            for place, start in enumerate(range(0, len(judged), each)):
                found = judged[start : start + each]
                captions = {judgement["caption"] for judgement in found}
                if len(captions) > 1 or len(found) < each:
                    raise SourceError(f"{path}: {name}: expected {each} judgements of each pair in a row, at {start}")
                picture = found[0].get("image_path") or entry.get("image_path") or f"{name}.jpg"
                yield f"{name}/{place}", picture, captions.pop(), [float(judgement["rating"]) for judgement in found]


def _captions(path: Path) -> dict[str, str]:
    return {name: text.strip() for name, text, *_ in lines(path, 2)}


def _expert(name: str, picture: str, caption: str, ratings: list[float]) -> Item:
    try:
        for rating in ratings:
            mapped(rating, 1, 4)
        score = mapped(sum(ratings), 3, 12)  # the sum is exact, so equal means are equal
    except ValueError as error:
        return rejected(name, str(error))
    return Draft(
        name, picture, " ".join(caption.split()), score=score, ratings=dict(zip(EXPERTS, ratings, strict=True))
    )


def _read_expert_json(paths: Sequence[Path], request: Request) -> Iterator[Item]:
    for name, picture, caption, ratings in _entries(paths, 3):
        if max(ratings) < 1:
            raise SourceError(
                f"{paths[0]}: rates pairs below 1, so this is not Flickr8k-Expert (1 to 4). "
                "It looks like Flickr8k-CF: --dataset=flickr8k-cf"
            )
        yield _expert(name, picture, caption, ratings)


def _read_expert_txt(paths: Sequence[Path], request: Request) -> Iterator[Item]:
    captions = _captions(paths[0].with_name(TOKENS))
    for line, (picture, caption, *cells) in enumerate(lines(paths[0], 5, request.at)):
        if caption.partition("#")[0] == picture:
            continue  # the picture's own caption
        name = f"{Path(picture).stem}/{line}"
        if caption not in captions:
            yield rejected(name, f"caption {caption} is not in {TOKENS}")
            continue
        yield _expert(name, picture, captions[caption], [float(cell) for cell in cells[:3]])


def _crowd(name: str, picture: str, caption: str, share: float) -> Item:
    try:
        return Draft(name, picture, " ".join(caption.split()), score=mapped(share, 0, 1, "share of yes"))
    except ValueError as error:
        return rejected(name, str(error))


def _read_crowd_json(paths: Sequence[Path], request: Request) -> Iterator[Item]:
    for name, picture, caption, (share,) in _entries(paths, 1):
        if share > 1:
            raise SourceError(
                f"{paths[0]}: rates pairs above 1, so this is not Flickr8k-CF (shares of yes). "
                "It looks like Flickr8k-Expert: --dataset=flickr8k-expert"
            )
        yield _crowd(name, picture, caption, share)


def _read_crowd_txt(paths: Sequence[Path], request: Request) -> Iterator[Item]:
    captions = _captions(paths[0].with_name(TOKENS))
    for line, (picture, caption, share, *_) in enumerate(lines(paths[0], 3, request.at)):
        name = f"{Path(picture).stem}/{line}"
        if caption not in captions:
            yield rejected(name, f"caption {caption} is not in {TOKENS}")
            continue
        yield _crowd(name, picture, captions[caption], float(share))


_JUDGED = frozenset({"human_judgement", "ground_truth"})
_ORIGIN = "Hodosh et al., JAIR 2013; JSON: github.com/jmhessel/clipscore, github.com/Yebin46/FLEUR"

EXPERT = Dataset(
    name="flickr8k-expert",
    title="Flickr8k-Expert",
    layouts=(
        Layout("flickr8k*.json", _JUDGED, _read_expert_json),
        Layout("ExpertAnnotations.txt", frozenset(), _read_expert_txt, beside=(TOKENS,)),
    ),
    counts={"test": 5664},
    gives="the experts' ratings 1-4 as expert_1, expert_2, expert_3; score: their mean on 0..1",
    origin=_ORIGIN,
    protocols=(
        "flickr8k-expert",
        "flickr8k-expert-mean",
    ),
)
CROWD = Dataset(
    name="flickr8k-cf",
    title="Flickr8k-CF",
    layouts=(
        Layout("crowdflower_flickr8k*.json", _JUDGED, _read_crowd_json),
        Layout("CrowdFlowerAnnotations.txt", frozenset(), _read_crowd_txt, beside=(TOKENS,)),
    ),
    counts={"test": 47830},
    gives="score: the share of the crowd that said yes",
    origin=_ORIGIN,
    protocols=("flickr8k-cf",),
)
