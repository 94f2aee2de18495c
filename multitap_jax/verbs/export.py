"""Write a checkpoint in another layout.

  multitap export --checkpoint=run/artefact --format=official --output=official

Formats: `artefact` (the same folder elsewhere), `heads` (reward and ridge heads alone, usable with NumPy), `official`
(keys backbone_model.* and reward_head.*, as the official PyTorch code reads them).
"""

from collections.abc import Callable

from absl import flags

FORMATS = ("artefact", "heads", "official")


def define_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_string("checkpoint", None, "Artefact folder (what `train` writes). Required.", flag_values=values)
    flags.DEFINE_string("output", None, "Folder to write. Required.", flag_values=values)
    flags.DEFINE_enum("format", "artefact", FORMATS, "Layout.", flag_values=values)
    flags.mark_flags_as_required(["checkpoint", "output"], flag_values=values)


def run(values: flags.FlagValues) -> int:
    from multitap_jax.scoring import export

    writers: dict[str, Callable[..., object]] = {
        "artefact": export.export_artefact,
        "heads": export.export_heads,
        "official": export.export_official,
    }
    writers[values.format](values.checkpoint, values.output)
    print(f"wrote {values.output} ({values.format})")
    return 0
