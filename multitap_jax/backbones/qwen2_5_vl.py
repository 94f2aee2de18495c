"""Qwen2.5-VL (arXiv 2502.13923) as an encoder: Qwen2-VL's decoder behind a tower that mostly attends inside windows.

Same function as transformers' Qwen2_5_VLModel on still images. The tower has RMS norms and gated MLPs; all layers have
the same parameters, but only those of `full_layers` see whole pictures, the others windows of a picture (`windows.py`).
Letters as in `qwen.py`.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from multitap_jax.backbones.config import Section, tied
from multitap_jax.backbones.layers import Linear
from multitap_jax.backbones.qwen import (
    QwenConfig,
    QwenVL,
    Tower,
    TowerConfig,
    TowerLayer,
    qwen2_decoder,
    rms_norm,
    text_section,
)
from multitap_jax.backbones.stack import Execution, collect_layers, run_layers
from multitap_jax.backbones.vision import Pixels
from multitap_jax.backbones.windows import (
    make_local_visibility,
    scoped_attention,
    sort_cells,
    sort_windows,
    unsort_cells,
)
from multitap_jax.batch import PackedBatch


@dataclasses.dataclass(frozen=True)
class WindowTowerConfig(TowerConfig):
    """The tower: what `TowerConfig` has, and

    Attributes:
      window_size: pixels a side of a window.
      full_layers: the layers that see whole pictures, fullatt_block_indexes of `config.json`.
    """

    window_size: int
    full_layers: tuple[int, ...]

    @property
    def window(self) -> int:
        """Patches a side of a window."""
        return self.window_size // self.pixels.patch_size

    def inconsistencies(self) -> Iterator[str]:
        """What is wrong with the numbers, one sentence each."""
        yield from super().inconsistencies()
        factor = self.pixels.patch_size * self.merge_size
        if factor > 0 and self.window_size % factor:
            yield (
                f"vision_config.window_size = {self.window_size} must be a multiple of patch_size * spatial_merge_size "
                f"= {factor}: windows hold whole cells"
            )
        if wrong := [i for i in self.full_layers if not 0 <= i < self.num_layers]:
            yield f"vision_config.fullatt_block_indexes names {wrong}, but depth = {self.num_layers}"


@dataclasses.dataclass(frozen=True)
class Qwen25VLConfig(QwenConfig):
    """The numbers of a Qwen2.5-VL model."""

    model_type: ClassVar[str] = "qwen2_5_vl"

    vision: WindowTowerConfig

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], preprocessor: Mapping[str, Any] | None = None) -> "Qwen25VLConfig":
        """Reads the flat layout of the hub (before transformers 5) and the nested one (since).

        Fields that a file omits have the defaults of transformers' Qwen2_5_VLConfig, which does not write defaults of
        nested sections; its hidden_size of 3584 for the tower is that of no published model. Video fields are ignored.

        Raises:
          ConfigError: another model type, a feature that is not implemented, or numbers that contradict each other.
        """
        root = Section(config)
        root.expect("model_type", cls.model_type)
        text, vision = text_section(root), root.section("vision_config")
        decoder = qwen2_decoder(text)
        vision.expect("hidden_act", "silu")
        tower = WindowTowerConfig.read(
            vision,
            Pixels.from_hf(vision.size("patch_size", 14), root.beside(preprocessor)),
            depth=32,
            size=3584,
            intermediate_size=vision.size("intermediate_size", 3420),
            window_size=vision.size("window_size", 112),
            full_layers=vision.wholes("fullatt_block_indexes", (7, 15, 23, 31)),
        )
        found = cls(decoder, tower, tied(root, text), root.whole("image_token_id", 151655))
        return root.settle(found, "a Qwen2.5-VL model")

    @property
    def window(self) -> int:
        """Patches a side of the windows that most layers of the tower attend in, for `flops.count_work`."""
        return self.vision.window

    def vision_flops(self, patches: int, patch_pairs: int, window_pairs: int) -> float:
        """Forward FLOPs of the tower and its merger.

        Args:
          patches: real patches.
          patch_pairs: pairs of patches of one picture, which the full layers compute.
          window_pairs: pairs of patches of one window, which the others need; `windows.py` computes more.
        """
        v = self.vision
        full = len(set(v.full_layers))
        return self.tower_flops(patches, full * patch_pairs + (v.num_layers - full) * window_pairs, matrices=3)


class GatedMLP(nnx.Module):
    """down(silu(gate(x)) * up(x)), with biases."""

    def __init__(self, size: int, inner: int, *, rngs: nnx.Rngs, param_dtype: jnp.dtype, stack: int):
        options: dict[str, Any] = {"bias": True, "rngs": rngs, "param_dtype": param_dtype, "stack": stack}
        self.gate_proj = Linear(("vision", "mlp"), (size, inner), **options)
        self.up_proj = Linear(("vision", "mlp"), (size, inner), **options)
        self.down_proj = Linear(("mlp", "vision"), (inner, size), **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[R, P, E] -> [R, P, E]."""
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


class WindowLayer(TowerLayer):
    """Pre-norm vision block that sees whole pictures or windows of them, as it is told."""

    attend = staticmethod(scoped_attention)


class WindowTower(Tower):
    """Raw patches -> features of merged cells; sorted by window in between."""

    config: WindowTowerConfig

    def __call__(self, batch: PackedBatch, execution: Execution) -> jax.Array:
        """[R, C, H] features of the cells."""
        x, shared, order = self._sorted(batch, execution)
        x = run_layers(self.layers, x, *shared, each=(self.full,), execution=execution)
        return unsort_cells(self.merger(x), order)

    def hidden_states(self, batch: PackedBatch, execution: Execution) -> jax.Array:
        """[L + 1, R, P, E]: the embedded patches and the output of each block, in the batch's order."""
        x, shared, order = self._sorted(batch, execution)
        states = collect_layers(self.layers, x, *shared, each=(self.full,), execution=execution)
        return jnp.stack([unsort_cells(state, order) for state in states])

    @property
    def full(self) -> np.ndarray:
        """bool[L]: whether a layer sees whole pictures."""
        return np.isin(np.arange(self.config.num_layers), self.config.full_layers)

    def _sorted(self, batch: PackedBatch, execution: Execution) -> tuple[jax.Array, tuple[Any, ...], jax.Array]:
        config = self.config
        position, segment = jnp.asarray(batch.patch_position), jnp.asarray(batch.patch_segment)
        order, window = sort_windows(position, segment, config.window, config.cell)
        patches, position, segment = (sort_cells(x, order) for x in (jnp.asarray(batch.patches), position, segment))
        x, (angles, whole) = self.prepare(
            batch._replace(patches=patches, patch_position=position, patch_segment=segment), execution
        )
        return x, (angles, whole, make_local_visibility(window, config.window**2, setup=execution.setup)), order


class Qwen25VL(QwenVL):
    """The whole encoder."""

    def __init__(self, config: Qwen25VLConfig, *, rngs: nnx.Rngs, param_dtype: jnp.dtype = jnp.float32):
        tower = functools.partial(WindowTower, norm=rms_norm, mlp=GatedMLP, layer=WindowLayer)
        super().__init__(config, tower, rngs=rngs, param_dtype=param_dtype)
