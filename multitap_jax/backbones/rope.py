"""Rotary positions of decoders: plain, stretched, or split over time, height and width (M-RoPE).

Frequencies and angles are float32, computed from whole positions; only the turned queries and keys are rounded.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from multitap_jax.backbones.config import Section
from multitap_jax.backbones.layers import inverse_frequencies

KINDS = ("default", "mrope", "llama3", "linear", "dynamic")
Angles = tuple[jax.Array, jax.Array]  # cosine and sine, float32[B, S, 1, D / 2]


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
    """Long wavelengths are stretched by `factor`, short ones kept, those between blended (Llama 3.1, section 3.4.2)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: float

    @classmethod
    def from_hf(cls, rope: Section) -> "Llama3Scaling":
        """Reads the section, which has no defaults."""
        names = [field.name for field in dataclasses.fields(cls)]
        if lost := [name for name in names if rope.get(name) is None]:
            rope.wrong(f"rope_scaling of type 'llama3' lacks {', '.join(lost)}")
        return cls(**{name: rope.number(name, 1.0) for name in names})

    def __call__(self, frequency: np.ndarray) -> np.ndarray:
        """float32[D / 2] -> float32[D / 2]."""
        wavelength = 2 * math.pi / frequency
        low, high = self.low_freq_factor, self.high_freq_factor
        smooth = np.clip((self.original_max_position_embeddings / wavelength - low) / (high - low), 0, 1)
        return ((1 - smooth) * frequency / self.factor + smooth * frequency).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class LinearScaling:
    """All wavelengths are stretched by `factor` (arXiv 2306.15595)."""

    factor: float

    @classmethod
    def from_hf(cls, rope: Section) -> "LinearScaling":
        """Reads the section."""
        if rope.get("factor") is None:
            rope.wrong("rope_scaling of type 'linear' lacks factor")
        return cls(rope.number("factor", 1.0))

    def __call__(self, frequency: np.ndarray) -> np.ndarray:
        """float32[D / 2] -> float32[D / 2]."""
        return (frequency / np.float32(self.factor)).astype(np.float32)


SCALINGS: dict[str, Callable[[Section], Llama3Scaling | LinearScaling]] = {
    "llama3": Llama3Scaling.from_hf,
    "linear": LinearScaling.from_hf,
}


@dataclasses.dataclass(frozen=True)
class Rope:
    """Which frequency turns with which axis of a position.

    Attributes:
      theta: base of the frequencies.
      sections: how many of the D / 2 frequencies turn with time, height and width; None: all with time.
      interleaved: frequencies go to the axes in turn (Qwen3-VL) instead of section after section (Qwen2-VL).
      scaling: stretching of wavelengths, or None.
      limit: positions that there are; at others a pair gets NaN. A scaling that is "dynamic" keeps the wavelengths up
        to `max_position_embeddings`, and beyond makes them depend on how long the pair is, which is not implemented.
    """

    theta: float
    sections: tuple[int, int, int] | None = None
    interleaved: bool = False
    scaling: Llama3Scaling | LinearScaling | None = None
    limit: int | None = None

    @classmethod
    def from_hf(cls, text: Section, *, theta: float) -> "Rope":
        """Reads `rope_scaling` + `rope_theta` (before transformers 5) or `rope_parameters` (since).

        Args:
          text: the text section of `config.json`.
          theta: the base where the file names none.
        """
        rope = text.merged("rope_scaling", "rope_parameters")
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind not in KINDS:
            text.wrong(f"rope type {kind!r} is not implemented; implemented: {', '.join(KINDS)}")
        time, height, width = rope.wholes("mrope_section", (0, 0, 0), length=3)
        return cls(
            theta=rope.number("rope_theta", text.number("rope_theta", theta)),
            sections=(time, height, width) if rope.get("mrope_section") is not None else None,
            interleaved=rope.flag("mrope_interleaved", False),
            scaling=SCALINGS[kind](rope) if kind in SCALINGS else None,
            limit=text.size("max_position_embeddings", 2048) if kind == "dynamic" else None,
        )

    def inconsistencies(self, head_dim: int) -> Iterator[str]:
        """What does not fit a head of `head_dim`."""
        if isinstance(self.scaling, Llama3Scaling) and self.scaling.high_freq_factor <= self.scaling.low_freq_factor:
            yield "rope_scaling: high_freq_factor must be greater than low_freq_factor"
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
        if self.limit is not None:
            angle = jnp.where(positions[:, :, :1] < self.limit, angle, jnp.float32(np.nan))
        return jnp.cos(angle)[:, :, None], jnp.sin(angle)[:, :, None]
