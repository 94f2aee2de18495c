"""Stage 1: fine-tune a backbone and its reward head on human scores.

  multitap train --config=configs/official.py --workdir=run \\
      --config.model.checkpoint=Qwen2-VL-2B-Instruct --config.data.train=polaris/train.jsonl

A config file's `get_config()` returns the settings of multitap_jax/config.py; --config.SECTION.NAME=VALUE overrides.
The run writes to --workdir: config.json, metrics.jsonl, rejected.jsonl, checkpoints/, and at the end artefact/, which
`score`, `embed`, `fit` and `export` take as --checkpoint. The same command resumes after any interruption.
"""

from absl import flags
from ml_collections import config_flags

from multitap_jax.config import TrainConfig, from_config_dict


def define_flags(values: flags.FlagValues) -> None:
    config_flags.DEFINE_config_file("config", None, "Config file with get_config(). Required.", flag_values=values)
    flags.DEFINE_string("workdir", None, "Folder of the run. Required.", flag_values=values)
    flags.mark_flags_as_required(["config", "workdir"], flag_values=values)


def run(values: flags.FlagValues) -> int:
    from multitap_jax.stage1.run import run_training

    return run_training(from_config_dict(TrainConfig, values.config.to_dict()), values.workdir).exit_code
