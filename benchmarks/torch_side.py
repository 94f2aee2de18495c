"""The torch side of scoring.py: the same model in transformers, scored in two ways."""

import numpy as np
import torch
from transformers import Qwen2VLConfig, Qwen2VLImageProcessorPil

from multitap_jax.data.prompts import Encoded, Prompter
from multitap_jax.data.stream import Pair

SIDE = 560
PADDED = 2048


def make_config(tokenizer) -> Qwen2VLConfig:
    """63.5 M parameters: decoder 512 x 8 (8/2 heads), vision 256 x 6 (4 heads)."""
    ids = {f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{token}|>") for name, token in IMAGE_TOKENS.items()}
    return Qwen2VLConfig(
        **ids,
        hidden_size=512,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=2,
        intermediate_size=1536,
        vocab_size=32000,
        bos_token_id=tokenizer.convert_tokens_to_ids("<|endoftext|>"),
        eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"),
        rms_norm_eps=1e-6,
        rope_scaling={"type": "mrope", "mrope_section": [8, 12, 12]},
        vision_config={"depth": 6, "embed_dim": 256, "num_heads": 4, "hidden_size": 512, "mlp_ratio": 4},
    )


IMAGE_TOKENS = {
    "image": "image_pad",
    "video": "video_pad",
    "vision_start": "vision_start",
    "vision_end": "vision_end",
}


class Torch:
    """The torch side: two ways to score with one model."""

    def __init__(self, model, head_weight: np.ndarray, head_bias: float, prompter: Prompter):
        self.model, self.prompter = model, prompter
        self.weight, self.bias = torch.tensor(head_weight), head_bias
        self.processor = Qwen2VLImageProcessorPil(size={"shortest_edge": SIDE * SIDE, "longest_edge": SIDE * SIDE})

    def _inputs(self, pairs: list[Pair], length: int | None) -> dict[str, torch.Tensor]:
        pixels = self.processor(images=[p.images[0] for p in pairs], return_tensors="np")
        cells = int(pixels["image_grid_thw"][0].prod()) // 4
        encoded = self.prompter.encode([p.text for p in pairs], [None] * len(pairs), [1] * len(pairs))
        rows = []
        for item in encoded:
            assert isinstance(item, Encoded)
            repeats = np.where(item.prefix == self.prompter.placeholder_id, cells, 1)
            rows.append(np.concatenate([np.repeat(item.prefix, repeats), item.text]))
        length = length or max(len(row) for row in rows)
        ids = np.zeros((len(rows), length), np.int64)
        mask = np.zeros((len(rows), length), np.int64)
        for index, row in enumerate(rows):  # left padding, as the official code has it
            ids[index, length - len(row) :] = row
            mask[index, length - len(row) :] = 1
        return {
            "input_ids": torch.from_numpy(ids),
            "attention_mask": torch.from_numpy(mask),
            "mm_token_type_ids": torch.from_numpy((ids == self.prompter.placeholder_id).astype(np.int64)),
            "pixel_values": torch.from_numpy(np.asarray(pixels["pixel_values"])),
            "image_grid_thw": torch.from_numpy(np.asarray(pixels["image_grid_thw"])),
        }

    def _score(self, last: torch.Tensor) -> np.ndarray:
        return torch.sigmoid(last @ self.weight + self.bias).numpy()

    @torch.no_grad()
    def official(self, pairs: list[Pair]) -> np.ndarray:
        """One pair a forward, padded to 2,048, hidden states of all layers and logits of all positions."""
        out = []
        for pair in pairs:
            result = self.model(**self._inputs([pair], PADDED), output_hidden_states=True)
            out.append(self._score(result.hidden_states[-1][:, -1]))
        return np.concatenate(out)

    @torch.no_grad()
    def batched(self, pairs: list[Pair], size: int = 8) -> np.ndarray:
        """Batches of eight, padded to the longest, no logits."""
        out = []
        for start in range(0, len(pairs), size):
            result = self.model.model(**self._inputs(pairs[start : start + size], None))
            out.append(self._score(result.last_hidden_state[:, -1]))
        return np.concatenate(out)
