"""Flags that several verbs share."""

from typing import Any

from absl import flags


def input_flags(values: flags.FlagValues, *, required: bool = True) -> None:
    """--input and what is allowed in it."""
    text = "Records: JSONL, CSV or Parquet, or a folder holding one." + (" Required." if required else "")
    flags.DEFINE_string("input", None, text, flag_values=values)
    flags.DEFINE_float("max_rejected", 0.01, "Stop when a larger share of records is unusable.", flag_values=values)
    flags.DEFINE_bool(
        "allow_outside_root", False, "Let image paths leave the folder of the records file.", flag_values=values
    )
    if required:
        flags.mark_flag_as_required("input", flag_values=values)


def model_flags(values: flags.FlagValues) -> None:
    """--checkpoint and how it is computed."""
    flags.DEFINE_string("checkpoint", None, "Artefact folder (what `train` writes). Required.", flag_values=values)
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Computation type.", flag_values=values)
    flags.DEFINE_integer("batch_tokens", 16384, "About how many tokens a batch holds.", flag_values=values)
    flags.DEFINE_integer("max_length", 2048, "Longest pair in tokens, image tokens included.", flag_values=values)
    flags.DEFINE_bool("truncate", False, "Cut the tail of longer texts and say so.", flag_values=values)
    flags.mark_flag_as_required("checkpoint", flag_values=values)


def load_scorer(values: flags.FlagValues) -> Any:
    """The scorer that the model flags describe."""
    from multitap_jax.scoring.scorer import Scorer

    return Scorer.from_pretrained(
        values.checkpoint,
        dtype=values.dtype,
        batch_tokens=values.batch_tokens,
        max_length=values.max_length,
        truncate=values.truncate,
    )
