"""Rotary positions of decoders: plain, stretched as Llama 3 has it, or split over time, height and width (M-RoPE).

Frequencies and angles are float32, computed from whole positions; only the turned queries and keys are rounded.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from multitap_jax.backbones.layers import inverse_frequencies
from multitap_jax.config import ConfigError

Angles = tuple[jax.Array, jax.Array]  # cosine and sine, float32[B, S, 1, D / 2]


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
    """Long wavelengths are stretched by `factor`, short ones kept, those between blended (Llama 3.1, section 3.4.2)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def __call__(self, frequency: np.ndarray) -> np.ndarray:
        """float32[D / 2] -> float32[D / 2]."""
        wavelength = 2 * math.pi / frequency
        low, high = self.low_freq_factor, self.high_freq_factor
        smooth = np.clip((self.original_max_position_embeddings / wavelength - low) / (high - low), 0, 1)
        return ((1 - smooth) * frequency / self.factor + smooth * frequency).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Rope:
    """Which frequency turns with which axis of a position.

    Attributes:
      theta: base of the frequencies.
      sections: how many of the D / 2 frequencies turn with time, height and width; None: all with time.
      interleaved: frequencies go to the axes in turn (Qwen3-VL) instead of section after section (Qwen2-VL).
      scaling: stretching of long wavelengths, or None.
    """

    theta: float
    sections: tuple[int, int, int] | None = None
    interleaved: bool = False
    scaling: Llama3Scaling | None = None

    @classmethod
    def from_hf(cls, text: Mapping[str, Any], *, theta: float) -> "Rope":
        """Reads `rope_scaling` + `rope_theta` (before transformers 5) or `rope_parameters` (since).

        Args:
          text: the text section of `config.json`.
          theta: the base where the file names none.

        Raises:
          ConfigError: a kind of scaling that is not implemented, or an incomplete one.
        """
        rope = {**(text.get("rope_scaling") or {}), **(text.get("rope_parameters") or {})}
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind not in ("default", "mrope", "llama3"):
            raise ConfigError(f"rope type {kind!r} is not implemented; implemented: default, mrope, llama3")
        scaling = None
        if kind == "llama3":
            names = [field.name for field in dataclasses.fields(Llama3Scaling)]
            if lost := [name for name in names if name not in rope]:
                raise ConfigError(f"rope_scaling of type 'llama3' lacks {', '.join(lost)}")
            scaling = Llama3Scaling(*(rope[name] for name in names))
        sections = rope.get("mrope_section")
        base = rope.get("rope_theta", text.get("rope_theta"))
        return cls(
            theta=float(theta if base is None else base),
            sections=None if sections is None else tuple(sections),
            interleaved=bool(rope.get("mrope_interleaved", False)),
            scaling=scaling,
        )

    def inconsistencies(self, head_dim: int) -> Iterator[str]:
        """What does not fit a head of `head_dim`."""
        if self.sections is not None and 2 * sum(self.sections) != head_dim:
            yield f"mrope_section = {list(self.sections)} must add up to half the head size {head_dim}"
        elif self.sections is not None and self.interleaved and 6 * max(self.sections[1:]) > head_dim:
            yield (
                f"mrope_section = {list(self.sections)} gives height or width more than every third of the "
                f"{head_dim // 2} frequencies, but they are interleaved"
            )

    def axes(self, head_dim: int) -> np.ndarray:
        """int[D / 2]: the axis (0 time, 1 height, 2 width) that each frequency turns with."""
        if self.sections is None:
            return np.zeros(head_dim // 2, np.int64)
        if not self.interleaved:
            return np.repeat(np.arange(3), self.sections)
        axes = np.zeros(head_dim // 2, np.int64)
        for axis in (1, 2):
            axes[axis : 3 * self.sections[axis] : 3] = axis
        return axes

    def angles(self, positions: jax.Array, head_dim: int) -> Angles:
        """int32[B, S, 3] -> cosine and sine, float32[B, S, 1, D / 2]."""
        frequency = inverse_frequencies(head_dim, self.theta)
        if self.scaling is not None:
            frequency = self.scaling(frequency)
        angle = positions[:, :, self.axes(head_dim)].astype(jnp.float32) * frequency[None, None, :]
        return jnp.cos(angle)[:, :, None], jnp.sin(angle)[:, :, None]
