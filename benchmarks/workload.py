"""What the benchmarks work on: models of several sizes with random weights, pictures of noise, texts, their FLOPs."""

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image

from multitap_jax import Scorer
from multitap_jax.batch import PackedBatch
from multitap_jax.data.processing import Contract, Processing
from multitap_jax.data.stream import Pair, StreamPacker
from multitap_jax.demo.checkpoint import model_config, processor_config, spread_weights, train_tokenizer
from multitap_jax.families import from_config
from multitap_jax.files import json_bytes
from multitap_jax.flops import count_work, forward_flops, train_flops
from multitap_jax.planning.published import PUBLISHED
from multitap_jax.reward import RewardHead, RewardModel
from multitap_jax.scoring.artefact import Artefact
from multitap_jax.scoring.manifest import BackboneSource, Hashes, Manifest
from multitap_jax.weights.hub import save_backbone

SIDE = 560
PADDED = 2048  # tokens to which the official procedure pads a pair
WORDS = "a red ball near the blue box on your left and two green cones far away to the right of it".split()  # noqa: SIM905
TEXT_WORDS = 30


class Size(NamedTuple):
    """A model and how it is used.

    Attributes:
      config: entries of its `config.json`.
      dtype: that scores are computed in.
      side: of pictures, in pixels.
      padded: tokens to which the official way pads a pair.
      products: side of the matrices whose product is timed beside it; None takes the usual one of the device.
    """

    config: dict[str, Any]
    dtype: str
    side: int = SIDE
    padded: int = PADDED
    products: int | None = None


def qwen2_vl(hidden: int, layers: int, heads: int, inner: int, tower: int, blocks: int, vocabulary: int) -> dict:
    """Entries of a `config.json`: four query heads share a key head; the tower has four heads."""
    third = hidden // heads // 2 * 3 // 8
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": max(heads // 4, 1),
        "intermediate_size": inner,
        "vocab_size": vocabulary,
        "tie_word_embeddings": False,
        "rope_scaling": {"type": "mrope", "mrope_section": [hidden // heads // 2 - 2 * third, third, third]},
        "vision_config": {"embed_dim": tower, "depth": blocks, "hidden_size": hidden, "num_heads": 4},
    }


SIZES = {
    "tiny": Size(qwen2_vl(64, 2, 4, 96, 32, 2, 640), "float32", side=56, padded=128, products=128),  # for the tests
    "small": Size(qwen2_vl(512, 8, 8, 1536, 256, 6, 32000), "float32"),
    "2b": Size(PUBLISHED["qwen2-vl-2b"], "bfloat16"),
    "7b": Size(PUBLISHED["qwen2-vl-7b"], "bfloat16"),
}


def size_of(name: str) -> Size:
    """The size of that name; raises SystemExit for another one."""
    if name not in SIZES:
        raise SystemExit(f"--size={name}: expected one of {', '.join(name for name in SIZES if name != 'tiny')}")
    return SIZES[name]


@dataclasses.dataclass(frozen=True)
class Workload:
    """A model and the folder beside it.

    Attributes:
      size: see `Size`.
      folder: holds config.json, tokenizer and processor; weights only after `save_weights`.
      model: with random weights, on the device.
      processing: what turns pairs into tokens and patches.
    """

    size: Size
    folder: Path
    model: RewardModel
    processing: Processing

    def scorer(self, **options: Any) -> Scorer:
        """A scorer of the model as it is in memory."""
        nothing = Hashes(model="", heads="", files={})
        source = BackboneSource(self.model.backbone.config.model_type)
        artefact = Artefact(self.folder, Manifest(self.processing.contract, source, nothing))
        return Scorer(artefact, self.model, dtype=self.size.dtype, **options)

    def save_weights(self) -> None:
        """Writes them beside the rest, with a random output embedding where the model has one of its own."""
        config = self.model.backbone.config
        shape = (config.text.vocab_size, config.text.hidden_size)
        values = np.random.default_rng(0).standard_normal(shape, dtype=np.float32) / 100
        extra = {} if config.tie_word_embeddings else {"lm_head.weight": values.astype(self.size.dtype)}
        save_backbone(self.model.backbone, self.folder, extra=extra)

    def asked(self, pairs: Sequence[Pair], *, shared: bool) -> "Asked":
        """What scoring the pairs asks for, with images and prefixes shared or not."""
        vision, config = self.processing.vision, self.model.backbone.config
        packer = StreamPacker(self.processing.prompter, self.processing.reader, vision, hidden=config.text.hidden_size)
        windows = [pairs] if shared else [[pair] for pair in pairs]
        return asked([batch for window in windows for batch in packer.window(window).batches], config)


class Asked(NamedTuple):
    """Real tokens, FLOPs by the formula of `multitap_jax/flops.py`, and the share of packed rows that is real."""

    tokens: int
    flops: float
    filled: float


def asked(batches: Sequence[PackedBatch], config: Any, learns: str | None = None) -> Asked:
    """What a forward pass of the batches asks for, or a training step where `learns` says what learns."""
    works = [count_work(batch) for batch in batches]
    formula = lambda work: train_flops(config, work, learns) if learns else forward_flops(config, work).total
    tokens = sum(work.tokens for work in works)
    return Asked(tokens, sum(map(formula, works)), tokens / sum(work.padded_tokens for work in works))


def make_model(config: dict[str, Any], dtype: str) -> RewardModel:
    """A model with random weights of activations near 1, made where it will compute."""

    def build() -> RewardModel:
        backbone = from_config(config, rngs=nnx.Rngs(0), param_dtype=jnp.dtype(dtype))
        spread_weights(backbone)
        return RewardModel(backbone, RewardHead(backbone.config.text.hidden_size, rngs=nnx.Rngs(1)))

    return jax.jit(build)()


def write_base(folder: Path, entries: dict[str, Any], corpus: Sequence[str] = WORDS, vocabulary: int = 640) -> dict:
    """Writes tokenizer, processor and `config.json` with these entries into `folder`; the whole of the last."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(corpus, vocabulary)
    tokenizer.save_pretrained(str(folder))
    plain = model_config(tokenizer)
    config = plain | entries | {"vision_config": plain["vision_config"] | entries["vision_config"]}
    (folder / "config.json").write_bytes(json_bytes(config))
    (folder / "preprocessor_config.json").write_bytes(json_bytes(processor_config()))
    return config


def make_workload(folder: Path, size: Size, *, dtype: str | None = None) -> Workload:
    """Makes the model, with parameters of the size's type or of another, and writes what stands beside it."""
    config = write_base(folder, size.config)
    processing = Processing.from_folder(folder, Contract(image_policy=f"square:{size.side}"))
    return Workload(size, folder, make_model(config, dtype or size.dtype), processing)


def make_pairs(
    images: int, texts: int, rng: np.random.Generator, text_words: int = TEXT_WORDS, side: int = SIDE
) -> list[Pair]:
    """`images` pictures with `texts` texts each; `text_words` words a text, give or take 5."""
    out = []
    for _ in range(images):
        picture = Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8))
        for _ in range(texts):
            words = rng.choice(WORDS, int(rng.integers(text_words - 5, text_words + 6)))
            out.append(Pair((picture,), " ".join(words)))
    return out


def write_records(folder: Path, pairs: Sequence[Pair], rng: np.random.Generator) -> tuple[Path, list[Pair]]:
    """Writes pairs as pictures and records with random scores: the records file, and the pairs by path."""
    folder.mkdir(parents=True, exist_ok=True)
    files: dict[int, Path] = {}
    lines, out = [], []
    for number, pair in enumerate(pairs):
        picture = pair.images[0]
        if id(picture) not in files:
            files[id(picture)] = folder / f"{len(files)}.png"
            picture.save(files[id(picture)])
        path = files[id(picture)]
        record = {"id": str(number), "image": path.name, "text": pair.text, "score": round(float(rng.random()), 3)}
        lines.append(json.dumps(record | {"ratings": {"overall": record["score"]}}))
        out.append(pair._replace(images=(path,)))
    file = folder / "records.jsonl"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file, out


def touch(pairs: Sequence[Pair]) -> None:
    """Makes files look new, so that a reader which remembers them reads them again."""
    for path in {pair.images[0] for pair in pairs}:
        os.utime(path)
