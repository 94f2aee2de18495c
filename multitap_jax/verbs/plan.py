"""What a run will need, before a chip is paid for: compiles its steps for machines that are not there.

  multitap plan --config=configs/official.py --model=qwen2-vl-7b --topology=v5e:8x8
  multitap plan --config=configs/lora.py --model=qwen2-vl-2b --topology=cpu:8

The real training step and the real embedding and scoring step are compiled for every chip of the topology, from the
model's config.json alone: no weights, no data, no accelerator. Printed are the memory each chip needs against what it
has, FLOPs, how fast the step can be at best, the largest collectives, and whether it fits.

--model is a folder with a config.json, or a published size by name; without it, config.model.checkpoint. TPU topologies
need libtpu (pip install -e '.[tpu-plan]', no TPU); cpu:N needs nothing. A model of 7 billion parameters takes
minutes and about 3 GB of memory on two cores; --effort=quick a quarter of the time (see below).

The shapes are those that packing chooses for pairs of the sizes that --texts-per-image, --text-tokens, --prompt-tokens,
--pictures and --picture assume. Settings of the run are overridden as in `train`:

  multitap plan ... --config.mesh.fsdp=16 --config.mesh.tensor=4 --config.batch_size=256 --config.accumulation=1

Exit code: 0 every step fits; 1 one does not, or an error that is explained; 2 wrong usage.
"""

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from multitap_jax.config import TrainConfig, from_config_dict
from multitap_jax.verbs import train
from multitap_jax.verbs.common import whole_number

STEPS = {"both": ("training", "scoring"), "training": ("training",), "scoring": ("scoring",)}


def define_flags(values: flags.FlagValues) -> None:
    text = lambda name, default, meaning: flags.DEFINE_string(name, default, meaning, flag_values=values)
    config_flags.DEFINE_config_file("config", None, "Config file with get_config(). Required.", flag_values=values)
    text("topology", None, "Chips: v5e:8x8, v5p:4x4x4, v6e:8x8 (other sides too) or cpu:8. Required.")
    whole_number(values, "slices", 1, "Slices of that topology; config.mesh.data is a multiple of it.")
    text("model", None, "Folder with a config.json, or a published size such as qwen2-vl-7b.")
    flags.DEFINE_enum("step", "both", list(STEPS), "Which step to compile.", flag_values=values)
    whole_number(values, "texts_per_image", 6, "Texts judged of one picture, where config.data.shuffle groups them.")
    whole_number(values, "text_tokens", 40, "Tokens of a judged text.")
    whole_number(values, "prompt_tokens", 26, "Tokens before the text, without pictures.")
    whole_number(values, "pictures", 1, "Pictures of a pair.", low=0)
    text("picture", "1024x768", "Width x height of a picture, where the image policy keeps its size.")
    flags.DEFINE_enum(
        "effort",
        "full",
        ["full", "quick"],
        "How hard the compiler tries: full is what a run gets; quick is several times faster, for a first look.",
        flag_values=values,
    )
    whole_number(values, "verify", 0, "Where training does not fit: compile up to so many remedies.", low=0)
    text("json", None, "File for everything that is printed, and more, in plain values.")
    text("shardings", None, "File for a list of every array of the run: shape, axes, partition, bytes a chip.")
    flags.mark_flags_as_required(["config", "topology"], flag_values=values)


def misuse(argv: Sequence[str]) -> str | None:
    """What is wrong with the settings."""
    return train.misuse(argv)


def more_help() -> str:
    """The formula behind the bounds, and the names of models."""
    from multitap_jax.planning import roofline
    from multitap_jax.planning.published import PUBLISHED

    formula = (roofline.__doc__ or "").strip()
    return f"Published sizes: {', '.join(PUBLISHED)}\n\n{formula}"


def run(values: flags.FlagValues) -> int:
    import jax
    from rich.console import Console

    from multitap_jax.planning.chips import Topology
    from multitap_jax.planning.planner import make_plan, sharding_listing
    from multitap_jax.planning.report import print_plan, to_json
    from multitap_jax.planning.workload import Assumptions

    for name in ("json", "shardings"):  # said before minutes of compiling, not after
        if (path := values[name].value) and not Path(path).parent.is_dir():
            raise ValueError(f"--{name}={path}: there is no folder {Path(path).parent}; make it, or choose another")
    config = from_config_dict(TrainConfig, values.config.to_dict())
    model = values.model or config.model.checkpoint
    if not model:
        raise ValueError("no model: give --model=qwen2-vl-7b (or a folder), or --config.model.checkpoint=FOLDER")
    width, height = _sides(values.picture)
    assumed = Assumptions(
        values.texts_per_image, values.text_tokens, values.prompt_tokens, values.pictures, height, width
    )
    topology, progress = Topology.parse(values.topology, values.slices), Console(stderr=True)
    with contextlib.suppress(RuntimeError):  # plans are made on the CPU, also where there is something faster
        jax.config.update("jax_platforms", "cpu")
    topology.devices()  # before JAX is used, which fixes the number of simulated devices
    if values.shardings:
        Path(values.shardings).write_text(sharding_listing(config, model, topology.size, assumed))
    plan = make_plan(
        config,
        model,
        topology,
        assumed,
        steps=STEPS[values.step],
        quick=values.effort == "quick",
        verify=values.verify,
        report=progress.print,
    )
    print_plan(plan, Console(width=80, soft_wrap=False))
    if values.json:
        Path(values.json).write_text(json.dumps(to_json(plan), indent=2) + "\n")
    return 0 if plan.fits else 1


def _sides(text: str) -> tuple[int, int]:
    width, _, height = text.partition("x")
    if not (width.isdigit() and height.isdigit() and int(width) and int(height)):
        raise ValueError(f"--picture={text}: expected WIDTHxHEIGHT in pixels, such as 1024x768")
    return int(width), int(height)
