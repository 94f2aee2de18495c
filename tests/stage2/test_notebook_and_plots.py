"""The notebook runs from top to bottom, and the plots show what was fitted."""

from pathlib import Path

import matplotlib
import nbclient
import nbformat
import numpy as np
import pytest

from multitap_jax.stage2 import RidgeHead
from tests.stage2.data import embeddings, with_missing

matplotlib.use("Agg")
ROOT = Path(__file__).parents[2]


def test_the_notebook_runs(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("PYTHONWARNINGS", "ignore")  # of the kernel's own libraries
    book = nbformat.read(ROOT / "notebooks" / "ridge_heads.ipynb", as_version=4)
    nbclient.NotebookClient(book, timeout=120, kernel_name="python3").execute()
    alphas = book.cells[-1].outputs[0]["data"]["text/plain"]
    assert alphas == "[0.001, 0.001, 0.001]"


def test_plots_show_the_fit():
    import matplotlib.pyplot as plt

    from multitap_jax.stage2.plots import alpha_curves, predicted_vs_human

    x, y = embeddings(200)
    y = with_missing(y, 0.2)
    y[:, 1] = 2.0
    head = RidgeHead().fit(x, y, objective_names=["a", "b", "c"])
    curves = alpha_curves(head)
    assert [text.get_text() for text in curves.get_legend().get_texts()] == ["a", "c"]
    assert curves.lines[1].get_xydata()[0] == pytest.approx([head.alpha_[0], head.r2_[0]])
    _, ax = plt.subplots()
    assert predicted_vs_human(head.predict(x)[:, 0], y[:, 0], "a", ax, max_points=50) is ax
    points = ax.lines[0].get_xydata()
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("human", "predicted")
    assert set(points[:, 0]) <= set(y[:, 0])
    assert 25 <= len(points) <= 50
    assert np.isfinite(points).all()
    plt.close("all")
