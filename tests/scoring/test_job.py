"""A job gives each input line one output line, whatever happens to the process, the disk or the files."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from multitap_jax.data.seen import TRAINED, Print, Seen, from_bytes
from multitap_jax.scoring.job import TooManyRejected, score_file
from multitap_jax.scoring.journal import JobError, Journal
from tests.scoring.job_fixtures import FakeScorer, read_lines, write_records

ROOT = Path(__file__).parents[2]


def start(source: Path, output: Path, window: int, delay: float, max_file_bytes: int = 0) -> subprocess.Popen:
    arguments = map(str, (source, output, window, delay, max_file_bytes))
    return subprocess.Popen(
        [sys.executable, "-m", "tests.scoring.job_fixtures", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_one_line_a_record_in_input_order(tmp_path):
    source = write_records(tmp_path, 25, {3: "will fail", 7: "too long"})
    output = tmp_path / "scores.jsonl"
    scorer = FakeScorer()
    summary = score_file(scorer, source, output, window=10, max_rejected=0.1, truncate=True)
    lines = read_lines(output)
    assert [line["id"] for line in lines] == [f"r{i}" for i in range(25)]
    assert scorer.calls == [10, 10, 5]
    assert (summary.lines, summary.rejected, summary.truncated, summary.resumed) == (25, 1, 1, 0)
    assert list(lines[0]) == ["id", "score", "scores", "n_tokens", "truncated", "error"]
    expected = FakeScorer().score(["text 0"], truncate=False)
    assert np.float32(lines[0]["score"]) == expected.overall[0]
    assert np.float32(lines[0]["scores"]["safety"]) == expected.objectives[0, 0]
    assert lines[3]["score"] is None
    assert lines[3]["scores"] == {"safety": None, "detail": None}
    assert lines[3]["error"] == "made to fail"
    assert [line["truncated"] for line in lines] == [i == 7 for i in range(25)]


def test_what_the_model_has_seen_is_left_beside_the_output(tmp_path):
    source, output = write_records(tmp_path, 4), tmp_path / "scores.jsonl"
    beside, scorer = tmp_path / "scores.jsonl.seen.safetensors", FakeScorer()
    scorer.seen = {TRAINED: Seen.of([Print(1, (2,), None, 3)])}
    score_file(scorer, source, output)
    assert from_bytes(beside.read_bytes(), beside)[TRAINED].id.tolist() == [3]
    output.unlink()
    score_file(FakeScorer("model-2"), source, output)  # of which nothing is known
    assert not beside.exists()
    with pytest.raises(JobError, match="the job would write over its input"):
        score_file(FakeScorer(), source.rename(tmp_path / "a.jsonl"), tmp_path / "a.jsonl")


def test_bad_records_keep_their_place_and_are_repeated_beside_the_output(tmp_path):
    source = write_records(tmp_path, 4)
    rows = source.read_text().splitlines()
    rows[1] = '{"id": "r1", "image": "absent.png", "text": "no picture"}'
    rows[2] = "this is not JSON"
    source.write_text("\n".join(rows) + "\n")
    output = tmp_path / "scores.jsonl"
    summary = score_file(FakeScorer(), source, output, max_rejected=0.5)
    lines = read_lines(output)
    assert [line["id"] for line in lines] == ["r0", "r1", None, "r3"]
    assert [line["score"] is None for line in lines] == [False, True, True, False]
    assert "absent.png" in lines[1]["error"]
    assert lines[2]["error"].startswith("line 3: ")
    rejected = read_lines(summary.rejected_file)
    assert [(item["line"], item["id"]) for item in rejected] == [(2, "r1"), (3, None)]
    assert rejected[0]["reason"] == lines[1]["error"]


def test_a_finished_job_does_nothing_again_and_says_so(tmp_path):
    source, output = write_records(tmp_path, 5), tmp_path / "scores.jsonl"
    score_file(FakeScorer(), source, output)
    before = output.read_bytes()
    scorer = FakeScorer()
    summary = score_file(scorer, source, output)
    assert summary.already_complete
    assert "already complete" in str(summary)
    assert scorer.calls == []
    assert output.read_bytes() == before


@pytest.mark.parametrize("kept", [0, 1, 37, 60, 61, 10_000])
def test_a_cut_off_output_is_continued_after_its_last_whole_line(tmp_path, kept):
    source, output = write_records(tmp_path, 9, {2: "will fail"}), tmp_path / "scores.jsonl"
    score_file(FakeScorer(), source, output, max_rejected=0.5)
    whole = output.read_bytes()
    rejected = (tmp_path / "scores.jsonl.rejected.jsonl").read_bytes()
    output.write_bytes(whole[:kept])
    summary = score_file(FakeScorer(), source, output, window=2, max_rejected=0.5)
    assert output.read_bytes() == whole
    assert (tmp_path / "scores.jsonl.rejected.jsonl").read_bytes() == rejected
    assert summary.resumed == whole[:kept].count(b"\n")
    assert summary.lines == 9


def test_zeros_left_by_a_power_cut_are_cut_off(tmp_path):
    source, output = write_records(tmp_path, 6), tmp_path / "scores.jsonl"
    score_file(FakeScorer(), source, output)
    whole = output.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    output.write_bytes(whole[: ends[2]] + bytes(50) + b"\n" + bytes(9))
    assert score_file(FakeScorer(), source, output).resumed == 3
    assert output.read_bytes() == whole


def test_kill_nine_at_any_moment_then_the_same_command(tmp_path):
    source = write_records(tmp_path, 400, {5: "will fail"})
    expected = tmp_path / "expected.jsonl"
    score_file(FakeScorer(), source, expected)
    output = tmp_path / "scores.jsonl"
    killed = 0
    for wanted in (20, 120, 260):
        process = start(source, output, 4, 0.005)
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            if output.exists() and output.read_bytes().count(b"\n") >= wanted:
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.001)
        process.communicate()
        killed += process.returncode == -signal.SIGKILL
    assert killed == 3
    assert 260 <= output.read_bytes().count(b"\n") < 400
    process = start(source, output, 64, 0)
    printed, problems = process.communicate(timeout=60)
    assert process.returncode == 0, problems
    assert "lines were there from an earlier run" in printed
    assert output.read_bytes() == expected.read_bytes()
    assert not list(tmp_path.glob("*.tmp"))


def test_a_full_disk_gives_a_clear_message_and_leaves_a_file_to_continue(tmp_path):
    source, output = write_records(tmp_path, 400), tmp_path / "scores.jsonl"
    process = start(source, output, 32, 0, max_file_bytes=9000)
    _, problems = process.communicate(timeout=60)
    assert process.returncode != 0
    last = problems.strip().splitlines()[-1]
    assert "cannot be written" in last
    assert "run the same command again" in last
    written = output.read_bytes()
    assert written.endswith(b"\n")
    lines = written.count(b"\n")
    assert lines
    assert lines % 32 == 0
    assert f"{lines} finished lines are safe" in last
    assert score_file(FakeScorer(), source, output).resumed == lines
    assert [line["id"] for line in read_lines(output)] == [f"r{i}" for i in range(400)]


def interrupted(tmp_path: Path) -> tuple[Path, Path]:
    source, output = write_records(tmp_path, 9), tmp_path / "scores.jsonl"
    score_file(FakeScorer(), source, output)
    output.write_bytes(output.read_bytes()[:600])
    return source, output


def test_another_input_is_refused(tmp_path):
    source, output = interrupted(tmp_path)
    write_records(tmp_path, 9, {8: "another text"})
    with pytest.raises(JobError, match=r"scores.jsonl: was begun with another input .* choose another output"):
        score_file(FakeScorer(), source, output)


def test_another_model_is_refused_also_for_a_finished_file(tmp_path):
    source, output = interrupted(tmp_path)
    for _ in range(2):
        with pytest.raises(JobError, match="begun with another model"):
            score_file(FakeScorer("model-2"), source, output)
        score_file(FakeScorer(), source, output)


def test_another_setting_is_refused(tmp_path):
    source, output = interrupted(tmp_path)
    with pytest.raises(JobError, match="begun with another settings"):
        score_file(FakeScorer(), source, output, truncate=True)


def test_a_changed_line_is_refused(tmp_path):
    source, output = interrupted(tmp_path)
    output.write_bytes(output.read_bytes().replace(b'"r1"', b'"rX"'))
    with pytest.raises(JobError, match=r"scores.jsonl line 2: id 'rX', but the input has id 'r1' there"):
        score_file(FakeScorer(), source, output)


def test_more_lines_than_records_are_refused(tmp_path):
    source, output = write_records(tmp_path, 3), tmp_path / "scores.jsonl"
    score_file(FakeScorer(), source, output)
    output.write_bytes(output.read_bytes() * 2)
    with pytest.raises(JobError, match=r"line 4: .* the input has no more records"):
        score_file(FakeScorer(), source, output)


def test_a_file_that_is_no_job_is_left_alone(tmp_path):
    source, output = write_records(tmp_path, 3), tmp_path / "notes.jsonl"
    output.write_text("precious\n")
    with pytest.raises(JobError, match=r"notes.jsonl: exists, but notes.jsonl.job.json beside it does not"):
        score_file(FakeScorer(), source, output)
    assert output.read_text() == "precious\n"
    with pytest.raises(JobError, match="write over its input"):
        score_file(FakeScorer(), source, source)


def test_two_jobs_cannot_write_one_file(tmp_path):
    source, output = write_records(tmp_path, 3), tmp_path / "scores.jsonl"
    with Journal(output, {}), pytest.raises(JobError, match="another process is writing it"):
        score_file(FakeScorer(), source, output)


def test_too_many_rejected_stop_the_run_early_and_a_higher_limit_goes_on(tmp_path):
    source = write_records(tmp_path, 3000, dict.fromkeys(range(0, 3000, 20), "will fail"))
    output = tmp_path / "scores.jsonl"
    scorer = FakeScorer()
    with pytest.raises(TooManyRejected, match=r"5\.0%.*made to fail.*--max_rejected"):
        score_file(scorer, source, output, window=500)
    assert sum(scorer.calls) == 1000
    with pytest.raises(TooManyRejected):
        score_file(FakeScorer(), source, output, window=500)
    summary = score_file(FakeScorer(), source, output, window=500, max_rejected=0.05)
    assert (summary.lines, summary.rejected, summary.resumed) == (3000, 150, 1000)
    with pytest.raises(TooManyRejected):
        score_file(FakeScorer(), source, output)
    assert score_file(FakeScorer(), source, output, max_rejected=0.05).already_complete


def test_an_empty_input_gives_an_empty_output(tmp_path):
    source, output = write_records(tmp_path, 0), tmp_path / "scores.jsonl"
    assert score_file(FakeScorer(), source, output).lines == 0
    assert output.read_bytes() == b""


def test_a_scorer_that_lets_nan_through_stops_the_job(tmp_path, monkeypatch):
    source, output = write_records(tmp_path, 3), tmp_path / "scores.jsonl"
    good = FakeScorer.score

    def broken(self, *pairs):
        scores = good(self, *pairs)
        scores.overall[1] = np.nan
        return scores

    monkeypatch.setattr(FakeScorer, "score", broken)
    with pytest.raises(ValueError, match="JSON compliant"):
        score_file(FakeScorer(), source, output)
    assert output.read_bytes() == b""


def test_the_bar_counts_what_was_there(tmp_path, capsys):
    source, output = interrupted(tmp_path)
    score_file(FakeScorer(), source, output, show_progress=True)
    assert "9/9" in capsys.readouterr().err


def test_the_line_spells_float32_shortly(tmp_path):
    source, output = write_records(tmp_path, 1), tmp_path / "scores.jsonl"
    score_file(FakeScorer(), source, output)
    score = json.loads(output.read_text().splitlines()[0])["score"]
    assert len(str(score)) <= 12
