"""Dotted names of the arrays in a pytree, such as "backbone.text.norm.scale"."""

from collections.abc import Sequence
from typing import Any

import jax


def path_name(path: Sequence[Any]) -> str:
    """The name of a pytree path; the `value` inside of a variable is left out."""
    parts = [str(getattr(key, "name", getattr(key, "key", getattr(key, "idx", key)))) for key in path]
    return ".".join(part for part in parts if part != "value")


def by_name(tree: Any) -> dict[str, Any]:
    """Name -> array (or ShapeDtypeStruct, or whatever leaf there is), in the order of `jax.tree.leaves`."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {path_name(path): leaf for path, leaf in leaves}
