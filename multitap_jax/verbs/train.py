"""Stage 1: fine-tune a backbone and its reward head on human scores.

  multitap train --config=configs/official.py --workdir=run \\
      --config.model.checkpoint=Qwen2-VL-2B-Instruct --config.data.train=polaris/train.jsonl

A config file's `get_config()` returns the settings listed below; --config.SECTION.NAME=VALUE overrides one. Ratings on
another scale than 0 to 1, or under another name than score, are trained on with, for instance,

      --config.data.target=ratings.realism --config.data.target_range='(1, 5)'

The run writes to --workdir: run.json, metrics.jsonl, rejected.jsonl, checkpoints/, and at the end artefact/, which
`score`, `embed`, `fit` and `export` take as --checkpoint. The same command resumes after any interruption.
"""

import difflib
import textwrap
from collections.abc import Sequence
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from multitap_jax.config import TrainConfig, describe, from_config_dict
from multitap_jax.verbs.common import process_flags


def define_flags(values: flags.FlagValues) -> None:
    config_flags.DEFINE_config_file("config", None, "Config file with get_config(). Required.", flag_values=values)
    flags.DEFINE_string("workdir", None, "Folder of the run. Required.", flag_values=values)
    process_flags(values)
    flags.mark_flags_as_required(["config", "workdir"], flag_values=values)


def more_help() -> str:
    """The settings, their defaults (which a config file may change) and what they mean."""
    lines = ["Settings (default in multitap_jax/config.py; a config file has its own):"]
    for name, default, meaning in describe(TrainConfig):
        text = f"{meaning} (default: {default!r})"
        lines += [f"  --{name}", textwrap.fill(text, 96, initial_indent=" " * 6, subsequent_indent=" " * 6)]
    return "\n".join(lines)


def misuse(argv: Sequence[str]) -> str | None:
    """What is wrong with the arguments in a way that ml_collections would not put into words."""
    sections = set(TrainConfig.__dataclass_fields__)
    known = [name for name, _, _ in describe(TrainConfig)]
    wrong = []
    for argument in argv:
        name, _, value = argument.lstrip("-").partition("=")
        if name == "config" and value and not Path(path := value.partition(":")[0]).is_file():
            wrong.append(f"--config={value}: there is no file {path}; configs/ holds some to start from")
        setting = name.partition("[")[0]
        if setting.startswith("config.") and setting not in known and setting.removeprefix("config.") not in sections:
            section, _, last = setting.rpartition(".")
            there = [name.rpartition(".")[2] for name in known if name.rpartition(".")[0] == section]
            near = [f"{section}.{name}" for name in difflib.get_close_matches(last, there, n=1)]
            near += [name for name in known if name.endswith(f".{last}")]  # of another section
            hint = f"did you mean --{near[0]}?" if near else f"settings of {section}: {', '.join(there) or 'none'}"
            wrong.append(f"--{setting} is not a setting; {hint}")
    return "\n".join(wrong) or None


def run(values: flags.FlagValues) -> int:
    from multitap_jax.stage1.run import run_training

    return run_training(from_config_dict(TrainConfig, values.config.to_dict()), values.workdir).exit_code
