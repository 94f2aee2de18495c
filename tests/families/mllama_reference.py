"""Llama-3.2-Vision written out in NumPy, float64, one pair a forward: slow, and without a scan, a stack or a mask rule.

For what today's transformers does not compute: intermediate states taken before a layer (Meta's code, transformers up
to 4.54), and Meta's row mask. Takes the processor's inputs and the tensors of a folder under the hub's names.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

_erf = np.vectorize(math.erf, otypes=[np.float64])


def gelu(x):
    return 0.5 * x * (1 + _erf(x / math.sqrt(2)))


def softmax(x):
    weights = np.exp(x - x.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def attend(q, k, v, seen):
    """[S, A, D] queries, [X, G, D] keys and values, bool[S, X] -> [S, A * D]; hidden is float32's lowest, added."""
    share, out = q.shape[1] // k.shape[1], np.zeros_like(q)
    for head in range(q.shape[1]):
        scores = q[:, head] @ k[:, head // share].T / math.sqrt(q.shape[2])
        scores = scores + np.where(seen, 0.0, float(np.finfo(np.float32).min))
        out[:, head] = softmax(scores) @ v[:, head // share]
    return out.reshape(len(q), -1)


class Reference:
    """The model of a folder.

    Args:
      folder: with `config.json` and `model.safetensors`.
      before: intermediate states are the inputs of their layers.
      meta: Meta's row mask.
    """

    def __init__(self, folder: Path, *, before: bool, meta: bool):
        config = json.loads((folder / "config.json").read_text())
        self.text_config, self.vision_config = config["text_config"], config["vision_config"]
        tensors = load_file(folder / "model.safetensors")
        self.weights = {name: value.astype(np.float64) for name, value in tensors.items()}
        self.before, self.meta = before, meta

    def linear(self, name, x):
        bias = self.weights.get(f"{name}.bias", 0.0)
        return x @ self.weights[f"{name}.weight"].T + bias

    def layer_norm(self, name, x, eps):
        x = x - x.mean(axis=-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps)
        return x * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    def rms_norm(self, name, x):
        eps = self.text_config["rms_norm_eps"]
        return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps) * self.weights[f"{name}.weight"]

    def gate(self, name):
        return np.tanh(self.weights[name])

    def image(self, pixels, ratio, real):
        """float[T, 3, S, S], number of the arrangement, bool[T] -> [T, U, H] states, and every layer's input."""
        name, c = "vision_model.", self.vision_config
        tiles, side, size = len(pixels), c["image_size"] // c["patch_size"], c["hidden_size"]
        cut = pixels.reshape(tiles, 3, side, c["patch_size"], side, c["patch_size"]).transpose(0, 2, 4, 1, 3, 5)
        x = cut.reshape(tiles, side**2, -1) @ self.weights[name + "patch_embedding.weight"].reshape(size, -1).T
        x = x + self.tile(name + "pre_tile_positional_embedding", ratio)
        first = np.broadcast_to(self.weights[name + "class_embedding"], (tiles, 1, size))
        x = np.concatenate([first, x], axis=1)
        place = name + "gated_positional_embedding."
        gate, tokens = self.gate(place + "gate"), side**2 + 1
        x = x + (1 - gate) * self.weights[place + "embedding"]
        x = x + gate * self.weights[place + "tile_embedding.weight"][ratio].reshape(x.shape)
        x = self.layer_norm(name + "layernorm_pre", x, 1e-5)
        fill = -tokens % 8
        x = np.concatenate([x, np.zeros((tiles, fill, size))], axis=1)
        true = np.repeat(real[:, None], tokens + fill, axis=1)
        true[:, tokens:] = False
        seen = true.reshape(-1, 1) | true.reshape(1, -1)
        x, inputs = x.reshape(-1, size), []
        for layer in range(c["num_hidden_layers"]):
            inputs.append(x)
            x = self.vision_layer(f"{name}transformer.layers.{layer}.", x, seen)
        inputs.append(x)
        kept = [inputs[layer + (not self.before)] for layer in c["intermediate_layers_indices"]]
        x = self.layer_norm(name + "layernorm_post", x, 1e-5).reshape(tiles, -1, size)
        x = (x + self.tile(name + "post_tile_positional_embedding", ratio)).reshape(-1, size)
        for layer in range(c["num_global_layers"]):
            inputs.append(x)
            x = self.vision_layer(f"{name}global_transformer.layers.{layer}.", x, seen, gates=True)
        inputs.append(x)
        x = np.concatenate([x, np.stack(kept, axis=-1).reshape(len(x), -1)], axis=-1)
        x = x.reshape(tiles, tokens + fill, -1)[:, :tokens]
        return self.linear("multi_modal_projector", x), inputs

    def tile(self, name, ratio):
        rows = self.weights[f"{name}.embedding.weight"][ratio].reshape(-1, 1, self.vision_config["hidden_size"])
        return self.gate(f"{name}.gate") * rows

    def vision_layer(self, name, x, seen, *, gates=False):
        c = self.vision_config
        heads = lambda part, y: self.linear(f"{name}self_attn.{part}_proj", y).reshape(len(y), c["attention_heads"], -1)
        y = self.layer_norm(name + "input_layernorm", x, c["norm_eps"])
        y = self.linear(name + "self_attn.o_proj", attend(*(heads(part, y) for part in "qkv"), seen))
        x = x + (self.gate(name + "gate_attn") if gates else 1) * y
        y = self.layer_norm(name + "post_attention_layernorm", x, c["norm_eps"])
        y = self.linear(name + "mlp.fc2", gelu(self.linear(name + "mlp.fc1", y)))
        return x + (self.gate(name + "gate_ffn") if gates else 1) * y

    def __call__(self, inputs: Mapping[str, Any]) -> tuple[np.ndarray, list[np.ndarray], list[list[np.ndarray]]]:
        """Inputs of one pair -> [S, H] final states, the states between decoder layers, and those of each image."""
        c, name, ids = self.text_config, "language_model.model.", np.asarray(inputs["input_ids"])[0]
        x, states, towers, mask = self.weights[name + "embed_tokens.weight"][ids], None, [], None
        if "pixel_values" in inputs:
            parts = (inputs[part][0] for part in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask"))
            found = [self.image(p.astype(np.float64), r, m.astype(bool)) for p, r, m in zip(*parts, strict=True)]
            states, towers = np.concatenate([s.reshape(-1, s.shape[-1]) for s, _ in found]), [t for _, t in found]
            mask = np.asarray(inputs["cross_attention_mask"])[0].reshape(len(ids), -1).astype(bool)
            mask = np.repeat(mask, found[0][0].shape[1], axis=1)
        layers = []
        for layer in range(c["num_hidden_layers"]):
            layers.append(x)
            if layer not in c["cross_attention_layers"]:
                x = self.self_layer(f"{name}layers.{layer}.", x)
            elif states is not None:
                x = self.cross_layer(f"{name}layers.{layer}.", x, states, mask)
        layers.append(x)
        return self.rms_norm(name + "norm", x), layers, towers

    def self_layer(self, name, x):
        causal = np.tril(np.ones((len(x), len(x)), bool))
        y = self.rms_norm(name + "input_layernorm", x)
        q, k, v = (self.heads(f"{name}self_attn.{part}_proj", y) for part in "qkv")
        x = x + self.linear(name + "self_attn.o_proj", attend(self.turn(q), self.turn(k), v, causal))
        return x + self.mlp(name, x)

    def cross_layer(self, name, x, states, mask):
        sees, c = mask.any(axis=1, keepdims=True), name + "cross_attn."
        y = self.rms_norm(name + "input_layernorm", x)
        q = self.rms_norm(c + "q_norm", self.heads(c + "q_proj", y))
        k = self.rms_norm(c + "k_norm", self.heads(c + "k_proj", states))
        out = attend(q, k, self.heads(c + "v_proj", states), mask | ~sees)
        out = self.linear(c + "o_proj", out * sees if self.meta else out)
        x = x + self.gate(name + "cross_attn_attn_gate") * out
        return x + self.gate(name + "cross_attn_mlp_gate") * sees * self.mlp(name, x)

    def heads(self, name, x):
        c = self.text_config
        return self.linear(name, x).reshape(len(x), -1, c["hidden_size"] // c["num_attention_heads"])

    def mlp(self, name, x):
        y = self.rms_norm(name + "post_attention_layernorm", x)
        gate = self.linear(name + "mlp.gate_proj", y)
        return self.linear(name + "mlp.down_proj", gate / (1 + np.exp(-gate)) * self.linear(name + "mlp.up_proj", y))

    def turn(self, x):
        """Rotary positions 0, 1, ... with Llama 3's stretched wavelengths, frequency by frequency."""
        rope, half = self.text_config["rope_scaling"], x.shape[2] // 2
        out = np.empty_like(x)
        for i in range(half):
            frequency = self.text_config["rope_theta"] ** (-i / half)
            turns = rope["original_max_position_embeddings"] * frequency / (2 * math.pi)
            if turns < rope["low_freq_factor"]:
                frequency /= rope["factor"]
            elif turns <= rope["high_freq_factor"]:
                share = (turns - rope["low_freq_factor"]) / (rope["high_freq_factor"] - rope["low_freq_factor"])
                frequency = (1 - share) * frequency / rope["factor"] + share * frequency
            angle = np.arange(len(x))[:, None] * frequency
            first, second = x[:, :, i], x[:, :, i + half]
            out[:, :, i] = first * np.cos(angle) - second * np.sin(angle)
            out[:, :, i + half] = second * np.cos(angle) + first * np.sin(angle)
        return out
