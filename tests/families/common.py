"""Ours against transformers, whole model, from pictures and texts: what every family's parity test shares.

Each pair goes through transformers alone: its own image processor, chat template and torch model. Ours goes the way of
`multitap score`: processing, packing, backbone. Weights are drawn so that activations are O(1): the default
initialisation (deviation 0.02) hides most mistakes. A family's test gives an `Oracle`.
"""

import json
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file
from transformers import PreTrainedTokenizerFast

from multitap_jax.backbones import Backbone, Execution
from multitap_jax.batch import PackedBatch
from multitap_jax.data.processing import Contract, Processing
from multitap_jax.data.stream import Pair, StreamPacker
from multitap_jax.families import abstract_backbone, read_config, weight_table
from multitap_jax.naming import by_name
from multitap_jax.weights.hub import export_tensors, load_backbone
from multitap_jax.weights.mapping import plan

TOLERANCE = 2e-5  # of states, absolute, where the largest is above 1
GRADIENT_TOLERANCE = 1e-3  # relative to the largest entry of a parameter's gradient
FLOAT32 = Execution()
# Compiling is most of the time here, so the machine code is left unoptimised; the graph is the same.
QUICK = {"xla_backend_optimization_level": 0}


@dataclass(frozen=True)
class Oracle:
    """A family as transformers has it.

    Attributes:
      config: the contents of `config.json`, tiny.
      model: transformers' class and its configuration class, by name.
      tokenizer: with a chat template.
      preprocessor: the contents of `preprocessor_config.json`.
      inputs: (tokenizer, rendered conversation, pictures) -> the torch model's inputs of one pair, NumPy arrays with a
        batch axis of 1. The conversation has one placeholder an image.
    """

    config: dict[str, Any]
    model: tuple[str, str]
    tokenizer: PreTrainedTokenizerFast
    preprocessor: dict[str, Any]
    inputs: Callable[[Any, str, Sequence[Image.Image]], Mapping[str, np.ndarray]]

    def torch_model(self, seed: int = 0) -> Any:
        """transformers' model with random weights, float32, in eval mode; skips the test where torch is absent."""
        return random_torch_model(*self.model, self.config, seed)

    def write(self, folder: Path, seed: int = 0) -> Any:
        """Saves what a folder of the hub holds, written by transformers itself; returns the torch model."""
        model = self.torch_model(seed)
        model.save_pretrained(folder)
        self.write_without_weights(folder)
        return model

    def write_without_torch(self, folder: Path, seed: int = 0) -> Path:
        """The same, but for tensors that no score needs, which are left out; returns the folder."""
        self.write_without_weights(folder)
        model = abstract_backbone(folder)
        shapes = {slot.key: slot.shape for slot in plan(weight_table(model), by_name(model))}
        weights = {key: random_weight(key, shape, seed) for key, shape in shapes.items()}
        save_file(weights, folder / "model.safetensors")
        return folder

    def write_without_weights(self, folder: Path) -> Path:
        """Configuration, image processor and tokenizer: all that processing reads; returns the folder."""
        (folder / "config.json").write_text(json.dumps(self.config))
        (folder / "preprocessor_config.json").write_text(json.dumps(self.preprocessor))
        self.tokenizer.save_pretrained(folder)
        return folder


def random_torch_model(name: str, config_name: str, config: Mapping[str, Any], seed: int = 0) -> Any:
    """transformers' class `name` with the weights of `random_weight`, float32, in eval mode; skips without torch."""
    torch = pytest.importorskip("torch")
    import transformers

    torch.set_num_threads(2)
    # transformers moves entries out of the mapping it is given, so it gets its own.
    hf_config = getattr(transformers, config_name)(**json.loads(json.dumps(config)))
    hf_config._attn_implementation = "sdpa"
    model = getattr(transformers, name)(hf_config).eval()
    with torch.no_grad():
        for key, weight in model.named_parameters():
            weight.copy_(torch.from_numpy(random_weight(key, tuple(weight.shape), seed)))
    return model


def random_weight(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """float32 weights that keep activations O(1); the same for a tensor under any of its names."""
    plain = re.sub(r"^(model\.)?(language_model\.)?(model\.)?", "", name)
    noise = np.random.default_rng([seed, zlib.crc32(plain.encode())]).standard_normal(shape).astype(np.float32)
    if any(part in name for part in ("embed_tokens", "tok_embeddings", "_GN")):
        return noise
    if "gate" in name and np.prod(shape) == 1:  # tanh gates: neither closed nor saturated
        return np.float32(0.5) + np.float32(0.3) * noise
    if len(shape) > 1 and "position" not in name and "pos_embed" not in name and "tile_embedding" not in name:
        return noise / np.float32(np.prod(shape[1:]) ** 0.5)
    return np.float32(0.3) * noise + np.float32(0 if name.endswith("bias") or len(shape) > 1 else 1)


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Noise over a gradient, so that neither patches nor their places look alike."""
    rng = np.random.default_rng([seed, width, height])
    slope = np.linspace(0, 120, height)[:, None, None] + np.linspace(0, 60, width)[None, :, None]
    return Image.fromarray((slope + rng.integers(0, 70, (height, width, 3))).astype(np.uint8))


def contract_of(folder: Path, **chosen: str) -> Contract:
    """The family's defaults for a folder, but for what is chosen."""
    return Contract.of(read_config(folder)[0], **chosen)


def conversation(pair: Pair, variant: str) -> list[dict[str, Any]]:
    """The official conversation (paper.md 2.2) in the form that chat templates take."""
    part = lambda text: {"type": "text", "text": text}
    images, text = [{"type": "image"}] * len(pair.images), part(pair.text.strip().replace('"', " "))
    request = part(pair.request or "Describe this image.")
    if variant == "official-train" or (variant == "official-stage2" and pair.request is None):
        return [{"role": "user", "content": [request]}, {"role": "assistant", "content": [*images, text]}]
    return [{"role": "assistant", "content": [request, *images, text]}]


def batches(folder: Path, pairs: Sequence[Pair], contract: Contract, **options: Any) -> list[PackedBatch]:
    """The packed batches of these pairs; raises AssertionError where one of them was refused."""
    processing = Processing.from_folder(folder, contract)
    packer = StreamPacker(processing.prompter, processing.reader, processing.vision, hidden=64, **options)
    window = packer.window(pairs)
    found = list(window.batches)
    assert not any(window.errors), window.errors
    return found


forward = jax.jit(lambda model, batch, execution: model(batch, execution), static_argnums=2, compiler_options=QUICK)


def states(
    backbone: Backbone, folder: Path, pairs: Sequence[Pair], contract: Contract, execution: Execution = FLOAT32
) -> np.ndarray:
    """float32[N, H]: our pooled states, packed together."""
    out = np.full((len(pairs), backbone.config.text.hidden_size), np.nan, np.float32)
    for batch in batches(folder, pairs, contract):
        hidden = np.asarray(forward(backbone, batch, execution))
        here = batch.record >= 0
        out[batch.record[here]] = hidden[here]
    return out


def direction(hidden: int) -> np.ndarray:
    return np.random.default_rng(9).standard_normal(hidden).astype(np.float32)


def gradients(
    backbone: Backbone, folder: Path, pairs: Sequence[Pair], contract: Contract, execution: Execution = FLOAT32
) -> dict[str, np.ndarray]:
    """hub key -> gradient of the sum over pairs of tanh(h . direction / 10), packed together."""
    toward = direction(backbone.config.text.hidden_size)

    def loss(model: Backbone, batch: PackedBatch) -> jax.Array:
        score = jnp.tanh(jnp.einsum("bkh,h->bk", model(batch, execution), toward) * 0.1)
        return jnp.sum(jnp.where(jnp.asarray(batch.record) >= 0, score, 0.0))

    step = jax.jit(jax.grad(loss), compiler_options=QUICK)
    parts = [dict(export_tensors(step(backbone, batch))) for batch in batches(folder, pairs, contract)]
    return {key: sum(part[key] for part in parts) for key in parts[0]}


def torch_inputs(oracle: Oracle, pair: Pair, contract: Contract) -> dict[str, Any]:
    """One pair as transformers itself prepares it."""
    import torch

    rendered = oracle.tokenizer.apply_chat_template(conversation(pair, contract.prompt), tokenize=False)
    images = [image for image in pair.images if isinstance(image, Image.Image)]
    found = oracle.inputs(oracle.tokenizer, rendered, images)
    return {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in found.items()}


def torch_states(oracle: Oracle, model: Any, pairs: Sequence[Pair], contract: Contract) -> np.ndarray:
    """float32[N, H]: transformers' final hidden state of each pair's last token, one pair a forward."""
    import torch

    with torch.no_grad():
        rows = [model.model(**torch_inputs(oracle, p, contract), use_cache=False).last_hidden_state for p in pairs]
    return np.stack([row[0, -1].numpy() for row in rows])


def torch_gradients(oracle: Oracle, model: Any, pairs: Sequence[Pair], contract: Contract) -> dict[str, np.ndarray]:
    """Name in the torch model -> gradient, of the same sum as `gradients`."""
    import torch

    model.zero_grad()
    total = 0
    for pair in pairs:
        hidden = model.model(**torch_inputs(oracle, pair, contract), use_cache=False).last_hidden_state[0, -1]
        total = total + torch.tanh(hidden @ torch.from_numpy(direction(hidden.shape[0])) * 0.1)
    total.backward()
    return {name: weight.grad.numpy() for name, weight in model.named_parameters() if weight.grad is not None}


def assert_same_states(got: np.ndarray, expected: np.ndarray) -> None:
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(got, expected, atol=TOLERANCE, rtol=0)


def assert_same_gradients(
    backbone: Backbone, got: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray]
) -> dict[str, float]:
    """Every parameter's gradient, none left out on either side but those that are zero here and absent there.

    Returns:
      hub key -> largest difference, relative to the largest entry of that parameter's gradient.
    """
    expected = {weight_table(backbone).canonical(name): gradient for name, gradient in theirs.items()}
    assert expected.keys() <= got.keys(), sorted(expected.keys() - got.keys())
    found = {}
    for key, gradient in got.items():
        wanted = expected.get(key, np.zeros_like(gradient))
        assert gradient.shape == wanted.shape, key
        found[key] = float(np.abs(gradient - wanted).max() / max(np.abs(wanted).max(), 1e-4))
    wrong = {key: error for key, error in found.items() if not error <= GRADIENT_TOLERANCE}
    assert not wrong, wrong
    return found


@dataclass(frozen=True)
class Case:
    """What `benchmarks/parity.py` measures: a family's oracle, pairs, and what is chosen of the contract."""

    label: str
    oracle: Oracle
    pairs: Sequence[Pair]
    chosen: Mapping[str, str]


class Parity(NamedTuple):
    """Largest difference of a state, absolute; of a gradient, relative to its parameter's largest (None: not asked)."""

    states: float
    gradients: float | None


def check_parity(
    oracle: Oracle, model: Any, folder: Path, pairs: Sequence[Pair], *, gradient: bool = False, **chosen: str
) -> Parity:
    """Asserts that states (and gradients) agree; returns how far they are apart."""
    contract, backbone = contract_of(folder, **chosen), load_backbone(folder)
    got, expected = states(backbone, folder, pairs, contract), torch_states(oracle, model, pairs, contract)
    assert_same_states(got, expected)
    worst = None
    if gradient:
        theirs = torch_gradients(oracle, model, pairs, contract)
        worst = max(assert_same_gradients(backbone, gradients(backbone, folder, pairs, contract), theirs).values())
    return Parity(float(np.abs(got - expected).max()), worst)
