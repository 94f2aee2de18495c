"""Arithmetic of a step, and how much of a device's peak it uses (MFU).

Only useful work counts: no padding, no recomputation (remat), no optimizer. A product of [n, a] and [a, b] is 2 n a b.

  decoder, per token and layer     2 (2 H A D + 2 H G D + 3 H I)            q and o, k and v, gated MLP of inner size I
  decoder, per visible pair, layer 4 A D                                    scores and mix, exactly under the mask
  last layer                       2 (2 H G D) a token, the rest of the above for pooled tokens and their pairs
  vision, per patch and layer      2 (4 E^2 + 2 E V)                        qkv, out, MLP of inner size V (gated: 3 E V)
  vision, per visible pair, layer  4 E                                      of one picture, or of one window of it
  vision, per patch                2 F E                                    patch embedding (frames folded)
  and what joins the tower to the decoder, which each family's `vision_flops` adds (Qwen2-VL's merger, per cell of m^2
  patches: 2 ((m^2 E)^2 + m^2 E H)); a family with layers of another kind has a `forward_flops` of its own (Mllama,
  InternLM-XComposer2.5)

Causal attention counts what is visible, about half of S^2. A backward pass is twice a forward pass where weights learn
and once where only activations need gradients; so training everything costs 3 forward passes.
"""

from typing import Any, NamedTuple

import jax
import numpy as np

from multitap_jax.batch import PackedBatch

# Dense bfloat16 FLOP/s of one device as `jax.Device.device_kind` names it; vendors' data sheets, without sparsity.
PEAK_FLOPS: dict[str, float] = {
    "NVIDIA B200": 2250e12,
    "NVIDIA H200": 989.4e12,
    "NVIDIA H100 NVL": 835.5e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100": 989.4e12,
    "NVIDIA A100": 312e12,
    "NVIDIA A40": 149.7e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA L4": 121e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
}

# Forward passes that a training step is worth, (decoder, vision), by what learns. Adapters need the gradients of
# activations but hardly any of weights; they are counted as sitting in the decoder.
TRAINING_FACTORS: dict[str, tuple[int, int]] = {"full": (3, 3), "text": (3, 1), "lora": (2, 1), "head": (1, 1)}


class Work(NamedTuple):
    """What a batch asks for: real tokens and patches, and how many (query, key) pairs the mask lets see each other.

    `pooled` are the tokens whose states are wanted, and `pooled_pairs` the pairs of which they are the query.
    `patch_pairs` are pairs of one picture, `window_pairs` pairs of one window of it where a tower has windows. Where
    images are kept out of the row: `images`, their number, and `cross_pairs` of a token and a patch that it attends to,
    `pooled_cross_pairs` those of pooled tokens.
    `image_tokens` are those of the tokens that stand for images.
    """

    tokens: int
    token_pairs: int
    patches: int
    patch_pairs: int
    padded_tokens: int
    pooled: int
    pooled_pairs: int
    window_pairs: int | None = None
    images: int = 0
    cross_pairs: int = 0
    pooled_cross_pairs: int = 0
    image_tokens: int = 0


class Flops(NamedTuple):
    """Forward floating-point operations of the decoder and of the vision tower with its merger."""

    decoder: float
    vision: float

    @property
    def total(self) -> float:
        """Of both."""
        return self.decoder + self.vision


def count_work(batch: PackedBatch, *, window: int | None = None, block: tuple[int, int] | None = None) -> Work:
    """Counts the work of a batch on the host, from its segments alone.

    Args:
      batch: host arrays.
      window: patches a side of the windows that layers of the tower attend in, where the configuration has a `window`.
      block: that of `Layout`; needed where images are kept out of the row.
    """
    segment = np.asarray(batch.segment)
    seen = np.stack([_seen(*row) for row in zip(segment, np.asarray(batch.prefix), strict=True)])
    pooled = np.nonzero(np.asarray(batch.record) >= 0)
    pooled = (pooled[0], np.asarray(batch.pool)[pooled])
    patch_segment = np.asarray(batch.patch_segment)
    patch_pairs = sum(int(np.sum(np.bincount(row)[1:].astype(np.int64) ** 2)) for row in patch_segment)
    window_pairs = None if window is None else _window_pairs(np.asarray(batch.patch_position), patch_segment, window)
    work = Work(
        tokens=int((segment > 0).sum()),
        token_pairs=int(seen.sum()),
        patches=int((patch_segment > 0).sum()),
        patch_pairs=patch_pairs,
        padded_tokens=segment.size,
        pooled=len(pooled[0]),
        pooled_pairs=int(seen[pooled].sum()),
        window_pairs=window_pairs,
        image_tokens=int((np.asarray(batch.image_cell) >= 0).sum()),
    )
    if block is None or not batch.image_token.size:
        return work
    images = int((patch_segment > 0).reshape(-1, block[0]).any(axis=1).sum())
    attended = _attended(batch, block[0])
    return work._replace(images=images, cross_pairs=int(attended.sum()), pooled_cross_pairs=int(attended[pooled].sum()))


def _seen(segment: np.ndarray, prefix: np.ndarray) -> np.ndarray:
    """int64[S]: keys that each token of a row sees: of its run up to itself, and the other run that it sees."""
    sizes = np.bincount(segment, minlength=int(prefix.max()) + 1)
    order = np.argsort(segment, kind="stable")
    place = np.empty(len(segment), np.int64)
    place[order] = np.arange(len(segment)) - (np.cumsum(sizes) - sizes)[segment[order]]
    shared = np.where(prefix != segment, sizes[prefix], 0)
    return np.where(segment > 0, place + 1 + shared, 0)


def _attended(batch: PackedBatch, block: int) -> np.ndarray:
    """int64[B, S]: patches that each token attends to, of images that are one block and one cell each.

    Tokens after an image attend to its real patches; tokens of its group before the first image to all of the block.
    """
    segment, prefix, at = (np.asarray(x) for x in (batch.segment, batch.prefix, batch.image_token))
    real = (np.asarray(batch.patch_segment) > 0).reshape(-1, block).sum(axis=1)
    found = np.zeros(segment.shape, np.int64)
    for row in range(len(at)):
        columns = at[row][at[row] >= 0]
        runs = segment[row, columns]
        for column, run in zip(columns, runs, strict=True):
            own = np.flatnonzero(prefix[row] == run)
            found[row, own[own >= column]] += real[np.asarray(batch.image_cell)[row, column]]
            found[row, own[own < columns[runs == run].min()]] += block
    return found


def _window_pairs(position: np.ndarray, segment: np.ndarray, side: int) -> int:
    row = np.broadcast_to(np.arange(len(segment))[:, None], segment.shape)
    ids = np.concatenate([np.stack([row, segment], axis=-1), position // side], axis=-1)
    _, counts = np.unique(ids[segment > 0], axis=0, return_counts=True)
    return int(np.sum(counts.astype(np.int64) ** 2))


def forward_flops(config: Any, work: Work) -> Flops:
    """Forward FLOPs of `work` by the formula above.

    Args:
      config: of a backbone: `text` (a `DecoderConfig`) and `vision_flops`, or a `forward_flops` of its own.
      work: from `count_work`, with `config.window` where there is one.
    """
    if hasattr(config, "forward_flops"):
        return config.forward_flops(work)
    pairs = (work.patch_pairs,) if work.window_pairs is None else (work.patch_pairs, work.window_pairs)
    return Flops(float(decoder_flops(config.text, work)), float(config.vision_flops(work.patches, *pairs)))


def decoder_flops(text: Any, work: Work, *, last: bool = True) -> float:
    """Forward FLOPs of the layers of a `DecoderConfig`; `last` says whether they hold the last layer of the model."""
    heads, groups = text.num_heads * text.head_dim, text.num_kv_heads * text.head_dim
    keys = work.tokens * 2 * text.hidden_size * 2 * groups
    asking = 2 * text.hidden_size * (2 * heads + 3 * text.intermediate_size)
    whole = keys + work.tokens * asking + work.token_pairs * 4 * heads
    few = keys + work.pooled * asking + work.pooled_pairs * 4 * heads
    return text.num_layers * whole + (few - whole if last else 0)


def train_flops(config: Any, work: Work, parts: str = "full") -> float:
    """FLOPs of a training step on `work` where `parts` learn (`TrainableConfig.parts`)."""
    forward, (decoder, vision) = forward_flops(config, work), TRAINING_FACTORS[parts]
    return decoder * forward.decoder + vision * forward.vision


def peak_flops(device: jax.Device) -> float | None:
    """Peak FLOP/s of a device in bfloat16; None where it is not known, as on a CPU. The longest matching name wins."""
    kind = device.device_kind
    matches = [name for name in PEAK_FLOPS if kind.startswith(name)]
    return PEAK_FLOPS[max(matches, key=len)] if matches else None


def mfu(flops: float, seconds: float, devices: int, peak: float | None) -> float | None:
    """Share of the peak of all devices that `flops` in `seconds` amount to; None where the peak is unknown."""
    return None if peak is None or seconds <= 0 else flops / (seconds * devices * peak)
