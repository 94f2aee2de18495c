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


@pytest.mark.parametrize(
    ("name", "last"),
    [
        ("01_score_and_explain", "leverage"),
        ("02_fit_ridge_heads", "[0.001, 0.001, 0.001]"),
        ("03_objective_independence", "largest difference of a coefficient"),
    ],
)
def test_the_notebook_runs(name, last, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("PYTHONWARNINGS", "ignore")  # of the kernel's own libraries
    book = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    nbclient.NotebookClient(book, timeout=120, kernel_name="python3").execute()
    output = book.cells[-1].outputs[0]
    assert last in (output["text"] if output["output_type"] == "stream" else output["data"]["text/plain"])
    kept = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    assert all(cell.outputs for cell in kept.cells if cell.cell_type == "code" and "import" not in cell.source)


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


def test_residuals_and_correlations():
    import matplotlib.pyplot as plt

    from multitap_jax.stage2.plots import correlations, objective_correlation, residuals

    rng = np.random.default_rng(0)
    human = rng.standard_normal(500)
    human[::5] = np.nan
    predicted = np.where(np.isnan(human), 0.0, human) * 0.5
    means = residuals(predicted, human, "a").lines[1].get_xydata()
    assert len(means) == 10
    np.testing.assert_allclose(means[:, 1], means[:, 0], rtol=1e-6)  # half of each rating is left
    values = np.stack([human, -2 * human, rng.standard_normal(500), np.ones(500)], axis=1)
    table = correlations(values)
    np.testing.assert_allclose(table[:2, :2], [[1, -1], [-1, 1]])
    seen = ~np.isnan(human)
    assert table[0, 2] == pytest.approx(np.corrcoef(human[seen], values[seen, 2])[0, 1])
    assert np.isnan(table[3]).all()
    ax = objective_correlation(values, ("a", "b", "c", "d"), "title")
    assert [label.get_text() for label in ax.get_xticklabels()] == ["a", "b", "c", "d"]
    assert len(ax.texts) == 9
    plt.close("all")
