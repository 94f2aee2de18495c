"""Pairs per second of packed scoring here against transformers + torch, same random weights, same machine, one run.

  python benchmarks/scoring.py [--images=8] [--repeats=5] [--threads=2]

Both sides score the same pairs with the same 60M-parameter Qwen2-VL in float32 from decoded, resized pictures
(560 x 560, so 400 image tokens) and texts; tokenising, patching and packing count on both sides, decoding on neither.
Three ways:

  official  one pair a forward, padded to 2,048 tokens, all hidden states and logits (kaist-cvml/MULTI-TAP, behaviour)
  batched   torch by hand: sdpa attention, batches padded to their longest, no logits, last token's hidden state
  ours      `Scorer.score` of this package: shared prefixes, packed rows, no logits

for one text an image and for six. Printed: pairs/s of each, the ratio of ours to each, and the largest difference of a
score, which shows that all three compute the same thing. Needs the extra `test` (torch).
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from flax import nnx
from PIL import Image
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLImageProcessorPil

from multitap_jax import Scorer
from multitap_jax.data.processing import Contract
from multitap_jax.data.prompts import Encoded, Prompter
from multitap_jax.data.stream import Pair
from multitap_jax.demo.checkpoint import train_tokenizer
from multitap_jax.parallel.host import keep_freed_memory
from multitap_jax.reward import RewardHead, RewardModel
from multitap_jax.scoring.artefact import Artefact
from multitap_jax.weights.hub import load_backbone

SIDE = 560
PADDED = 2048
WORDS = "a red ball near the blue box on your left and two green cones far away to the right of it".split()  # noqa: SIM905
TEXT_WORDS = 30


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


def make_pairs(images: int, texts: int, rng: np.random.Generator) -> list[Pair]:
    """`images` pictures with `texts` texts each; 25 to 35 words a text."""
    out = []
    for _ in range(images):
        picture = Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8))
        for _ in range(texts):
            words = rng.choice(WORDS, int(rng.integers(TEXT_WORDS - 5, TEXT_WORDS + 6)))
            out.append(Pair((picture,), " ".join(words)))
    return out


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


def make_scorer(base: Path, folder: Path, tokenizer, head: RewardHead) -> Scorer:
    """An artefact of the torch model saved in `base`, opened as a user would."""
    tokenizer.save_pretrained(base)
    Qwen2VLImageProcessorPil().save_pretrained(base)
    contract = Contract(image_policy=f"square:{SIDE}")
    Artefact.save(folder, RewardModel(load_backbone(base), head), base=base, contract=contract)
    return Scorer.from_pretrained(folder)


def ours(scorer: Scorer, pairs: list[Pair]) -> np.ndarray:
    """This side."""
    return scorer.score(images=[p.images[0] for p in pairs], texts=[p.text for p in pairs]).overall


def interleaved(ways: dict[str, Callable[[], np.ndarray]], repeats: int) -> dict[str, float]:
    """Median seconds of each way; the ways take turns, so that noise of the machine meets all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=8, help="pictures in a run")
    parser.add_argument("--official-pairs", type=int, default=4, help="pairs timed for the official procedure")
    parser.add_argument("--repeats", type=int, default=5, help="timed turns; the median counts")
    parser.add_argument("--threads", type=int, default=2, help="torch threads (jax takes the cores it may use)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_freed_memory()  # as the program does; torch's arrays profit alike
    rng = np.random.default_rng(0)
    tokenizer = train_tokenizer(WORDS)
    prompter = Prompter(tokenizer, "official-train")
    torch.manual_seed(0)
    model = Qwen2VLForConditionalGeneration._from_config(make_config(tokenizer), attn_implementation="sdpa").eval()
    head = RewardHead(512, rngs=nnx.Rngs(0))
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base"
        model.save_pretrained(base)
        scorer = make_scorer(base, Path(folder) / "artefact", tokenizer, head)
    theirs = Torch(model, np.asarray(head.weight[...]), float(head.bias[...]), prompter)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, float32, {args.threads} threads")
    for texts in (1, 6):
        pairs = make_pairs(args.images, texts, rng)
        few = pairs[: args.official_pairs]
        found = ours(scorer, pairs)  # compiles
        reference = theirs.batched(pairs)
        worst = max(np.abs(found - reference).max(), np.abs(found[: len(few)] - theirs.official(few)).max())
        ways = {
            "official": lambda few=few: theirs.official(few),
            "batched": lambda pairs=pairs: theirs.batched(pairs),
            "ours": lambda pairs=pairs: ours(scorer, pairs),
        }
        seconds = interleaved(ways, args.repeats)
        rate = {name: (len(few) if name == "official" else len(pairs)) / s for name, s in seconds.items()}
        print(f"\n{texts} text(s) an image, {len(pairs)} pairs; largest score difference {worst:.1e}")
        for name, value in rate.items():
            ratio = "" if name == "ours" else f"   ours / {name}: {rate['ours'] / value:6.2f}x"
            print(f"  {name:9s} {value:8.2f} pairs/s{ratio}")
    print(f"\nshapes compiled: {scorer.num_shapes}")


if __name__ == "__main__":
    main()
