"""Training on pictures that cannot be read: the run says which, keeps the list, and stops when they are too many."""

import json
from pathlib import Path

import pytest

from multitap_jax import cli
from multitap_jax.demo.checkpoint import build_checkpoint
from multitap_jax.demo.texts import vocabulary_sample
from multitap_jax.demo.world import build_world
from multitap_jax.stage1 import run as stage1

CONFIGS = Path(__file__).parents[1] / "configs"
PER_PICTURE = 6


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return build_checkpoint(tmp_path_factory.mktemp("base"), vocabulary_sample(), seed=0)


@pytest.fixture
def train_file(tmp_path) -> Path:
    return build_world(tmp_path / "world", 13, 0, 0.05).train


def train(base: Path, records: Path | str, workdir: Path, *more: str) -> int:
    return cli.main(
        [
            "train",
            f"--config={CONFIGS / 'head_only.py'}",
            f"--workdir={workdir}",
            f"--config.model.checkpoint={base}",
            f"--config.data.train={records}",
            "--config.data.image_policy=square:84",
            "--config.data.holdout=0.0",
            "--config.model.dtype=float32",
            "--config.batch_size=16",
            "--config.epochs=1",
            "--config.log_every=1",
            *more,
        ]
    )


def pictures(records: Path) -> list[Path]:
    names = dict.fromkeys(json.loads(line)["image"] for line in records.read_text().splitlines())
    return [records.parent / name for name in names]


def truncate(paths: list[Path]) -> None:
    for path in paths:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    ("share", "remedy"),
    [(0.5, "accept the loss with --config.data.max_rejected=0.5"), (1.0, "So many have one cause, as a rule; mend it")],
)
def test_truncated_pictures_stop_the_run_before_its_first_step(base, train_file, tmp_path, capsys, share, remedy):
    files = pictures(train_file)
    broken = files[: round(share * len(files))]
    truncate(broken)
    assert train(base, train_file, tmp_path / "run") == 1
    message = capsys.readouterr().err
    records = lines(train_file)
    lost = [(n, r["id"]) for n, r in enumerate(records, 1) if train_file.parent / r["image"] in broken]
    assert f"{len(lost)} of {len(records)} records rejected ({share:.1%}, allowed 1.0%)" in message
    assert remedy in message
    assert [(r["line"], r["id"]) for r in lines(tmp_path / "run" / "rejected.jsonl")] == lost
    assert "truncated" in message
    assert not (tmp_path / "run" / "artefact").exists()
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_the_named_remedy_works_and_a_repeat_keeps_the_rejects(base, train_file, tmp_path, capsys, monkeypatch):
    truncate(pictures(train_file)[:2])
    accept = "--config.data.max_rejected=0.4"
    late = pictures(train_file)[3]
    content = late.read_bytes()
    plain = stage1.train

    def break_one(*args, **settings):  # after all pictures were found good
        late.write_bytes(content[:60])
        return plain(*args, **settings)

    monkeypatch.setattr(stage1, "train", break_one)
    assert train(base, train_file, tmp_path / "run", accept) == 0
    rejected = lines(tmp_path / "run" / "rejected.jsonl")
    of_late = [(n, r["id"]) for n, r in enumerate(lines(train_file), 1) if r["image"].endswith(late.name)]
    assert [(r["line"], r["id"]) for r in rejected[-len(of_late) :]] == of_late
    assert f"{len(of_late)} records lost their picture during the run" in capsys.readouterr().err
    monkeypatch.setattr(stage1, "train", plain)
    late.write_bytes(content)
    assert train(base, train_file, tmp_path / "run", accept) == 0  # finished before
    assert lines(tmp_path / "run" / "rejected.jsonl") == rejected
    assert "stays as it is" in capsys.readouterr().err


def test_too_many_pictures_that_break_during_the_run_stop_it(base, train_file, tmp_path, capsys, monkeypatch):
    plain = stage1.train

    def break_all(*args, **settings):
        truncate(pictures(train_file))
        return plain(*args, **settings)

    monkeypatch.setattr(stage1, "train", break_all)
    assert train(base, train_file, tmp_path / "run") == 1
    message = capsys.readouterr().err
    assert "records rejected" in message
    # How many have been read when it stops is a matter of threads: either remedy may be the right one.
    assert "max_rejected=" in message or "So many have one cause" in message
    assert lines(tmp_path / "run" / "rejected.jsonl")
    assert not (tmp_path / "run" / "artefact").exists()


def test_another_target_is_named_with_the_flag_of_the_verb(base, train_file, tmp_path, capsys):
    bare = [{k: v for k, v in record.items() if k != "score"} for record in lines(train_file)]
    train_file.write_text("".join(json.dumps(record) + "\n" for record in bare))
    assert train(base, train_file, tmp_path / "run") == 1
    message = capsys.readouterr().err
    assert "score is missing, and this run needs it; the record has ratings." in message
    assert "choose one with --config.data.target=ratings." in message
    assert train(base, train_file, tmp_path / "run", "--config.data.target=ratings.overall") == 1
    assert "--config.data.target_range='(1, 5)'" in capsys.readouterr().err


def test_of_several_files_the_one_that_lost_records_is_named(base, train_file, tmp_path, capsys):
    whole = train_file.read_text().splitlines(keepends=True)
    more = train_file.with_name("more.jsonl")
    train_file.write_text("".join(whole[: 6 * PER_PICTURE]))
    more.write_text("".join(whole[6 * PER_PICTURE :]))
    truncate(pictures(more)[:1])
    assert train(base, f"{train_file},{more}", tmp_path / "run") == 1
    lost, total = PER_PICTURE, len(whole) - 6 * PER_PICTURE
    assert f"{more}: {lost} of {total} records rejected ({lost / total:.1%}, allowed 1.0%)" in capsys.readouterr().err
    assert len(lines(tmp_path / "run/rejected.jsonl")) == lost
