"""Make a checkpoint of the official MULTI-TAP code into an artefact that scores.

  multitap import --checkpoint=Multi-TAP-Qwen2-VL-2B --base=Qwen2-VL-2B-Instruct --output=artefact
  multitap import --checkpoint=hub:brl-xfact/Multi-TAP-Qwen2-VL-2B \\
      --base=hub:Qwen/Qwen2-VL-2B-Instruct --output=artefact

The official checkpoints hold safetensors with keys backbone_model.* and reward_head.*, and no tokenizer: --base names
the backbone's own folder, whose tokenizer, processor and (where the checkpoint has none) config.json go along. Scores
are those of the official code: flat positions, pictures 560 x 560, its prompts. It trains and evaluates with different
prompts: --prompt=official-eval gives the scores of its evaluation. What `multitap export --format=official` wrote says
itself how it was trained. Names beginning with hub: are fetched from the Hugging Face hub; all others are folders.
"""

from absl import flags


def define_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_string("checkpoint", None, "Folder (or hub:OWNER/NAME) of the weights. Required.", flag_values=values)
    flags.DEFINE_string("base", None, "The backbone's own folder (or hub:OWNER/NAME).", flag_values=values)
    flags.DEFINE_string("output", None, "Artefact folder to write. Required.", flag_values=values)
    flags.DEFINE_string("prompt", "auto", "Prompt variant; auto: official-train.", flag_values=values)
    flags.DEFINE_string("position_mode", "auto", "mrope or flat; auto: flat.", flag_values=values)
    flags.DEFINE_string("image_policy", "auto", "square:N or native:MIN:MAX; auto: square:560.", flag_values=values)
    flags.DEFINE_bool("overwrite", False, "Replace an artefact at --output.", flag_values=values)
    flags.mark_flags_as_required(["checkpoint", "output"], flag_values=values)


def run(values: flags.FlagValues) -> int:
    from multitap_jax.scoring.importing import import_official

    artefact = import_official(
        values.checkpoint,
        values.output,
        base=values.base,
        prompt=values.prompt,
        position_mode=values.position_mode,
        image_policy=values.image_policy,
        overwrite=values.overwrite,
    )
    contract = artefact.manifest.contract
    print(f"wrote {artefact.folder} ({contract.prompt}, {contract.position_mode} positions, {contract.image_policy})")
    return 0
