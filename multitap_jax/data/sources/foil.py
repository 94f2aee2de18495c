"""FOIL: a caption of COCO, and the same with one word replaced by a wrong one."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from multitap_jax.data.sources.base import Dataset, Draft, Item, Layout, Request, rejected
from multitap_jax.data.sources.files import read_json


def _read(paths: Sequence[Path], request: Request) -> Iterator[Item]:
    for path in paths:
        content = read_json(path)
        names = {image["id"]: image["file_name"] for image in content["images"]}
        pairs: dict[Any, tuple[list[Any], list[Any]]] = {}
        for note in content["annotations"]:
            pairs.setdefault(note["id"], ([], []))[bool(note["foil"])].append(note)
        for name, (true, foils) in pairs.items():
            if len(true) != 1:
                yield rejected(str(name), f"{len(true)} true captions for {len(foils)} foils, expected one")
                continue
            for place, foil in enumerate(foils):
                group = f"{name}/{place}"
                for side, note in (("foil", foil), ("true", true[0])):
                    preference = {"preference": float(side == "true")}
                    picture = names.get(note["image_id"], f"COCO_val2014_{int(note['image_id']):012d}.jpg")
                    yield Draft(f"{group}/{side}", picture, note["caption"].strip(), ratings=preference, group=group)


FOIL = Dataset(
    name="foil",
    title="FOIL",
    layouts=(Layout("foilv1.0_*.json", frozenset({"caption", "foil", "id", "image_id"}), _read, by_split=True),),
    gives="two records a foil (group: the caption's number / which of its foils) with preference 1 and 0",
    origin="Shekhar et al., ACL 2017; pictures of COCO val2014",
    protocols=("foil",),
)
