"""Pascal-50S: two captions of a picture, and which of them 48 people found nearer to references.

JSON as FLEUR uses it, or the .mat files as published, from which votes are counted here. JSON has equal votes resolved
by lot (as its makers do); of .mat they give no preference, so such a pair is not compared.
"""

import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from multitap_jax.data.sources.base import Dataset, Draft, Item, Layout, Request, SourceError, rejected
from multitap_jax.data.sources.files import read_json

CATEGORIES = {1: "HC", 2: "HI", 3: "HM", 4: "MM"}
VOTES = 48
CONSENSUS = "consensus_pascal.mat"


def _pair(group: str, picture: str, captions: Sequence[str], preference: tuple[float, float]) -> Iterator[Item]:
    for side, caption, value in zip("ab", captions, preference, strict=True):
        yield Draft(f"{group}/{side}", picture, caption.strip(), ratings={"preference": value}, group=group)


def _read_json(paths: Sequence[Path], request: Request) -> Iterator[Item]:
    for path in paths:
        content = read_json(path)
        if unknown := sorted(set(content) - set(CATEGORIES.values())):
            raise SourceError(f"{path}: categories {', '.join(unknown)}; Pascal-50S has HC, HI, HM, MM")
        for category, pairs in content.items():
            for place, pair in enumerate(pairs):
                group, label = f"{category}/{place:04d}", pair["label"]
                if label not in (0, 1):
                    yield rejected(group, f"label {label!r} is neither 0 nor 1")
                    yield rejected(group, "the other side of that pair")
                    continue
                yield from _pair(group, pair["image"], pair["captions"], (float(label == 0), float(label == 1)))


def _read_mat(paths: Sequence[Path], request: Request) -> Iterator[Item]:
    pairs = _load(paths[0])
    votes = _load(paths[0].with_name(CONSENSUS))["triplets"].reshape(-1)
    rows, categories = pairs["new_input"].reshape(-1), pairs["category"].reshape(-1)
    if len(votes) != VOTES * len(rows):
        raise SourceError(f"{paths[0]}: {len(rows):,} pairs, and {len(votes):,} votes: expected {VOTES} a pair")
    for place, (row, category) in enumerate(zip(rows, categories, strict=True)):
        picture, first, second = (_text(cell) for cell in row)
        # A vote is (reference, caption, caption, 1 or -1), the captions in either order.
        chosen = [_vote(vote) for vote in votes[VOTES * place : VOTES * (place + 1)]]
        a, b = chosen.count(first), chosen.count(second)
        group = f"{CATEGORIES[int(category)]}/{place:04d}"
        yield from _pair(group, picture, (first, second), (float(a >= b), float(b >= a)))


def _load(path: Path) -> dict[str, Any]:
    """The variables of a .mat file up to version 7.2, which holds numbers, text and cells: nothing in it is run."""
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    try:
        return dict(loadmat(path))
    except (MatReadError, NotImplementedError, OSError, ValueError, TypeError, zlib.error) as error:
        raise SourceError(f"{path}: damaged or no MATLAB file ({error}); download it again") from error


def _vote(vote: Any) -> str:
    _, first, second, which = list(vote.tolist() if isinstance(vote, np.void) else vote)
    return _text(first) if int(np.asarray(_inner(which)).reshape(-1)[0]) == 1 else _text(second)


def _inner(value: Any) -> Any:
    """What MATLAB's cells hold, however deep."""
    while isinstance(value, np.ndarray) and value.dtype == object:
        value = value.reshape(-1)[0]
    return value


def _text(value: Any) -> str:
    return str(np.asarray(_inner(value)).reshape(-1)[0]).strip()


PASCAL = Dataset(
    name="pascal-50s",
    title="Pascal-50S",
    layouts=(
        Layout("*.json", frozenset({"image", "captions", "label", "references"}), _read_json),
        Layout("pair_pascal.mat", frozenset(), _read_mat, beside=(CONSENSUS,)),
    ),
    counts={"test": 8000},
    gives="two records a pair (group: CATEGORY/NUMBER) with preference 1 and 0",
    origin="Vedantam et al., CVPR 2015; JSON: github.com/Yebin46/FLEUR",
    protocols=("pascal-50s",),
)
