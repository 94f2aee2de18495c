"""Protocols: known answers, the rules for ties, and everything that must stop a benchmark from being counted."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from multitap_jax.cli import main
from multitap_jax.data.records import Record, load_records
from multitap_jax.data.seen import TRAINED, Seen, prints_of, to_bytes
from multitap_jax.data.sources import DATASETS, convert
from multitap_jax.evaluation.benchmark import evaluate_benchmark
from multitap_jax.evaluation.protocols import PROTOCOLS, Benchmark, Protocol, ProtocolError, protocol_named
from multitap_jax.evaluation.scores import ScoresError, read_scores

SHARED = Path(os.environ.get("MULTITAP_SHARED_DATA", Path(__file__).parents[2].parent / "shared/data"))
PUBLISHED = SHARED / "benchmarks"
FLEUR = PUBLISHED / "fleur_flickr8k_expert_scores.jsonl"
needs_published = pytest.mark.skipif(not PUBLISHED.is_dir(), reason="the published annotations are not at hand")


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    folder = tmp_path_factory.mktemp("published")
    for name in ("flickr8k-expert", "pascal-50s", "imagereward"):
        convert(name, PUBLISHED, folder / name, images="none")
    return folder


@needs_published
@pytest.mark.parametrize(
    ("benchmark", "field", "figures"),
    [
        ("flickr8k-expert", "score", {"tau_c": 0.53026, "tau_b": 0.52666}),
        ("flickr8k-expert", "raw_score", {"tau_c": 0.34911, "tau_b": 0.56082}),
        ("flickr8k-expert-mean", "score", {"tau_c": 0.55986, "tau_b": 0.57698}),
    ],
)
def test_fleur_s_published_figures(published, benchmark, field, figures):
    """FLEUR publishes scores in the order of the pairs, without ids."""
    options = {"score_field": field, "bootstrap_samples": 100}
    report = evaluate_benchmark(protocol_named(benchmark), published / "flickr8k-expert", FLEUR, **options)
    found = {report.statistic: report.value.value, **report.others}
    for name, figure in figures.items():
        assert found[name] == pytest.approx(figure, abs=5.01e-6)
    if benchmark.endswith("mean"):
        assert found["Pearson"] == pytest.approx(0.7915, abs=5.01e-5)
    assert report.value.interval.low < report.value.value < report.value.interval.high
    assert (report.n, report.n_groups) == (5664 if benchmark.endswith("mean") else 16_992, 1000)


@needs_published
def test_what_people_cannot_beat(published, tmp_path):
    """The mean rating itself as the score, against each rating."""
    lines = [json.loads(line) for line in (published / "flickr8k-expert/records.jsonl").read_text().splitlines()]
    scores = write(tmp_path / "s.jsonl", [{"id": line["id"], "score": line["score"]} for line in lines[::-1]])
    protocol = protocol_named("flickr8k-expert")
    report = evaluate_benchmark(protocol, published / "flickr8k-expert", scores, bootstrap_samples=0)
    assert report.value.value == pytest.approx(0.70561, abs=5.01e-6)
    assert report.others["tau_b"] == pytest.approx(0.80224, abs=5.01e-6)


@needs_published
def test_imagereward_has_466_prompts_and_6399_untied_pairs(published, tmp_path):
    benchmark = Benchmark.open(protocol_named("imagereward"), published / "imagereward")
    assert len({record.group for record in benchmark.records}) == 466
    assert (len(benchmark.records), len(benchmark.rows)) == (2720, 6399)
    sizes = np.unique([record.group for record in benchmark.records], return_counts=True)[1]
    assert (sizes * (sizes - 1) // 2).sum() - 6399 == 831  # ranked alike
    ranks = np.array([record.ratings["preference"] for record in benchmark.records])
    assert (benchmark.statistic(ranks), benchmark.statistic(-ranks)) == (1.0, 0.0)


@needs_published
def test_pascal_50s_by_category(published):
    benchmark = Benchmark.open(protocol_named("pascal-50s"), published / "pascal-50s")
    assert {name: int(part.sum()) for name, part in benchmark.by_category().items()} == dict.fromkeys(
        ("HI", "HC", "HM", "MM"), 1000
    )
    # label = 1, the second caption, is preferred this often
    always_second = np.tile([0.0, 1.0], 4000)
    hits = benchmark.hits(always_second)
    found = {name: int(hits[part].sum()) for name, part in benchmark.by_category().items()}
    assert found == {"HC": 488, "HI": 501, "HM": 489, "MM": 497}
    # equal scores go to the second side in the official code
    assert benchmark.hits(np.zeros(8000)).sum() == 488 + 501 + 489 + 497
    assert benchmark.hits(np.zeros(8000), "half").sum() == 2000
    assert benchmark.hits(np.zeros(8000), "loss").sum() == 0


def group(name, *preferences, image=None):
    return [
        {
            "id": f"{name}/{side}",
            "image": image or f"{name}.png",
            "text": f"text {side}",
            "ratings": {"preference": preference},
            "group": name,
        }
        for side, preference in enumerate(preferences)
    ]


ANY = Protocol("any", "", "accuracy", ("ratings.preference",))


def opened(tmp_path, rows, protocol=ANY, **options):
    return Benchmark.open(protocol, write(tmp_path / "r/records.jsonl", rows), **options)


def test_rankings_become_all_untied_pairs(tmp_path):
    benchmark = opened(tmp_path, [*group("p", -1, -2, -2, -3), *group("q", 1, 0)])
    pairs = {(benchmark.records[a].id, benchmark.records[b].id) for a, b in benchmark.rows}
    assert pairs == {("p/0", "p/1"), ("p/0", "p/2"), ("p/0", "p/3"), ("p/1", "p/3"), ("p/2", "p/3"), ("q/0", "q/1")}
    assert benchmark.statistic(np.array([4, 3, 2, 1, 0, 1.0])) == 5 / 6
    assert benchmark.ties(np.array([1, 1, 1, 2, 5, 5.0])) == 3


def test_accuracy_is_that_of_a_slow_count_and_its_interval_of_whole_groups(tmp_path):
    rng = np.random.default_rng(0)
    rows = [row for i in range(30) for row in group(f"g{i}", *rng.integers(-3, 0, 4).tolist())]
    benchmark = opened(tmp_path, rows)
    scores = rng.integers(0, 4, len(rows)).astype(float)
    wins = total = 0
    for i, one in enumerate(rows):
        for j, other in enumerate(rows):
            if one["group"] == other["group"] and one["ratings"]["preference"] > other["ratings"]["preference"]:
                total, wins = total + 1, wins + (scores[i] > scores[j])
    assert benchmark.statistic(scores) == wins / total
    drawn = benchmark.resampled([scores, -scores], 200, 0)
    assert drawn.shape == (2, 200, 1)
    assert drawn[0].mean() == pytest.approx(wins / total, abs=0.03)
    assert 0.01 < drawn[0].std() < 0.1


def test_every_protocol_takes_a_dataset_of_the_table_and_is_described():
    for protocol in PROTOCOLS.values():
        assert protocol.dataset in DATASETS
        if protocol.records is not None:
            dataset = DATASETS[protocol.dataset]
            assert dataset.counts[dataset.split] == protocol.records
        assert ("Kendall" in protocol.describe()) == (protocol.statistic != "accuracy")
    text = (Path(__file__).parents[2] / "docs/datasets.md").read_text().partition("## How benchmarks")[2]
    assert all(f"`{name}`" in text for name in PROTOCOLS)
    counted = {name for dataset in DATASETS.values() for name in dataset.protocols}
    assert counted == set(PROTOCOLS)
    assert all(protocol.name in DATASETS[protocol.dataset].protocols for protocol in PROTOCOLS.values())
    assert protocol_named("pascal-50s").ties == "second"
    assert "equal scores count half" in protocol_named("pascal-50s", ties="half").describe()


def test_wrong_names_and_rules():
    with pytest.raises(ProtocolError, match="benchmark 'flickr8k-exprt' is not known; did you mean 'flickr8k-expert'"):
        protocol_named("flickr8k-exprt")
    with pytest.raises(ProtocolError, match="loss, half, second are for accuracies; nebula reports tau_c"):
        protocol_named("nebula", ties="loss")
    with pytest.raises(ProtocolError, match="ties='win'"):
        protocol_named("foil", ties="win")


def test_records_of_something_else(tmp_path):
    rows = group("p", 1, 0)
    with pytest.raises(ProtocolError, match="nebula: 2 records, but the benchmark has 3,298.*--allow_subset"):
        opened(tmp_path, [r | {"score": 0.5} for r in rows], protocol_named("nebula"))
    with pytest.raises(
        ProtocolError, match=r"flickr8k-expert: 2 of 2 records lack ratings.expert_1, .*: p/0, p/1\. Is"
    ):
        opened(tmp_path, rows, protocol_named("flickr8k-expert"))
    assert opened(tmp_path, [r | {"score": 0.5} for r in rows], protocol_named("nebula"), allow_subset=True).subset
    with pytest.raises(ProtocolError, match="any: 1 records have no group"):
        opened(tmp_path, [*rows, rows[0] | {"id": "x", "group": None}])
    with pytest.raises(ProtocolError, match="nothing to compare"):
        opened(tmp_path, group("p", 1, 1))
    with pytest.raises(ProtocolError, match="1 of 3 records are unusable: line 3: text is empty"):
        opened(tmp_path, [*rows, rows[0] | {"id": "x", "text": ""}])
    note = {"dataset": "pascal-50s", "split": "test", "complete": True, "title": "Pascal-50S", "protocols": ["pascal"]}
    (tmp_path / "r/dataset.json").write_text(json.dumps(note))
    with pytest.raises(
        ProtocolError, match="records of Pascal-50S, and foil takes foil; they are counted with --benchmark=pascal"
    ):
        opened(tmp_path, rows, protocol_named("foil"))


def test_records_of_another_split(tmp_path):
    """Nebula's validation split is as large as its test split."""
    note = {"dataset": "nebula", "split": "validation", "complete": True, "title": "Nebula", "protocols": ["nebula"]}
    write(tmp_path / "r/dataset.json", [note])
    rows = [{"id": f"r{i}", "image": f"{i}.png", "text": "x", "score": i % 5 / 4} for i in range(3298)]
    with pytest.raises(ProtocolError, match="the split 'validation' of Nebula, and nebula counts 'test'.*allow_subset"):
        opened(tmp_path, rows, protocol_named("nebula"))
    assert opened(tmp_path, rows, protocol_named("nebula"), allow_subset=True).subset
    write(tmp_path / "r/dataset.json", [note | {"split": "test"}])
    assert not opened(tmp_path, rows, protocol_named("nebula")).subset


def test_categories_without_a_bootstrap(tmp_path):
    rows = [row for name in ("HC", "MM") for i in range(3) for row in group(f"pascal-50s/{name}/{i}", 1, 0)]
    records = write(tmp_path / "r/records.jsonl", rows)
    scores = write(tmp_path / "s.jsonl", [{"id": row["id"], "score": i} for i, row in enumerate(rows)])
    options = {"allow_subset": True, "bootstrap_samples": 0}
    report = evaluate_benchmark(protocol_named("pascal-50s"), records, scores, **options)
    assert {name: found.value for name, found in report.categories.items()} == {"HC": 0, "MM": 0, "mean": 0}
    assert all(np.isnan(found.interval.low) for found in report.categories.values())


IDS = ["a", "b", "c", "d", "e"]


def records_of(ids):
    return [Record(name, (), f"text of {name}", None, None, {}, None, 1) for name in ids]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no scores in the file"),
        ([{"id": "a", "score": 1}], "4 of 5 records have no score: b, c, d and 1 more. A part of a benchmark is not"),
        (
            [{"id": f"x{i}", "score": 1} for i in range(5)],
            r"5 scored ids are no records: x0, x1, .*of another benchmark",
        ),
        ([{"id": i, "score": 1} for i in [*IDS, "b"]], r"1 ids are scored more than once: b \(line 6\)"),
        (
            [{"id": i, "score": float("nan")} for i in IDS],
            "5 of 5 lines have no usable score: line 1, id a: score is nan",
        ),
        ([{"id": i, "score": True} for i in IDS], "score is True, not a finite number"),
        ([{"id": i, "score": None, "error": "image x: truncated"} for i in IDS], "line 1, id a: image x: truncated"),
        ([{"id": i, "logit": 1} for i in IDS], r"score is None.*has id, logit; --score_field names what is read"),
        ([{"score": 1}] * 4, "4 scores without ids for 5 records"),
        (
            [{"score": 1, "text": f"text of {i}"} for i in "abdce"],
            "line 3 is of the text 'text of d', but its record, c, of 'text of c'.*Give the lines ids",
        ),
        ([{"score": 1}, *({"id": i, "score": 1} for i in IDS)], "1 of 6 lines have no id, the first is line 1"),
    ],
)
def test_bad_scores_are_refused_with_counts_and_examples(tmp_path, rows, message):
    with pytest.raises(ScoresError, match=message):
        read_scores(write(tmp_path / "s.jsonl", rows), records_of(IDS))


def test_scores_of_another_large_benchmark_are_refused(tmp_path):
    path = write(tmp_path / "s.jsonl", [{"id": f"x{i}", "score": 1} for i in range(10_000)])
    with pytest.raises(ScoresError, match="10,000 of 10,000 records have no score"):
        read_scores(path, records_of(f"r{i}" for i in range(10_000)))


def test_good_scores(tmp_path):
    rows = [{"id": name, "score": i, "scores": {"tone": i * 2}} for i, name in enumerate(IDS)]
    path = write(tmp_path / "s.jsonl", [*rows[::-1], {"id": "other", "score": 9, "scores": {"tone": 9}}])
    assert read_scores(path, records_of(IDS)).tolist() == [0, 1, 2, 3, 4]
    assert read_scores(path, records_of(IDS), "scores.tone").tolist() == [0, 2, 4, 6, 8]
    unnamed = write(tmp_path / "u.jsonl", [{"score": i} for i in range(5)])
    assert read_scores(unnamed, records_of(IDS)).tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(ScoresError, match="no such scores file"):
        read_scores(tmp_path / "none.jsonl", records_of(IDS))
    (tmp_path / "bad.jsonl").write_text('{"id": "a"\n')
    with pytest.raises(ScoresError, match="1 of 1 lines are unreadable: line 1: not JSON"):
        read_scores(tmp_path / "bad.jsonl", records_of(IDS))


@pytest.fixture
def judged(tmp_path):
    rng = np.random.default_rng(0)
    rows = [
        {"id": f"r{i}", "image": f"{i // 3}.png", "text": "x", "score": float(rng.integers(0, 5) / 4)}
        for i in range(60)
    ]
    scores = [{"id": row["id"], "score": row["score"] + float(rng.normal()) / 3} for row in rows]
    return write(tmp_path / "records.jsonl", rows), write(tmp_path / "s.jsonl", scores), scores


def test_all_scores_equal(judged, tmp_path):
    records, _, scores = judged
    flat = write(tmp_path / "flat.jsonl", [row | {"score": 0.5} for row in scores])
    report = evaluate_benchmark(protocol_named("nebula"), records, flat, allow_subset=True, bootstrap_samples=100)
    assert "tau_c is undefined: all predictions are equal" in report.words()
    assert json.loads(report.to_json())["value"]["value"] is None


def test_the_report_says_what_a_reader_must_know(judged, tmp_path):
    records, path, _ = judged
    note = {
        "settings": {"dtype": "bfloat16"},
        "conditions": {"prompt": "official-eval", "position_mode": "flat", "alpha_rule": "kfold"},
    }
    there = load_records(records, need_images=False).records
    (tmp_path / "s.jsonl.seen.safetensors").write_bytes(to_bytes({TRAINED: Seen.of(prints_of(there[:3]))}))
    (tmp_path / "s.jsonl.job.json").write_text(json.dumps(note))
    report = evaluate_benchmark(protocol_named("nebula"), records, path, allow_subset=True, bootstrap_samples=100)
    words = report.words()
    for part in (
        "prompt: official-eval",
        "position mode: flat",
        "alpha rule: kfold",
        "dtype: bfloat16",
        "not noted beside the scores: references, image policy",
        "variant: tau_c",
        "n = 60 from 60 records",
        "100 bootstrap samples of 20 whole groups",
        "NOT the published number",
        "WARNING: 3 of 60 records have the ids of records that the model was trained on",
        "WARNING: 60 of 60 records have no pictures here",
    ):
        assert part in words
    saved = json.loads(report.save(tmp_path / "out").read_text())
    assert saved["conditions"]["dtype"] == "bfloat16"
    assert saved["value"]["value"] == report.value.value
    assert "tau_c" in str(report.table())


def test_the_verb(judged, tmp_path, capsys):
    records, path, _ = judged
    command = ["evaluate", "--benchmark=nebula", f"--input={records}", f"--scores={path}", "--bootstrap=100"]
    assert main([*command, "--allow-subset", f"--output={tmp_path / 'out'}"]) == 0
    assert "Kendall's tau_c of the scores with score" in capsys.readouterr().out
    assert (tmp_path / "out/nebula.json").is_file()
    assert main(command) == 1
    assert "60 records, but the benchmark has 3,298" in capsys.readouterr().err
    assert main([*command, "--target=score"]) == 1
    assert "a benchmark says what is compared" in capsys.readouterr().err
    for verb in ("evaluate", "report"):  # without a benchmark they would change nothing, and nobody would know
        for flag in ("--score_field=scores.tone", "--ties=half", "--allow_subset"):
            assert main([verb, command[2], command[3], flag]) == 1
            assert f"{flag.partition('=')[0]} is for a --benchmark" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["evaluate", "--help"])
    assert "flickr8k-expert-mean" in capsys.readouterr().out
