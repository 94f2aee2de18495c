"""The first page: within 120 columns, and its records are records."""

import ast
import json
import re
from pathlib import Path

from PIL import Image

from multitap_jax.data.records import load_records
from tests.documentation import python_blocks

README = Path(__file__).parents[1] / "README.md"


def test_lines_fit_120_columns():
    assert [line for line in README.read_text().splitlines() if len(line) > 120] == []


def test_its_records_load_and_its_code_is_python(tmp_path):
    text = README.read_text()
    (records,) = (block for block in re.findall(r"```json\n(.*?)```", text, re.DOTALL) if '"image"' in block)
    (tmp_path / "images").mkdir()
    for name in ("images/7.jpg", "a.jpg", "b.jpg"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    (tmp_path / "records.jsonl").write_text(records)
    found = load_records(tmp_path, check_images=True)
    assert (len(found.records), found.rejected, found.objectives) == (2, [], ("realism",))
    (line,) = (block for block in re.findall(r"```json\n(.*?)```", text, re.DOTALL) if '"n_tokens"' in block)
    assert list(json.loads(line)) == ["id", "score", "scores", "n_tokens", "truncated", "error"]
    for code in python_blocks(README):
        ast.parse(code)
