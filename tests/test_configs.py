"""Every config file resolves to settings, and wrong settings are named."""

import importlib.util
from pathlib import Path

import pytest

from multitap_jax.config import ConfigError, TrainConfig, describe, from_config_dict, to_dict

FILES = sorted((Path(__file__).parents[1] / "configs").glob("*.py"))


def load(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_config_resolves_and_says_how_to_run_it(path):
    module = load(path)
    config = from_config_dict(TrainConfig, module.get_config().to_dict())
    assert f"--config=configs/{path.name}" in module.__doc__
    assert from_config_dict(TrainConfig, to_dict(config)) == config


def test_the_official_recipes_are_what_the_paper_notes_say():
    official = load(next(path for path in FILES if path.stem == "official"))
    effective, claimed = (
        from_config_dict(TrainConfig, official.get_config(*variant).to_dict()) for variant in ((), ("claimed",))
    )
    assert (effective.optimizer.learning_rate, effective.optimizer.weight_decay) == (2e-7, 0.01)
    assert (effective.optimizer.schedule, effective.optimizer.clip_norm) == ("constant", 4.0)
    assert (claimed.optimizer.clip_norm, claimed.optimizer.eps) == (1.0, 1e-8)
    assert (effective.batch_size, effective.epochs, effective.model.dtype) == (32, 1, "bfloat16")
    assert (effective.model.position_mode, effective.data.image_policy) == ("flat", "square:560")
    assert (claimed.optimizer.schedule, claimed.optimizer.warmup_ratio) == ("cosine", 0.1)
    mixture = from_config_dict(TrainConfig, official.get_config("mixture").to_dict())
    assert (mixture.data.train, mixture.data.balanced) == ("polaris/train", "imagereward/train")
    assert mixture.optimizer == effective.optimizer


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"batchsize": 4}, r"config\.batchsize is not a setting; did you mean config\.batch_size\?"),
        ({"optimizer": {"lr": 1.0}}, r"config\.optimizer\.lr is not a setting"),
        ({"batch_size": "many"}, r"config\.batch_size = 'many' \(str\): expected int"),
        ({"batch_size": True}, r"config\.batch_size = True \(bool\): expected int"),
        ({"optimizer": 3}, r"config\.optimizer is a section of settings, but was given 3"),
        ({"data": {"target_range": (0.0,)}}, r"config\.data\.target_range = \(0\.0,\): expected 2 values, got 1"),
        ({"optimizer": {"learning_rate": float("nan")}}, r"config\.optimizer\.learning_rate = nan: expected 0 or more"),
        ({"optimizer": {"learning_rate": float("inf")}}, r"config\.optimizer\.learning_rate = inf: expected 0 or more"),
        ({"optimizer": {"schedule": "linear"}}, r"schedule = 'linear': expected one of constant, cosine"),
        ({"optimizer": {"warmup_ratio": 1.0}}, r"warmup_ratio = 1\.0: expected a number in \[0, 1\)"),
        ({"optimizer": {"b2": float("nan")}}, r"config\.optimizer\.b2 = nan"),
        ({"data": {"max_rejected": 2.0}}, r"config\.data\.max_rejected = 2\.0: expected 0 to 1"),
        ({"data": {"max_rejected": float("nan")}}, r"config\.data\.max_rejected = nan: expected 0 to 1"),
        ({"data": {"target": "realism"}}, r"config\.data\.target = 'realism': expected score or ratings\.NAME"),
        ({"data": {"target_range": (5.0, 1.0)}}, r"config\.data\.target_range = \(5\.0, 1\.0\)"),
        ({"data": {"max_length": 0, "shuffle": "all"}}, r"(?s)shuffle = 'all'.*max_length = 0: expected 1 or more"),
        ({"model": {"dtype": "float16", "attention": "flash"}}, r"(?s)dtype = 'float16'.*config\.model\.attention"),
        ({"model": {"remat": "some"}}, r"config\.model\.remat = 'some': expected one of none, dots, offload, full"),
        ({"trainable": {"parts": "vision"}}, r"parts = 'vision': expected one of full, head, text, lora"),
        ({"trainable": {"lora_rank": 0}}, r"config\.trainable\.lora_rank = 0: expected 1 or more"),
        ({"checkpoint": {"keep": 0}}, r"config\.checkpoint\.keep = 0"),
        ({"epochs": 0, "accumulation": -1}, r"(?s)accumulation = -1: expected 1 or more.*config\.epochs = 0"),
        ({"spike_factor": 0.5}, r"config\.spike_factor = 0\.5: expected more than 1"),
        ({"trainable": {"lora_targets": "q_proj"}}, r"config\.trainable\.lora_targets = 'q_proj': expected a list"),
    ],
)
def test_wrong_settings_are_named(values, message):
    with pytest.raises(ConfigError, match=message):
        from_config_dict(TrainConfig, values)


def test_every_setting_is_described():
    found = {name: (default, meaning) for name, default, meaning in describe(TrainConfig)}
    assert all(meaning for _, meaning in found.values()), found
    assert found["config.optimizer.b2"] == (0.999, "decay of the mean of their squares.")
    assert found["config.model.position_mode"][1].endswith('or "auto" (what the checkpoint says, else "mrope").')
    sections = {name.split(".")[1] for name in found if name.count(".") == 2}
    assert sections == {"model", "data", "optimizer", "trainable", "mesh", "checkpoint"}
