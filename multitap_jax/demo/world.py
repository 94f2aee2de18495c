"""Writes the demo's data set: pictures, and records of their texts with ratings, split by scene."""

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from multitap_jax.data.records import Record
from multitap_jax.demo.render import SIZE, render_world
from multitap_jax.demo.scenes import Scene, scene_rng
from multitap_jax.demo.texts import REQUEST, annotate, rule_ratings, write_texts

_MARKER = "world.json"
_VERSION = 1
"""Goes up with every change of what the same parameters draw or write, so that an older world is not taken for it."""


class WorldPaths(NamedTuple):
    """The two records files (JSON lines) of a world; image paths in them are relative to their folder."""

    train: Path
    heldout: Path


def build_world(folder: str | Path, num_scenes: int, seed: int, heldout_share: float) -> WorldPaths:
    """Draws `num_scenes` scenes with six rated texts each and writes `train.jsonl` and `heldout.jsonl`.

    All texts of a scene are on the same side of the split. A folder that already holds the complete world of the same
    arguments is left as it is; another one is replaced. The result depends on the arguments alone.

    Args:
      folder: where to write; made if absent. Only `images`, the two records files and the marker in it are touched.
      num_scenes: number of pictures.
      seed: seed of everything that is drawn.
      heldout_share: share of the scenes, in (0, 1), that goes to `heldout.jsonl` (at least one).

    Raises:
      ValueError: fewer than 2 scenes, or a share that leaves a side without a scene.
    """
    num_heldout = max(1, round(num_scenes * heldout_share))
    if not 0.0 < heldout_share < 1.0 or num_heldout >= num_scenes:
        raise ValueError(
            f"num_scenes = {num_scenes}, heldout_share = {heldout_share}: both sides of the split need a scene; "
            "give at least 2 scenes and a share between 0 and 1"
        )
    folder = Path(folder)
    paths = WorldPaths(folder / "train.jsonl", folder / "heldout.jsonl")
    parameters = {
        "version": _VERSION,
        "num_scenes": num_scenes,
        "seed": seed,
        "heldout_share": heldout_share,
        "size": SIZE,
    }
    marker = folder / _MARKER
    if _read_marker(marker) == parameters and all(path.is_file() for path in paths):
        return paths
    marker.unlink(missing_ok=True)
    shutil.rmtree(folder / "images", ignore_errors=True)
    drawn = render_world(folder, num_scenes, seed)
    records = [_scene_records(scene, image, index, seed) for index, (scene, image) in enumerate(drawn)]
    _write_lines(paths.train, records[: num_scenes - num_heldout])
    _write_lines(paths.heldout, records[num_scenes - num_heldout :])
    # The marker comes last and at once: a world that was interrupted is drawn anew.
    draft = folder / (_MARKER + ".tmp")
    draft.write_text(json.dumps(parameters) + "\n", encoding="utf-8")
    os.replace(draft, marker)
    return paths


def _scene_records(scene: Scene, image: str, index: int, seed: int) -> list[dict[str, Any]]:
    """The records of one scene; `score` is the overall rating, brought from 1..5 to 0..1."""
    rng = scene_rng(seed, index, 2)
    records = []
    for number, guidance in enumerate(write_texts(scene, rng)):
        ratings = annotate(rule_ratings(scene, guidance), rng)
        records.append(
            {
                "id": f"scene-{index:05d}-{number}",
                "image": image,
                "text": guidance.text,
                "request": REQUEST,
                "score": round((ratings["overall"] - 1.0) / 4.0, 4),
                "ratings": ratings,
                "group": f"scene-{index:05d}",
            }
        )
    return records


def scene_index(record: Record) -> int:
    """Which scene a record of a world is about: `draw_scene(scene_rng(seed, index, 0))` gives it again."""
    return int(str(record.group).removeprefix("scene-"))


def _read_marker(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _write_lines(path: Path, groups: Iterable[Iterable[Mapping[str, Any]]]) -> None:
    lines = (json.dumps(record, ensure_ascii=False) for group in groups for record in group)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
