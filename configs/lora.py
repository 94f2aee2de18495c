"""LoRA on the decoder's attention, with the reward head: a small share of the memory of full fine-tuning.

  multitap train --config=configs/lora.py --workdir=runs/lora \
      --config.model.checkpoint=Qwen2-VL-2B-Instruct --config.data.train=ratings.jsonl

Adapters are merged into the weights of the artefact. Rates are those usual for LoRA, not the paper's. Not yet run on
published weights; README shows it on the demo's base.
"""

from ml_collections import ConfigDict

from multitap_jax.config import TrainConfig, to_dict


def get_config() -> ConfigDict:
    """The settings; what is not named keeps its default in multitap_jax/config.py."""
    config = ConfigDict(to_dict(TrainConfig()))
    config.update(
        {
            "model": {"checkpoint": "", "dtype": "bfloat16", "remat": "dots", "position_mode": "auto"},
            "data": {
                "train": "",
                "evaluation": "",
                "holdout": 0.1,
                "target": "score",
                "target_range": (0.0, 1.0),
                "prompt": "official-train",
                "image_policy": "auto",
                "shuffle": "groups",
                "max_rejected": 0.01,
                "allow_outside_root": False,
            },
            "optimizer": {"learning_rate": 1e-4, "schedule": "cosine", "warmup_ratio": 0.05, "weight_decay": 0.0},
            "trainable": {
                "parts": "lora",
                "lora_rank": 16,
                "lora_alpha": 32.0,
                "lora_targets": ("q_proj", "k_proj", "v_proj", "o_proj"),
            },
            "mesh": {"data": 1, "fsdp": -1, "tensor": 1, "context": 1},
            "checkpoint": {"every_steps": 200, "every_minutes": 10.0, "keep": 2},
            "batch_size": 32,
            "accumulation": 1,
            "epochs": 3,
            "seed": 42,
            "evaluate_every": 50,
            "log_every": 10,
        }
    )
    return config
