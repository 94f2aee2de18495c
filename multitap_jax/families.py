"""The registry of backbone families: `model_type` of a `config.json` picks one; nothing else in the package asks which.

A family is a model file in `backbones/`, a weight table in `weights/`, and one entry here, which also names its chat
format (`data/chat.py`) and how its pictures become patches and tokens (`data/layouts.py`). docs/adding_a_backbone.md
walks through it.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from PIL import Image

from multitap_jax.backbones import Backbone
from multitap_jax.backbones.llava import Llava, LlavaConfig
from multitap_jax.backbones.llava_onevision import LlavaOnevision, LlavaOnevisionConfig
from multitap_jax.backbones.mllama import Mllama, MllamaConfig
from multitap_jax.backbones.qwen2_5_vl import Qwen25VL, Qwen25VLConfig
from multitap_jax.backbones.qwen2_vl import Qwen2VL, Qwen2VLConfig
from multitap_jax.backbones.qwen3_vl import Qwen3VL, Qwen3VLConfig
from multitap_jax.backbones.xcomposer import MERGE, OFFICIAL, XComposer, XComposerConfig
from multitap_jax.config import ConfigError
from multitap_jax.data import chat
from multitap_jax.data.anyres import AnyresLayout
from multitap_jax.data.hd import HdLayout
from multitap_jax.data.layouts import GridLayout, ImagePolicy, Layout
from multitap_jax.data.tiles import TileLayout
from multitap_jax.data.views import ViewLayout
from multitap_jax.weights import llava, llava_onevision, mllama, qwen2_5_vl, qwen2_vl, qwen3_vl, xcomposer
from multitap_jax.weights.files import FolderError, read_json
from multitap_jax.weights.mapping import Table


class UnsupportedModelError(ConfigError):
    """The architecture of a checkpoint is not one that is implemented."""


@dataclasses.dataclass(frozen=True)
class Family:
    """What the package needs to know of a family.

    Attributes:
      config: reads the contents of `config.json` and `preprocessor_config.json` (or None).
      model: builds the module from that configuration.
      table: the weight table of that configuration.
      chat: the pieces of its chat template.
      layout: how a picture becomes patches and tokens under a policy.
      image_policy: the policy where nobody chose one.
      position_modes: the position modes it knows, the default first.
      official: entries of `config.json` with which the official code's reading of the architecture is computed; weights
        that are imported from its layout get them.
      of: entries of this record that depend on the configuration; `read_config` gives a family with them settled.
    """

    config: Callable[[Mapping[str, Any], Mapping[str, Any] | None], Any]
    model: Callable[..., Backbone]
    table: Callable[[Any], Table]
    chat: chat.ChatFormat
    layout: Callable[[Any, ImagePolicy], Layout]
    image_policy: str = "square:560"
    position_modes: tuple[str, ...] = ("flat",)
    official: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    of: Callable[[Any], Mapping[str, Any]] = lambda config: {}


def _qwen_layout(config: Any, policy: ImagePolicy) -> Layout:
    return GridLayout(policy, config.vision.pixels.patch_size, config.vision.merge_size)


def _tile_layout(config: Any, policy: ImagePolicy) -> Layout:
    v = config.vision
    return TileLayout(policy, v.image_size, v.max_num_tiles, v.pixels.patch_size, Image.Resampling(v.resample))


def _llava_layout(config: Any, policy: ImagePolicy) -> Layout:
    return ViewLayout(policy, config.vision.pixels.patch_size, config.vision.image_size)


def _onevision_layout(config: Any, policy: ImagePolicy) -> Layout:
    pixels, tiles = config.vision.pixels, config.tiles
    return AnyresLayout(policy, pixels.patch_size, tiles.image_size, tiles.pinpoints, tiles.max_views)


def _hd_layout(config: Any, policy: ImagePolicy) -> Layout:
    return HdLayout(policy, config.vision.pixels.patch_size, config.vision.image_size, MERGE)


def _llava_entries(config: Any) -> Mapping[str, Any]:
    policy = f"square:{config.vision.image_size}"
    return {"image_policy": policy, "chat": chat.LLAVA_QWEN2 if config.decoder == "qwen2" else chat.LLAVA}


FAMILIES: dict[str, Family] = {
    "mllama": Family(
        config=MllamaConfig.from_hf,
        model=Mllama,
        table=mllama.table,
        chat=chat.LLAMA32_VISION,
        layout=_tile_layout,
    ),
    "qwen2_vl": Family(
        config=Qwen2VLConfig.from_hf,
        model=Qwen2VL,
        table=qwen2_vl.table,
        chat=chat.QWEN2_VL,
        layout=_qwen_layout,
        position_modes=("mrope", "flat"),
    ),
    "qwen2_5_vl": Family(
        config=Qwen25VLConfig.from_hf,
        model=Qwen25VL,
        table=qwen2_5_vl.table,
        chat=chat.QWEN2_VL,
        layout=_qwen_layout,
        position_modes=("mrope", "flat"),
    ),
    "qwen3_vl": Family(
        config=Qwen3VLConfig.from_hf,
        model=Qwen3VL,
        table=qwen3_vl.table,
        chat=chat.QWEN3_VL,
        layout=_qwen_layout,
        image_policy="square:576",  # cells of 32 pixels; the multiple nearest to the official 560
        position_modes=("mrope", "flat"),
    ),
    "llava": Family(
        config=LlavaConfig.from_hf,
        model=Llava,
        table=llava.table,
        chat=chat.LLAVA,
        layout=_llava_layout,
        of=_llava_entries,
    ),
    "llava_onevision": Family(
        config=LlavaOnevisionConfig.from_hf,
        model=LlavaOnevision,
        table=llava_onevision.table,
        chat=chat.LLAVA_QWEN2,
        layout=_onevision_layout,
        of=lambda config: {"image_policy": f"square:{config.vision.image_size}"},
    ),
    "internlm2": Family(
        config=XComposerConfig.from_hf,
        model=XComposer,
        table=xcomposer.table,
        chat=chat.XCOMPOSER,
        layout=_hd_layout,
        official=OFFICIAL,
        of=lambda config: {"image_policy": f"square:{config.vision.image_size}"},
    ),
}


def family_of(hf_config: Mapping[str, Any]) -> Family:
    """The family that a `config.json` names.

    Raises:
      UnsupportedModelError: `model_type` is absent or not implemented; the message lists those that are.
    """
    model_type = hf_config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise UnsupportedModelError(f"model_type = {model_type!r} is not supported; supported: {known}")
    return FAMILIES[model_type]


def from_config(
    hf_config: Mapping[str, Any],
    *,
    rngs: nnx.Rngs,
    param_dtype: Any = jnp.float32,
    preprocessor: Mapping[str, Any] | None = None,
) -> Backbone:
    """Builds the backbone that a `config.json` describes, with random weights.

    Args:
      hf_config: the contents of `config.json`.
      rngs: source of the initial weights; under `nnx.eval_shape` nothing is allocated.
      param_dtype: type of the parameters.
      preprocessor: the contents of `preprocessor_config.json` (mean and deviation of pixels); None for the usual ones.

    Raises:
      UnsupportedModelError: `model_type` is absent or not implemented.
      ConfigError: the configuration is of the right family but cannot be used.
    """
    family = family_of(hf_config)
    config = _configuration(family, hf_config, preprocessor)
    return family.model(config, rngs=rngs, param_dtype=jnp.dtype(param_dtype))


def read_config(folder: str | Path) -> tuple[Family, Any]:
    """The family and configuration of a checkpoint folder.

    Pixel statistics come from `preprocessor_config.json` or `processor_config.json` where there is one.

    Raises:
      FolderError: `config.json` is missing or describes something that is not implemented.
    """
    folder = Path(folder)
    config = read_json(folder / "config.json")
    try:
        return settle(config, _preprocessor(folder))
    except ConfigError as error:
        raise FolderError(f"{folder / 'config.json'}: {error}") from error


def settle(hf_config: Mapping[str, Any], preprocessor: Mapping[str, Any] | None = None) -> tuple[Family, Any]:
    """The family and configuration that the contents of a `config.json` (and `preprocessor_config.json`) describe.

    Raises:
      UnsupportedModelError, ConfigError: see `from_config`.
    """
    family = family_of(hf_config)
    numbers = _configuration(family, hf_config, preprocessor)
    return dataclasses.replace(family, **family.of(numbers)), numbers


def abstract_backbone(folder: str | Path, *, param_dtype: Any = jnp.float32) -> Backbone:
    """The backbone that a folder's `config.json` describes, with shapes in place of arrays.

    Raises:
      FolderError: see `read_config`.
    """
    family, config = read_config(folder)
    return nnx.eval_shape(lambda: family.model(config, rngs=nnx.Rngs(0), param_dtype=jnp.dtype(param_dtype)))


def weight_table(model: Backbone) -> Table:
    """The weight table of a backbone."""
    return FAMILIES[model.config.model_type].table(model.config)


def num_params(model: nnx.Module) -> int:
    """Number of scalars in all parameters; also of an abstract model."""
    return sum(leaf.size for leaf in jax.tree.leaves(model))


def _configuration(family: Family, config: Mapping[str, Any], preprocessor: Mapping[str, Any] | None) -> Any:
    """The configuration; what is wrong with it is said together with the family that was asked for."""
    try:
        return family.config(config, preprocessor)
    except ConfigError as error:
        raise ConfigError(f"{error}\n(model_type = {config['model_type']!r} picked the family: is it right?)") from None


def _preprocessor(folder: Path) -> Mapping[str, Any] | None:
    if (folder / "preprocessor_config.json").is_file():
        return read_json(folder / "preprocessor_config.json")
    if (folder / "processor_config.json").is_file():
        return read_json(folder / "processor_config.json").get("image_processor")
    return None
