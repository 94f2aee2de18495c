"""How each benchmark is counted: the table of protocols, and records turned into judgements or comparisons.

A correlation has one row a judgement: a record's score against what people said. An accuracy has one row a comparison:
two records of one group that people did not rate alike; the score must order them as people did.
"""

import dataclasses
import textwrap
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from multitap_jax.data.records import Record, group_keys, iter_records
from multitap_jax.data.sources.convert import read_dataset_note
from multitap_jax.data.sources.files import ALL
from multitap_jax.data.sources.registry import DATASETS
from multitap_jax.data.tables import RecordsError, nearest, some
from multitap_jax.evaluation.correlation import kendall_tau
from multitap_jax.evaluation.resampling import Taus, shares, weights

TieRule = Literal["loss", "half", "second"]
TIES: Mapping[str, str] = {
    "loss": "equal scores count as wrong",
    "half": "equal scores count half, which is what drawing lots gives on average",
    "second": "equal scores count for the pair's second side, as the official code counts them",
}


class ProtocolError(RecordsError):
    """Records or scores that a benchmark cannot be counted with; the message has counts and examples."""


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How one benchmark is counted.

    Attributes:
      name: as --benchmark takes it.
      dataset: what `multitap convert` calls its records; "" takes any.
      statistic: what is reported first.
      human: what people said: "score" or "ratings.NAME", one or several.
      each: with several, every one is a judgement of its own (True), or their mean is (False).
      records, comparisons: how many there are in the published form; None where that is not known.
      ties: the rule for equal scores; of accuracies only.
      categories: report by what stands before the first slash of the group.
      text: where the protocol comes from, and what to know.
    """

    name: str
    dataset: str
    statistic: Literal["tau_b", "tau_c", "accuracy"]
    human: tuple[str, ...] = ("score",)
    each: bool = False
    records: int | None = None
    comparisons: int | None = None
    ties: TieRule = "loss"
    categories: bool = False
    text: str = ""

    def describe(self) -> str:
        """One paragraph: what is compared with what, and how ties count."""
        said = self.human[0] if len(self.human) == 1 else f"{self.human[0]} to {self.human[-1]}"
        if self.statistic == "accuracy":
            what = f"share of the comparisons inside a group, untied in {said}, that the scores order as people did; "
            how = TIES[self.ties]
        else:
            rows = "each of them a judgement, the score repeated" if self.each else "their mean"
            what = f"Kendall's {self.statistic} of the scores with {said}" + f", {rows}" * (len(self.human) > 1)
            how = ", one row a record" * (not self.each)
        return f"{what}{how}. {self.text}".strip()


PREFERENCE = ("ratings.preference",)
_EXPERTS = ("ratings.expert_1", "ratings.expert_2", "ratings.expert_3")
_TABLE = (
    Protocol(
        "flickr8k-expert",
        "flickr8k-expert",
        "tau_c",
        _EXPERTS,
        each=True,
        records=5664,
        text="16,992 judgements: the protocol of CLIPScore, PAC-S, Polos, FLEUR and of MULTI-TAP's predecessor.",
    ),
    Protocol(
        "flickr8k-expert-mean",
        "flickr8k-expert",
        "tau_c",
        _EXPERTS,
        records=5664,
        text="G-VEval's protocol, about 3 points higher on the same scores: not comparable with flickr8k-expert.",
    ),
    Protocol("flickr8k-cf", "flickr8k-cf", "tau_b", records=47830, text="Share of the crowd that said yes."),
    Protocol("composite", "composite", "tau_c", records=11985, text="Correctness from 1 to 5."),
    Protocol("nebula", "nebula", "tau_c", records=3298, text="The test split."),
    Protocol(
        "polaris",
        "polaris",
        "tau_c",
        records=26122,
        text="The test split; some report tau_b. In the domain of whatever was trained on Polaris.",
    ),
    Protocol(
        "pascal-50s",
        "pascal-50s",
        "accuracy",
        PREFERENCE,
        records=8000,
        comparisons=4000,
        ties="second",
        categories=True,
        text="HC: both captions human and correct, HI: human, one incorrect, HM: human and machine, MM: both machine. "
        "CLIPScore draws lots for equal scores (half), FLEUR counts them wrong (loss).",
    ),
    Protocol("foil", "foil", "accuracy", PREFERENCE, text="All pairs, as Polos; CLIPScore keeps one a picture."),
    Protocol(
        "polaris-star",
        "polaris-star",
        "accuracy",
        PREFERENCE,
        text="Polaris validation, human_score <= 0.5: the first reference must beat the candidate. In the domain of "
        "whatever was trained on Polaris.",
    ),
    Protocol("oid-star", "oid-star", "accuracy", text="Pictures with exactly two rated captions."),
    Protocol(
        "imagereward",
        "imagereward",
        "accuracy",
        PREFERENCE,
        records=2720,
        comparisons=6399,
        text="All pairs of a prompt's pictures that people ranked apart, of the test split (466 prompts).",
    ),
    Protocol("hpdv2", "hpdv2", "accuracy", PREFERENCE, text="All pairs of a prompt's pictures ranked apart."),
    Protocol("eye4all-pref", "eye4all-pref", "accuracy", PREFERENCE, text="The chosen answer must beat the rejected."),
    Protocol("align-anything-ti2t", "align-anything-ti2t", "accuracy", PREFERENCE, text="overall_response."),
    Protocol("align-anything-t2i", "align-anything-t2i", "accuracy", PREFERENCE, text="overall_image."),
)
PROTOCOLS: dict[str, Protocol] = {protocol.name: protocol for protocol in _TABLE}


def protocol_named(name: str, *, ties: str | None = None) -> Protocol:
    """A protocol of the table, with another rule for equal scores if one is given.

    Raises:
      ProtocolError: unknown, or a rule for a correlation.
    """
    if name not in PROTOCOLS:
        raise ProtocolError(
            f"benchmark {name!r} is not known{nearest(name, PROTOCOLS)}; known are {', '.join(PROTOCOLS)}"
        )
    protocol = PROTOCOLS[name]
    if ties is None:
        return protocol
    if protocol.statistic != "accuracy" or ties not in TIES:
        raise ProtocolError(f"ties={ties!r}: {', '.join(TIES)} are for accuracies; {name} reports {protocol.statistic}")
    return dataclasses.replace(protocol, ties=typing.cast(TieRule, ties))


def describe() -> str:
    """The table as text."""
    lines = ["Benchmarks (--benchmark), of what `multitap convert` makes of the dataset of that name:"]
    for protocol in PROTOCOLS.values():
        counts = f"{protocol.records:,} records, " if protocol.records else ""
        text = f"{counts}{protocol.describe()}"
        lines.append(f"  {protocol.name}")
        lines.append(textwrap.fill(text, 96, initial_indent=" " * 6, subsequent_indent=" " * 6))
    return "\n".join(lines)


class Benchmark:
    """A protocol with its records: scores of the records, float64[N] in their order, go in, statistics come out.

    Attributes:
      protocol, records: as given.
      subset: whether the numbers or the split are not the published ones.
      rows: int[n] or int[n, 2]: the record of each judgement, or the better and the worse of each comparison.
      human: float64[n], what people said; of accuracies how much better the better one is.
      groups: [n] labels; what shares a group or picture is resampled together.
      categories: [n] labels, or None.
    """

    def __init__(self, protocol: Protocol, records: Sequence[Record], *, allow_subset: bool = False):
        self.protocol, self.records = protocol, records
        pairwise = protocol.statistic == "accuracy"
        self.rows, self.human = (_comparisons if pairwise else _judgements)(protocol, records)
        keys = np.array(group_keys(records), dtype=object)
        first = self.rows[:, 0] if pairwise else self.rows
        _, member = np.unique(keys.astype(str), return_inverse=True)
        self.groups = member[first]
        self.categories = None
        if protocol.categories:
            groups = [(record.group or "").removeprefix(f"{protocol.dataset}/") for record in records]
            self.categories = np.array([group.partition("/")[0] for group in groups])[first]
        self.subset = self._is_subset()
        if self.subset and not allow_subset:
            raise ProtocolError(f"{self._counts()}. --allow_subset=True counts what is there, and the report says so")

    @classmethod
    def open(
        cls, protocol: Protocol, path: str | Path, *, allow_subset: bool = False, allow_outside_root: bool = False
    ) -> "Benchmark":
        """Reads the records of a benchmark; their pictures need not be there.

        Raises:
          ProtocolError: of another dataset or split, with unusable records, without what people said, or of another
            number.
        """
        note = read_dataset_note(path)
        if note is not None and protocol.dataset not in ("", note["dataset"]):
            fits = note.get("protocols", [])
            remedy = f"they are counted with --benchmark={' or '.join(fits)}" if fits else "no benchmark takes them"
            raise ProtocolError(
                f"{path}: records of {note.get('title', note['dataset'])}, and {protocol.name} takes "
                f"{protocol.dataset}; {remedy}"
            )
        # Not told by the number of records: Nebula's splits are equally large, and that of others is not known.
        counted = DATASETS[protocol.dataset].split if protocol.dataset else ALL
        other_split = note is not None and counted != ALL and note["split"] != counted
        if note is not None and other_split and not allow_subset:
            raise ProtocolError(
                f"{path}: records of the split {note['split']!r} of {note.get('title', note['dataset'])}, and "
                f"{protocol.name} counts {counted!r}. --allow_subset=True counts what is there, and the report says so"
            )
        items = list(iter_records(path, allow_outside_root=allow_outside_root, need_images=False))
        records = [item for item in items if isinstance(item, Record)]
        if bad := [item for item in items if not isinstance(item, Record)]:
            shown = "; ".join(f"line {item.line}: {item.reason}" for item in bad[:3])
            raise ProtocolError(f"{path}: {len(bad):,} of {len(items):,} records are unusable: {shown}")
        if not records:
            raise ProtocolError(f"{path}: no records in the file")
        benchmark = cls(protocol, records, allow_subset=allow_subset)
        benchmark.subset |= other_split
        return benchmark

    def human_means(self) -> np.ndarray:
        """float64[N], what people said of each record, in the mean."""
        return np.array([np.mean([_target(record, name) for name in self.protocol.human]) for record in self.records])

    def statistic(self, scores: np.ndarray) -> float:
        """The protocol's statistic; NaN where it is undefined (all scores equal)."""
        if self.protocol.statistic == "accuracy":
            return float(self.hits(scores).mean())
        return kendall_tau(scores[self.rows], self.human, "b" if self.protocol.statistic == "tau_b" else "c")

    def hits(self, scores: np.ndarray, ties: str | None = None) -> np.ndarray:
        """float64[n], of each comparison: 1 where the scores order it as people did, 0 or a half where not."""
        better, worse = scores[self.rows].T
        rule = ties or self.protocol.ties
        equal = (self.rows[:, 0] > self.rows[:, 1]) * 1.0 if rule == "second" else {"loss": 0.0, "half": 0.5}[rule]
        return np.where(better == worse, equal, (better > worse) * 1.0)

    def ties(self, scores: np.ndarray) -> int:
        """Comparisons whose sides score alike; of a correlation, pairs of judgements with equal scores."""
        if self.protocol.statistic == "accuracy":
            return int((scores[self.rows[:, 0]] == scores[self.rows[:, 1]]).sum())
        _, counts = np.unique(scores[self.rows], return_counts=True)
        return int((counts * (counts - 1) // 2).sum())

    def resampled(self, scores: Sequence[np.ndarray], samples: int, seed: int) -> np.ndarray:
        """float64[len(scores), S, K]: the statistic (of each of K categories, where there are) of the same resamples
        for several sets of scores; S is `samples`, or 0 where there is but one group."""
        measures = [self._measure(given) for given in scores]
        drawn = [[measure(w) for measure in measures] for w in weights(len(self.rows), self.groups, samples, seed)]
        if not drawn:
            return np.zeros((len(scores), 0, 1 + len(self.by_category())))
        return np.concatenate([np.stack(part) for part in drawn], axis=1)

    def _measure(self, scores: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
        """From weights of the rows, float32[n, S], to the statistic, float64[S, K]."""
        if self.protocol.statistic != "accuracy":
            taus, which = Taus(scores[self.rows], self.human), int(self.protocol.statistic == "tau_c")
            return lambda w: taus(w)[which][:, None]
        hits, parts = self.hits(scores), [np.ones(len(self.rows), bool), *self.by_category().values()]
        return lambda w: np.stack([shares(hits[part], w[part]) for part in parts], axis=1)

    def by_category(self) -> dict[str, np.ndarray]:
        """bool[n] of each category, in the order they come in; empty where the protocol has none."""
        if self.categories is None:
            return {}
        return {str(name): self.categories == name for name in dict.fromkeys(self.categories)}

    def _is_subset(self) -> bool:
        wanted, pairs = self.protocol.records, self.protocol.comparisons
        return (wanted is not None and len(self.records) != wanted) or (pairs is not None and len(self.rows) != pairs)

    def _counts(self) -> str:
        pairs = self.protocol.comparisons
        found = f"{len(self.records):,} records" + f" with {len(self.rows):,} comparisons" * (pairs is not None)
        wanted = f"{self.protocol.records:,}" + (f" with {pairs:,}" if pairs is not None else "")
        return f"{self.protocol.name}: {found}, but the benchmark has {wanted}"


def _judgements(protocol: Protocol, records: Sequence[Record]) -> tuple[np.ndarray, np.ndarray]:
    """Row and human score of each judgement."""
    said = np.array([[_target(record, name) for name in protocol.human] for record in records], np.float64)
    _refuse_unrated(protocol, records, said)
    if protocol.each:
        return np.arange(len(records)).repeat(said.shape[1]), said.reshape(-1)
    return np.arange(len(records)), said.sum(axis=1) / said.shape[1]


def _comparisons(protocol: Protocol, records: Sequence[Record]) -> tuple[np.ndarray, np.ndarray]:
    """(better, worse) rows, and by how much, of all pairs inside a group that people rated apart."""
    (name,) = protocol.human
    said = np.array([[_target(record, name)] for record in records], np.float64)
    _refuse_unrated(protocol, records, said)
    lone = [record.id for record in records if record.group is None]
    if lone:
        raise ProtocolError(f"{protocol.name}: {len(lone):,} records have no group to be compared in: {some(lone)}")
    pairs = list(_pairs([record.group for record in records], said[:, 0]))
    if not pairs:
        raise ProtocolError(f"{protocol.name}: no two records of a group differ in {name}: nothing to compare")
    rows = np.array(pairs, np.int64)
    return rows, said[rows[:, 0], 0] - said[rows[:, 1], 0]


def _pairs(groups: Sequence[str | None], said: np.ndarray) -> Iterator[tuple[int, int]]:
    members: dict[str | None, list[int]] = {}
    for row, group in enumerate(groups):
        members.setdefault(group, []).append(row)
    for rows in members.values():
        for place, one in enumerate(rows):
            for other in rows[place + 1 :]:
                if said[one] != said[other]:
                    yield (one, other) if said[one] > said[other] else (other, one)


def _target(record: Record, name: str) -> float:
    value = record.target(name)
    return float("nan") if value is None else value


def _refuse_unrated(protocol: Protocol, records: Sequence[Record], said: np.ndarray) -> None:
    bad = [record.id for record, row in zip(records, said, strict=True) if np.isnan(row).any()]
    if bad:
        names = ", ".join(protocol.human)
        raise ProtocolError(
            f"{protocol.name}: {len(bad):,} of {len(records):,} records lack {names}: {some(bad)}. Is this the folder "
            f"that `multitap convert --dataset={protocol.dataset or 'NAME'}` wrote?"
        )
