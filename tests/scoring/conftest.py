"""One base folder and one artefact for all tests of scoring; a test that changes one works on a copy."""

import shutil
from pathlib import Path

import pytest

from multitap_jax.data.seen import TRAINED, Print, Seen
from tests.scoring.model_fixtures import base_folder, save_artefact


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    return base_folder(tmp_path_factory.mktemp("base") / "qwen")


@pytest.fixture(scope="session")
def saved(base, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "artefact"
    save_artefact(folder, base, seen={TRAINED: Seen.of([Print(2**64 - 1, (2**63,), None, 7)])})
    return folder


@pytest.fixture
def artefact(saved, tmp_path) -> Path:
    """A copy that may be spoilt."""
    return Path(shutil.copytree(saved, tmp_path / "artefact"))
