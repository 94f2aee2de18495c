"""The table of datasets: what `multitap convert` reads."""

import textwrap
from pathlib import Path

from multitap_jax.data.sources import (
    align_anything,
    composite,
    eye4all,
    flickr8k,
    foil,
    hpdv2,
    imagereward,
    nebula,
    oid,
    pascal50s,
    polaris,
    tables,
    visionreward,
)
from multitap_jax.data.sources.base import Dataset, SourceError
from multitap_jax.data.sources.files import looking_like
from multitap_jax.data.tables import nearest

DATASETS: dict[str, Dataset] = {
    dataset.name: dataset
    for dataset in (
        flickr8k.EXPERT,
        flickr8k.CROWD,
        composite.COMPOSITE,
        pascal50s.PASCAL,
        foil.FOIL,
        polaris.POLARIS,
        polaris.STAR,
        nebula.NEBULA,
        oid.OID,
        imagereward.IMAGEREWARD,
        hpdv2.HPD,
        visionreward.VISIONREWARD,
        align_anything.ANSWERS,
        align_anything.PICTURES,
        eye4all.MULTI,
        eye4all.PREF,
        tables.AGIQA,
        tables.TABLE,
    )
}


def dataset_named(name: str) -> Dataset:
    """A dataset of the table. Raises SourceError, naming the nearest, where there is none of that name."""
    if name not in DATASETS:
        raise SourceError(f"--dataset={name}: not known{nearest(name, DATASETS)}; known are {', '.join(DATASETS)}")
    return DATASETS[name]


def hint(path: Path) -> str:
    """What to do with public files that were given in the place of records; "" where they are no such files."""
    if not path.exists():
        return ""
    there = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    alike = looking_like(there, DATASETS.values())
    if not alike:
        return ""
    names = " or ".join(f"--dataset={one.name}" for one in alike)
    return (
        f"\nThis looks like {' or '.join(one.title for one in alike)} as published, which becomes records first: "
        f"multitap convert {names} --source={path} --output=RECORDS"
    )


def describe() -> str:
    """The table as text: name, published counts, what is read, what it gives, where it is from."""
    lines = ["Datasets (counts as published; * is the split read without --split):"]
    for dataset in DATASETS.values():
        counts = ", ".join(f"{name}{'*' * (name == dataset.split)} {n:,}" for name, n in dataset.counts.items())
        facts = ["reads " + "; or ".join(map(str, dataset.layouts)), dataset.gives, dataset.origin]
        if dataset.protocols:
            facts.insert(2, f"counted by --benchmark={' or '.join(dataset.protocols)}")
        lines.append(f"  {dataset.name}  {dataset.title}" + f" ({counts})" * bool(counts))
        lines += [textwrap.fill(fact, 96, initial_indent=" " * 6, subsequent_indent=" " * 8) for fact in facts]
    return "\n".join(lines)
