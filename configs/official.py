"""Stage 1 by the official recipe, in three variants.

  effective (default)  what the official script really does: full fine-tuning, AdamW 2e-7 constant, weight decay 0.01,
                       clip 1.0 of a gradient that the script has divided by 4 (hence 4.0 here, and epsilon 4e-8),
                       32 pairs a step, one epoch
  claimed              what its yaml asks for and the script never reads: cosine schedule with 10 % warm-up, clip 1.0 of
                       the mean gradient. (The yaml's paged 8-bit Adam changes how moments are stored, not the rule;
                       moments here are float32.)

  mixture              effective, on the official data: all of Polaris and the rating-balanced part of ImageReward

All: bfloat16 computation, float32 master weights, flat positions, pictures 560 x 560 (docs/recipes.md).

  multitap train --config=configs/official.py --workdir=runs/official \
      --config.model.checkpoint=Qwen2-VL-2B-Instruct --config.data.train=polaris_imagereward/train.jsonl
  multitap train --config=configs/official.py:claimed ...

The mixture reads what `multitap convert` makes of both (docs/datasets.md):

  multitap convert --dataset=polaris     --source=Polaris       --split=train --output=polaris/train
  multitap convert --dataset=imagereward --source=ImageRewardDB --split=train --output=imagereward/train
  multitap train --config=configs/official.py:mixture --workdir=runs/mixture \
      --config.model.checkpoint=Qwen2-VL-2B-Instruct

Hardware: made for 8 accelerators with 80 GB (fsdp takes all devices by default). Not yet run on published weights.
"""

from ml_collections import ConfigDict

from multitap_jax.config import TrainConfig, to_dict


def get_config(variant: str = "effective") -> ConfigDict:
    """The settings of a variant; what is not named keeps its default in multitap_jax/config.py."""
    if variant not in ("effective", "claimed", "mixture"):
        raise ValueError(f"configs/official.py:{variant}: the variants are effective, claimed and mixture")
    config = ConfigDict(to_dict(TrainConfig()))
    config.update(
        {
            "model": {
                "checkpoint": "",
                "dtype": "bfloat16",
                "remat": "full",
                "position_mode": "flat",
                "attention": "auto",
            },
            "data": {
                "train": "",
                "evaluation": "",
                "holdout": 0.0,
                "target": "score",
                "target_range": (0.0, 1.0),
                "prompt": "official-train",
                "image_policy": "square:560",
                "shuffle": "pairs",
                "row_length": 0,
                "max_rejected": 0.01,
                "allow_outside_root": False,
            },
            "optimizer": {
                "learning_rate": 2e-7,
                "schedule": "constant",
                "warmup_ratio": 0.0,
                "weight_decay": 0.01,
                "b1": 0.9,
                "b2": 0.999,
                "eps": 4e-8,
                "clip_norm": 4.0,
            },
            "trainable": {"parts": "full", "lora_rank": 16, "lora_alpha": 32.0, "lora_targets": ("q_proj", "v_proj")},
            "mesh": {"data": 1, "fsdp": -1, "tensor": 1, "context": 1},
            "checkpoint": {"every_steps": 500, "every_minutes": 15.0, "keep": 3},
            "batch_size": 32,
            "accumulation": 4,
            "epochs": 1,
            "seed": 42,
            "evaluate_every": 200,
            "log_every": 10,
        }
    )
    if variant == "claimed":
        config.optimizer.schedule = "cosine"
        config.optimizer.warmup_ratio = 0.1
        config.optimizer.eps, config.optimizer.clip_norm = 1e-8, 1.0
    if variant == "mixture":
        config.data.train, config.data.balanced = "polaris/train", "imagereward/train"
    return config
