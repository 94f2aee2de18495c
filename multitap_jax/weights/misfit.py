"""Which entries of a `config.json` contradict the tensors beside it: sizes and numbers of layers, by name."""

from collections.abc import Collection, Mapping
from typing import Any

NO_SIZE = ("token_id", "version", "position_embeddings", "_index")


def size_entries(config: Mapping[str, Any], section: str = "") -> dict[str, int]:
    """Every entry of a `config.json` that may be the size of something, with products that sizes are made of."""
    entries: dict[str, int] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            entries |= size_entries(value, f"{section}{name}.")
        elif isinstance(value, int) and not isinstance(value, bool) and not any(part in name for part in NO_SIZE):
            entries[section + name] = value
    return entries | {section + name: value for name, value in _products(config).items()}


def contradictions(
    entries: Mapping[str, int],
    sizes: Collection[tuple[str, int, int]],
    layers: Mapping[str, tuple[int, int]],
) -> list[str]:
    """Sentences that name the entries; where several have the value that is contradicted, all of them.

    Args:
      entries: from `size_entries`.
      sizes: (key, what the configuration makes a dimension, what the tensor has) of dimensions that differ.
      layers: what layers are named in files -> (how many the configuration makes, how many there are).
    """
    lines = []
    for seeing, expected, found in sorted({("vis" in key, expected, found) for key, expected, found in sizes}):
        near = {name: value for name, value in entries.items() if ("vis" in name) == seeing}
        lines.append(f"{_named(near, expected)}, but tensors have {found}")
    for name, (expected, found) in layers.items():
        counts = {key: value for key, value in entries.items() if "layer" in key or "depth" in key}
        lines.append(f"{_named(counts, expected)}, but there are {found} of {name}")
    return lines


def _named(entries: Mapping[str, int], value: int) -> str:
    names = [name for name, entry in entries.items() if entry == value]
    return f"config.json says {' or '.join(names)} = {value}" if names else f"config.json makes a size {value}"


def _products(config: Mapping[str, Any]) -> dict[str, int]:
    first = lambda *names: next((name for name in names if isinstance(config.get(name), int)), "")
    width = first("embed_dim", "hidden_size")
    heads = first("num_attention_heads", "num_heads", "attention_heads")
    if not width or not heads or config[heads] <= 0:
        return {}
    out = {f"3 * {width}": 3 * config[width]}
    dim, what = config[width] // config[heads], f"{width} / {heads}"
    if isinstance(config.get("head_dim"), int):
        dim, what = config["head_dim"], "head_dim"
    for name in (heads, "num_key_value_heads"):
        if isinstance(config.get(name), int) and (name != heads or config[name] * dim != config[width]):
            out[f"{name} * {what}"] = config[name] * dim
    if isinstance(config.get("mlp_ratio"), int):
        out[f"mlp_ratio * {width}"] = config["mlp_ratio"] * config[width]
    return out
