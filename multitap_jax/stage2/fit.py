"""Fits ridge heads for all objectives and saves them in an artefact."""

import functools
import json
import operator
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import jax
import numpy as np
from rich.console import Console

from multitap_jax.data.records import Rejected, check_rejected_share, iter_records
from multitap_jax.data.seen import FITTED, Print, Seen, from_bytes, to_bytes
from multitap_jax.data.tables import find_records_file
from multitap_jax.parallel.distributed import barrier, from_each_process, is_main_process
from multitap_jax.scoring.artefact import Artefact
from multitap_jax.scoring.manifest import Objective
from multitap_jax.scoring.parts import blocks
from multitap_jax.scoring.progress import progress_bar
from multitap_jax.scoring.scorer import Scorer
from multitap_jax.stage2.embed import WINDOW, embed_stream, link_records, scan
from multitap_jax.stage2.head import RidgeHead
from multitap_jax.stage2.head_params import CRITERIA
from multitap_jax.stage2.store import EmbeddingStore

OFFICIAL_ALPHAS = (1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0)


class Ranges:
    """Lowest and highest rating of each objective, collected while ratings stream by."""

    def __init__(self, names: Sequence[str]):
        self.names = tuple(names)
        self._low = np.full(len(names), np.inf)
        self._high = np.full(len(names), -np.inf)

    def update(self, labels: np.ndarray) -> None:
        """Takes in ratings float32[n, T]; NaN is missing."""
        self._low = np.fmin(self._low, np.fmin.reduce(labels, axis=0, initial=np.inf))
        self._high = np.fmax(self._high, np.fmax.reduce(labels, axis=0, initial=-np.inf))

    def over_all_processes(self) -> "Ranges":
        """Itself, with what all processes have seen. Collective."""
        parts = from_each_process(np.stack([self._low, self._high]).tobytes())
        bounds = np.stack([np.frombuffer(part, np.float64).reshape(2, -1) for part in parts])
        self._low, self._high = bounds[:, 0].min(0), bounds[:, 1].max(0)
        return self

    def objectives(self, head: RidgeHead) -> list[Objective]:
        """The objectives as the artefact describes them."""
        # Training error says nothing about new pairs, so it is not passed off as a cross-validated score.
        held_out = head.criterion_ != "train-mse"
        scores = [float(r2) if held_out and not np.isnan(r2) else None for r2 in head.r2_]
        rows = zip(self.names, self._low, self._high, head.alpha_, scores, strict=True)
        return [
            Objective(name, (float(low), float(high)), alpha=float(alpha), cv_score=score)
            for name, low, high, alpha, score in rows
        ]


def make_head(alphas: Sequence[str | float], cv: str | int, selection: str) -> RidgeHead:
    """A ridge head from settings as they come from flags."""
    try:
        values: str | list[float] = [float(alpha) for alpha in alphas] if alphas else "auto"
    except ValueError:
        raise ValueError(
            f"--alphas={','.join(map(str, alphas))}: expected positive numbers, such as 0.1,1,10"
        ) from None
    if selection == "train-mse" and values == "auto":
        values = list(OFFICIAL_ALPHAS)
    if str(cv) not in CRITERIA and not str(cv).isdigit():
        raise ValueError(f"--cv={cv}: expected a number of folds or one of {', '.join(CRITERIA)}")
    return RidgeHead(
        alphas=values,
        cv=cv if cv in CRITERIA else int(cv),
        selection=selection,
        alpha_per_target=selection != "train-mse",  # the official code picks one alpha for all
    )


def fit_store(head: RidgeHead, embeddings: str | Path, checkpoint: str | Path) -> Artefact:
    """Fits `head` to the embeddings of a store and saves it in the artefact `checkpoint`.

    Of several processes each adds up its share of the shards, and the first saves.

    Raises:
      StoreError: unreadable, unfinished, without ratings, or embeddings of another model.
    """
    artefact, store = Artefact.open(checkpoint), EmbeddingStore(embeddings)
    if store.model_hash != artefact.embedding_hash:
        raise ValueError(
            f"{embeddings}: made by another model, or under another contract (hash {store.model_hash[:12]}), than "
            f"{checkpoint} ({artefact.embedding_hash[:12]}); embed again with this checkpoint"
        )
    _check_rated(store.objectives, embeddings)
    ranges = Ranges(store.objectives)
    for _, labels, _ in store.batches():
        ranges.update(labels)
    head.fit_store(store, mesh=_mesh())
    return _save(head, artefact, ranges, store.seen)


def fit_records(
    head: RidgeHead,
    scorer: Scorer,
    path: str | Path,
    *,
    max_rejected: float = 0.01,
    allow_outside_root: bool = False,
    show_progress: bool = True,
) -> Artefact:
    """Embeds the records of a file and fits `head` to them on the way; saves it in the scorer's artefact.

    Of several processes each embeds its share of the records, and the first saves.
    """
    file = find_records_file(path)
    lines, names = scan(file, allow_outside_root=allow_outside_root)
    _check_rated(names, file)
    with progress_bar(lines, enabled=show_progress, label="linking records", unit="records") as advance:
        linked = link_records(file, allow_outside_root=allow_outside_root, advance=advance)
    ranges, rejected, rows = Ranges(names), [], 0
    prints: list[Print] = []

    def parts(advance):
        nonlocal rows
        index, count = jax.process_index(), jax.process_count()
        every = blocks(iter_records(file, allow_outside_root=allow_outside_root), WINDOW)
        mine = (block.items for number, block in enumerate(every) if number % count == index)
        for part in embed_stream(scorer, mine, names, linked):
            advance(len(part.ids) + len(part.rejected))
            rejected.extend(part.rejected)
            prints.extend(part.prints)
            rows += len(part.ids)
            ranges.update(part.labels)
            yield part.embeddings, part.labels, part.groups

    with progress_bar(lines, enabled=show_progress, label="embedding") as advance:
        head.fit_stream(parts(advance), objective_names=names, mesh=_mesh())
    found = [json.loads(part) for part in from_each_process(json.dumps([rows, list(map(asdict, rejected))]).encode())]
    lost = [Rejected(**item) for _, items in found for item in items]
    check_rejected_share(file, sum(count for count, _ in found), sorted(lost, key=lambda r: r.line), max_rejected)
    seen = [from_bytes(part, file)[FITTED] for part in from_each_process(to_bytes({FITTED: Seen.of(prints)}))]
    return _save(head, scorer.artefact, ranges, functools.reduce(operator.or_, seen))


def _mesh() -> jax.sharding.Mesh | None:
    """All devices where they belong to several processes, else the default device."""
    return jax.make_mesh((jax.device_count(),), ("data",)) if jax.process_count() > 1 else None


def _check_rated(names: Sequence[str], source: str | Path) -> None:
    if not names:
        raise ValueError(
            f"{source}: no record has ratings, so there is nothing to fit; add ratings: {{objective: number}}"
        )


def _save(head: RidgeHead, artefact: Artefact, ranges: Ranges, seen: Seen | None) -> Artefact:
    objectives = ranges.over_all_processes().objectives(head)
    if is_main_process():
        artefact.add_ridge(head, objectives, seen)
        Console().print(head.summary())
    barrier("heads saved")
    return Artefact.open(artefact.folder)
