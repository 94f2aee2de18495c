"""Write a checkpoint in another layout.

  multitap export --checkpoint=run/artefact --format=official --output=official
  multitap export --checkpoint=run/artefact --format=stablehlo --input=pairs.jsonl --output=program

Formats: `artefact` (the same folder elsewhere), `heads` (reward and ridge heads alone, usable with NumPy), `official`
(keys backbone_model.* and reward_head.*, as the official PyTorch code reads them; `multitap import` reads it too),
`stablehlo` (a jax.export program of the shape of a batch of --input, for any process with jax), `vllm` (the overall
score as a vLLM classifier). docs/exporting.md shows how others read them.
"""

import sys
import warnings

from absl import flags

FORMATS = ("artefact", "heads", "official", "stablehlo", "vllm")
EXAMPLE_PAIRS = 1024  # records that the example is packed of, as many as a window of `score`


def define_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_string("checkpoint", None, "Artefact folder (what `train` writes). Required.", flag_values=values)
    flags.DEFINE_string("output", None, "Folder to write. Required.", flag_values=values)
    flags.DEFINE_enum("format", "artefact", FORMATS, "Layout.", flag_values=values)
    flags.DEFINE_string("input", None, "Records; the first of them make stablehlo's example batch.", flag_values=values)
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Type of stablehlo's program.", flag_values=values)
    flags.DEFINE_integer("batch_tokens", 16384, "About how many tokens stablehlo's batch holds.", flag_values=values)
    flags.DEFINE_list("platforms", ["cpu"], "Where stablehlo's program runs: cpu, cuda, tpu.", flag_values=values)
    flags.DEFINE_bool("overwrite", False, "Replace an export of the same format at --output.", flag_values=values)
    flags.mark_flags_as_required(["checkpoint", "output"], flag_values=values)


def run(values: flags.FlagValues) -> int:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _write(values)
    from multitap_jax.scoring.exports import ContractWarning

    for warning in caught:
        if issubclass(warning.category, ContractWarning):
            print(f"warning: {warning.message}", file=sys.stderr)
    if lost := _left_out(values):
        print(
            f"note: this layout has no place for {lost} ridge heads, and `multitap import` will not find them in it; "
            "--format=heads writes them"
        )
    print(f"wrote {values.output} ({values.format})")
    return 0


def _left_out(values: flags.FlagValues) -> int:
    """How many ridge heads the artefact has that the format does not."""
    from multitap_jax.scoring.artefact import Artefact

    if values.format not in ("official", "vllm"):
        return 0
    return len(Artefact.open(values.checkpoint).manifest.objectives)


def _write(values: flags.FlagValues) -> None:
    from multitap_jax.scoring import exports

    if values.format != "stablehlo":
        getattr(exports, f"export_{values.format}")(values.checkpoint, values.output, overwrite=values.overwrite)
        return
    from multitap_jax.data.records import load_records
    from multitap_jax.data.stream import Pair

    if not values.input:
        raise ValueError("--format=stablehlo needs --input: records whose first batch gives the program its shape")
    records = load_records(values.input, max_rejected=1.0).records[:EXAMPLE_PAIRS]
    exports.export_stablehlo(
        values.checkpoint,
        values.output,
        [Pair.of(record) for record in records],
        dtype=values.dtype,
        batch_tokens=values.batch_tokens,
        platforms=values.platforms,
        overwrite=values.overwrite,
    )
