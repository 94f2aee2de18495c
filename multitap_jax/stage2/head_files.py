"""A fitted `RidgeHead` as arrays, as plain JSON, and as files."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors
import safetensors.numpy

from multitap_jax.files import write_atomic
from multitap_jax.stage2.rows import DataError
from multitap_jax.stage2.uncertainty import Posterior

if TYPE_CHECKING:
    from multitap_jax.stage2.fitted import FittedHead


def to_arrays(head: "FittedHead") -> dict[str, np.ndarray]:
    """ "ridge.coef" float32[T, H], "ridge.intercept" float64[T], "ridge.alpha" float64[T]."""
    return {"ridge.coef": head.coef_, "ridge.intercept": head.intercept_, "ridge.alpha": head.alpha_}


def metadata(head: "FittedHead") -> dict[str, Any]:
    """What a head is worth and where it comes from, as plain JSON values (None where not known)."""
    params = head.get_params()
    if not isinstance(head.alphas, str):
        params["alphas"] = np.atleast_1d(head.alphas).tolist()
    if isinstance(head.cv, (list, tuple)):
        params["cv"] = len(head.cv)  # the splits are those of rows that are not kept
    params = {key: value.item() if isinstance(value, np.generic) else value for key, value in params.items()}
    return {
        "format": "multitap-ridge",
        "version": 1,
        "objectives": list(head.objective_names_),
        "alpha": head.alpha_.tolist(),
        "criterion": head.criterion_,
        "r2": [None if np.isnan(value) else float(value) for value in head.r2_],
        "tau": [None if np.isnan(value) else float(value) for value in head.tau_],
        "rows": head.n_rows_,
        "observed": head.n_observed_.tolist(),
        "notes": list(head.notes_),
        "params": params,
    }


def fill(head: "FittedHead", arrays: Mapping[str, np.ndarray], data: Mapping[str, Any]) -> None:
    """Sets the attributes of a fit from `to_arrays` and `metadata`; other arrays are left alone.

    Raises:
      DataError: listing every missing or mis-shaped array.
    """
    names = tuple(data["objectives"])
    coef = arrays.get("ridge.coef")
    hidden = coef.shape[-1] if coef is not None and coef.ndim else "H"
    wanted = {"ridge.coef": (len(names), hidden), "ridge.intercept": (len(names),), "ridge.alpha": (len(names),)}
    problems = [
        f"  {key}: {arrays[key].shape if key in arrays else 'missing'}, expected {shape}"
        for key, shape in wanted.items()
        if key not in arrays or arrays[key].shape != shape or not np.isfinite(arrays[key]).all()
    ]
    if problems:
        raise DataError("not a ridge head of these objectives (or not finite):\n" + "\n".join(problems))
    head.coef_ = np.asarray(arrays["ridge.coef"], np.float32)
    head.intercept_ = np.asarray(arrays["ridge.intercept"], np.float64)
    head.alpha_ = np.asarray(arrays["ridge.alpha"], np.float64)
    head.objective_names_, head.n_features_in_ = names, head.coef_.shape[1]
    head.n_rows_, head.n_observed_ = data["rows"], np.asarray(data["observed"])
    head.r2_, head.tau_ = (np.array(data[key], np.float64) for key in ("r2", "tau"))  # None becomes NaN
    head.criterion_, head.notes_ = data["criterion"], list(data["notes"])
    head.posteriors_ = _posteriors(arrays)


def check_format(data: Mapping[str, Any]) -> None:
    """Raises DataError for metadata of something else, or of another version."""
    if (data.get("format"), data.get("version")) != ("multitap-ridge", 1):
        raise DataError(f"metadata of format {data.get('format')!r} {data.get('version')!r}, not a ridge head")


def save(head: "FittedHead", path: Path, uncertainty: bool) -> Path:
    """Writes PATH.safetensors with its PATH.json, or ridge.safetensors and ridge.json in the folder PATH.

    The first is the head, metadata included, and so replaced as a whole; the second shows people what is in it.
    """
    file = _head_file(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    arrays = to_arrays(head)
    if uncertainty:
        for number, posterior in enumerate(head.posteriors_):
            arrays |= {f"posterior.{number}.{name}": value for name, value in posterior.to_arrays().items()}
    content = {key: np.array(value, order="C") for key, value in arrays.items()}
    about = json.dumps(metadata(head), indent=1)
    write_atomic(file, safetensors.numpy.save(content, {"head": about}))
    write_atomic(file.with_suffix(".json"), about.encode())
    return file


def read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """(arrays, metadata) of what `save` wrote.

    Raises:
      DataError: for a missing or damaged file.
    """
    file = _head_file(path)
    try:
        content = file.read_bytes()
        arrays = safetensors.numpy.load(content)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        about = header.get("__metadata__", {}).get("head")  # heads saved before it was there have it beside them alone
        data = json.loads(file.with_suffix(".json").read_text("utf-8") if about is None else about)
        check_format(data)
        return arrays, data
    except (OSError, ValueError, KeyError, AttributeError, TypeError, safetensors.SafetensorError) as error:
        raise DataError(f"{file}: not a saved RidgeHead: {error}") from error


def _posteriors(arrays: Mapping[str, np.ndarray]) -> list[Posterior]:
    grouped: dict[int, dict[str, np.ndarray]] = {}
    for key, value in arrays.items():
        if key.startswith("posterior."):
            _, number, name = key.split(".", 2)
            grouped.setdefault(int(number), {})[name] = value
    return [Posterior.from_arrays(grouped[number]) for number in sorted(grouped)]


def _head_file(path: Path) -> Path:
    return path if path.suffix == ".safetensors" else path / "ridge.safetensors"
