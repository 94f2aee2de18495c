"""The torch side of scoring.py, embedding.py and training.py: the same weights in transformers, by hand.

Attention is sdpa, batches are padded to their longest, no logits are made but for the official way.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from transformers import Qwen2VLForConditionalGeneration, Qwen2VLImageProcessorPil
from transformers.utils import logging
from workload import Size, Workload  # beside this file

from multitap_jax.config import OptimizerConfig
from multitap_jax.data.prompts import Encoded
from multitap_jax.data.stream import Pair
from multitap_jax.reward import RewardHead

BATCH = {"cpu": 8, "cuda": 32}  # pairs a forward


def load_model(workload: Workload, device: str, dtype: str) -> Qwen2VLForConditionalGeneration:
    """The workload's backbone in transformers, by way of its folder."""
    workload.save_weights()
    logging.disable_progress_bar()
    options: dict[str, Any] = {"attn_implementation": "sdpa", "dtype": getattr(torch, dtype)}
    return Qwen2VLForConditionalGeneration.from_pretrained(workload.folder, **options).to(device).eval()


class Torch:
    """A model in transformers and the ways to score with it."""

    def __init__(self, workload: Workload, device: str, dtype: str | None = None):
        size: Size = workload.size
        self.model = load_model(workload, device, dtype or size.dtype)
        self.prompter, self.device, self.padded = workload.processing.prompter, device, size.padded
        head: RewardHead = workload.model.head
        self.weight = torch.tensor(np.asarray(head.weight[...]), device=device)
        self.bias = torch.tensor(np.asarray(head.bias[...]), device=device)
        pixels = size.side**2
        self.processor = Qwen2VLImageProcessorPil(size={"shortest_edge": pixels, "longest_edge": pixels})

    def inputs(self, pairs: Sequence[Pair], length: int | None = None) -> dict[str, torch.Tensor]:
        """Pairs as transformers takes them, padded on the left as the official code does; None pads to the longest."""
        pictures = [_opened(pair.images[0]) for pair in pairs]
        pixels = self.processor(images=pictures, return_tensors="np")
        cells = int(pixels["image_grid_thw"][0].prod()) // 4
        encoded = self.prompter.encode([p.text for p in pairs], [None] * len(pairs), [1] * len(pairs))
        rows = []
        for item in encoded:
            assert isinstance(item, Encoded)
            repeats = np.where(item.prefix == self.prompter.placeholder_id, cells, 1)
            rows.append(np.concatenate([np.repeat(item.prefix, repeats), item.text]))
        length = length or max(len(row) for row in rows)
        ids, mask = (np.zeros((len(rows), length), np.int64) for _ in range(2))
        for index, row in enumerate(rows):
            ids[index, length - len(row) :] = row
            mask[index, length - len(row) :] = 1
        arrays = {
            "input_ids": ids,
            "attention_mask": mask,
            "mm_token_type_ids": (ids == self.prompter.placeholder_id).astype(np.int64),
            "pixel_values": np.asarray(pixels["pixel_values"]),
            "image_grid_thw": np.asarray(pixels["image_grid_thw"]),
        }
        return {name: torch.from_numpy(array).to(self.device) for name, array in arrays.items()}

    def logits(self, last: torch.Tensor) -> torch.Tensor:
        """Of hidden states [N, H], in float32."""
        return last.float() @ self.weight + self.bias

    @torch.no_grad()
    def official(self, pairs: Sequence[Pair]) -> np.ndarray:
        """Scores: one pair a forward, padded, hidden states of all layers and logits of all positions."""
        out = []
        for pair in pairs:
            result = self.model(**self.inputs([pair], self.padded), output_hidden_states=True)
            out.append(torch.sigmoid(self.logits(result.hidden_states[-1][:, -1])).cpu().numpy())
        return np.concatenate(out)

    def batched(self, pairs: Sequence[Pair]) -> np.ndarray:
        """Scores, in batches."""
        with torch.no_grad():
            return np.concatenate([torch.sigmoid(self.logits(x)).cpu().numpy() for x in self._states(pairs)])

    def embed(self, pairs: Sequence[Pair]) -> np.ndarray:
        """Hidden states of the last tokens, in batches."""
        return np.concatenate([state.float().cpu().numpy() for state in self._states(pairs)])

    @torch.no_grad()
    def _states(self, pairs: Sequence[Pair]) -> list[torch.Tensor]:
        size = BATCH[self.device]
        starts = range(0, len(pairs), size)
        batches = (self.inputs(pairs[start : start + size]) for start in starts)
        return [self.model.model(**batch).last_hidden_state[:, -1] for batch in batches]


def _opened(source: Any) -> Image.Image:
    return Image.open(source).convert("RGB") if isinstance(source, str | Path) else source


class Adapter(nn.Module):
    """A frozen linear layer with a low-rank one beside it: x @ W + (x @ a) @ b * scale."""

    def __init__(self, base: nn.Linear, a: np.ndarray, b: np.ndarray, scale: float):
        super().__init__()
        self.base, self.scale = base, scale
        self.a, self.b = (nn.Parameter(torch.tensor(x, device=base.weight.device)) for x in (a, b))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + (x @ self.a) @ self.b * self.scale


Adapters = dict[str, tuple[np.ndarray, np.ndarray, float]]  # name of a linear layer -> lora_a, lora_b [L, ...], scale


class Trainer:
    """One batch and the step on it: forward, backward, clipping, AdamW.

    Args:
      side: its model will learn.
      pairs, targets: of the batch, which is prepared once: host work is timed on neither side.
      config: of AdamW, with a constant rate.
      adapters: they and the head learn; without any, everything does.
      bfloat16: computes in it on float32 weights.
    """

    def __init__(
        self,
        side: Torch,
        pairs: Sequence[Pair],
        targets: np.ndarray,
        config: OptimizerConfig,
        adapters: Adapters,
        *,
        bfloat16: bool,
    ):
        self.side, self.inputs, self.bfloat16 = side, side.inputs(pairs), bfloat16
        self.targets = torch.tensor(targets, device=side.device)
        self.model, self.clip = side.model.model, config.clip_norm
        if adapters:
            self._adapt(adapters)
        side.weight, side.bias = nn.Parameter(side.weight), nn.Parameter(side.bias)
        learning = [p for p in self.model.parameters() if p.requires_grad]
        self.parameters = [*learning, side.weight, side.bias]
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=config.learning_rate,
            betas=(config.b1, config.b2),
            eps=config.eps,
            weight_decay=config.weight_decay,
            fused=True,
        )

    def _adapt(self, adapters: Adapters) -> None:
        self.model.requires_grad_(False)
        for index, layer in enumerate(self.model.language_model.layers):
            for name, (a, b, scale) in adapters.items():
                adapter = Adapter(getattr(layer.self_attn, name), a[index], b[index], scale)
                setattr(layer.self_attn, name, adapter)

    def step(self) -> tuple[float, float]:
        """Loss before the step, and the norm of its gradient before clipping."""
        with torch.autocast(self.side.device, torch.bfloat16, enabled=self.bfloat16):
            hidden = self.model(**self.inputs).last_hidden_state[:, -1]
        loss = torch.mean((torch.sigmoid(self.side.logits(hidden)) - self.targets) ** 2)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.parameters, self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item(), norm.item()
