"""InternLM-XComposer2.5 written out in NumPy, float64, one pair a forward: slow, without a stack or a mask rule.

Takes pictures, token ids with one placeholder an image, and the tensors of a folder under the hub's names.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors.numpy import load_file

from tests.families.mllama_reference import gelu, softmax

MEAN = np.array([0.48145466, 0.4578275, 0.40821073])
STD = np.array([0.26862954, 0.26130258, 0.27577711])


def transformed(image: Image.Image, side: int, most: int) -> Image.Image:
    """The picture as whole tiles: as wide as it needs and may be, white below (right of tall pictures)."""
    turned = image.height > image.width
    image = image.transpose(Image.Transpose.TRANSPOSE) if turned else image
    ratio = image.width / image.height
    allowed = max(n for n in range(1, most + 2) if all(k * math.ceil(k / ratio) <= most for k in range(1, n + 1)))
    wide = min(math.ceil(image.width / side), allowed) * side
    tall = int(wide / ratio)
    out = Image.new("RGB", (wide, math.ceil(tall / side) * side), (255, 255, 255))
    out.paste(image.resize((wide, tall), Image.Resampling.BILINEAR))
    return out.transpose(Image.Transpose.TRANSPOSE) if turned else out


def cubic(x: float) -> float:
    """Keys' kernel with a = -0.75."""
    x = abs(x)
    if x < 1:
        return 1.25 * x**3 - 2.25 * x**2 + 1
    return -0.75 * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0


def shrunk(pixels: np.ndarray, side: int) -> np.ndarray:
    """float[size, ...] -> float[side, ...]: bicubic along the first axis, edges repeated."""
    size, rows = len(pixels), []
    for row in range(side):
        place = (row + 0.5) * size / side - 0.5
        near = [math.floor(place) + offset for offset in range(-1, 3)]
        rows.append(sum(cubic(place - at) * pixels[min(max(at, 0), size - 1)] for at in near))
    return np.stack(rows)


class Reference:
    """The model of a folder whose config.json names every number that is used.

    Args:
      folder: with `config.json` and `model.safetensors`.
      applied: image tokens get their additions.
      raw: pixels from 0 to 1 are taken as they are.
    """

    def __init__(self, folder: Path, *, applied: bool = True, raw: bool = False):
        self.config = json.loads((folder / "config.json").read_text())
        tensors = load_file(folder / "model.safetensors")
        self.weights = {name: value.astype(np.float64) for name, value in tensors.items()}
        self.applied, self.raw = applied, raw

    def linear(self, name, x):
        return x @ self.weights[f"{name}.weight"].T + self.weights.get(f"{name}.bias", 0.0)

    def partial(self, name, x, image):
        """A linear map of the decoder, with what image tokens get besides."""
        y, scale = self.linear(name, x), self.config["multitap_plora_alpha"] / self.config["multitap_plora_rank"]
        low = self.linear(f"{name}.Plora_B", self.linear(f"{name}.Plora_A", x[image])) * scale
        y[image] += low if self.applied else 0.0
        return y

    def layer_norm(self, name, x):
        x = x - x.mean(axis=-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-5)
        return x * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    def rms_norm(self, name, x):
        scale = np.sqrt((x**2).mean(axis=-1, keepdims=True) + self.config["rms_norm_eps"])
        return x / scale * self.weights[f"{name}.weight"]

    def tower(self, view):
        """float[S, S, 3], normalised -> float[V, E], row by row."""
        name, c = "vit.vision_tower.vision_model", self.config["vision_config"]
        patch, side = c["patch_size"], c["image_size"] // c["patch_size"]
        kernel = self.weights[f"{name}.embeddings.patch_embedding.weight"]
        x = [self.weights[f"{name}.embeddings.class_embedding"]]
        for row in range(side):
            for column in range(side):
                seen = view[row * patch : (row + 1) * patch, column * patch : (column + 1) * patch]
                x.append(np.einsum("ecij,ijc->e", kernel, seen))
        x = np.stack(x) + self.weights[f"{name}.embeddings.position_embedding.weight"]
        x = self.layer_norm(f"{name}.pre_layrnorm", x)
        for layer in range(c["num_hidden_layers"]):
            at = f"{name}.encoder.layers.{layer}"
            y = self.layer_norm(f"{at}.layer_norm1", x)
            q, k, v = (self.linear(f"{at}.self_attn.{part}_proj", y) for part in "qkv")
            heads = c["num_attention_heads"]
            mixed = [
                softmax(a @ b.T / math.sqrt(a.shape[1])) @ w
                for a, b, w in zip(*(np.split(part, heads, 1) for part in (q, k, v)), strict=True)
            ]
            x = x + self.linear(f"{at}.self_attn.out_proj", np.concatenate(mixed, axis=1))
            y = self.linear(f"{at}.mlp.fc1", self.layer_norm(f"{at}.layer_norm2", x))
            x = x + self.linear(f"{at}.mlp.fc2", y / (1 + np.exp(-1.702 * y)))
        return x[1:]

    def lines(self, views):
        """A map of views, [[float[S, S, 3]]] -> float[lines, 4E]: cells line by line, each ended by a newline."""
        newline, out = self.weights["plora_sub_GN"].reshape(-1), []
        for row in views:
            maps = [self.tower(view) for view in row]
            side = int(len(maps[0]) ** 0.5)
            maps = [found.reshape(side, side, -1) for found in maps]
            for line in range(0, side, 2):
                for found in maps:
                    for at in range(0, side, 2):
                        out.append(found[line : line + 2, at : at + 2].reshape(-1))
                out.append(newline)
        return np.stack(out)

    def picture(self, image: Image.Image) -> np.ndarray:
        """float[tokens, H] of an RGB picture that is whole tiles."""
        side = self.config["vision_config"]["image_size"]
        pixels = np.asarray(image).astype(np.float64) / 255
        pixels = pixels if self.raw else (pixels - MEAN) / STD
        down, across = pixels.shape[0] // side, pixels.shape[1] // side
        whole = shrunk(shrunk(pixels, side).swapaxes(0, 1), side).swapaxes(0, 1)
        tiles = [
            [pixels[r * side : (r + 1) * side, c * side : (c + 1) * side] for c in range(across)] for r in range(down)
        ]
        parts = [self.lines([[whole]]), self.weights["plora_glb_GN"].reshape(1, -1), self.lines(tiles)]
        return self.linear("vision_proj.2", gelu(self.linear("vision_proj.0", np.concatenate(parts))))

    def turned(self, x):
        """Rotary positions of [S, A, D], which count from 0."""
        half = x.shape[2] // 2
        angle = np.arange(len(x))[:, None] * self.config["rope_theta"] ** (-np.arange(half) / half)
        cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
        first, second = x[..., :half], x[..., half:]
        return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)

    def attention(self, name, x, image):
        """Group by group, query by query: a group's columns are its queries, its key, its value."""
        heads, groups = self.config["num_attention_heads"], self.config["num_key_value_heads"]
        share, dim = heads // groups, x.shape[1] // heads
        fused = self.partial(f"{name}.wqkv", x, image)
        hidden, mixed = np.triu(np.full((len(x), len(x)), -np.inf), 1), []
        for group in range(groups):
            columns = fused[:, group * (share + 2) * dim : (group + 1) * (share + 2) * dim]
            parts = np.stack(np.split(columns, share + 2, axis=1), axis=1)
            turned = self.turned(parts[:, :-1])
            for query in range(share):
                scores = turned[:, query] @ turned[:, share].T / math.sqrt(dim)
                mixed.append(softmax(scores + hidden) @ parts[:, -1])
        return self.partial(f"{name}.wo", np.concatenate(mixed, axis=1), image)

    def __call__(self, ids: Sequence[int], images: Sequence[Image.Image]) -> list[np.ndarray]:
        """float[S, H]: the embeddings, the output of each layer, and the last one's after the norm."""
        table, pictures = self.weights["model.tok_embeddings.weight"], iter(images)
        runs = [self.picture(next(pictures)) if one == len(table) - 3 else table[one][None] for one in ids]
        image = np.concatenate([np.full(len(run), one == len(table) - 3) for run, one in zip(runs, ids, strict=True)])
        x = np.concatenate(runs)
        states = [x]
        for layer in range(self.config["num_hidden_layers"]):
            at = f"model.layers.{layer}"
            x = x + self.attention(f"{at}.attention", self.rms_norm(f"{at}.attention_norm", x), image)
            y = self.rms_norm(f"{at}.ffn_norm", x)
            gate, up = (self.partial(f"{at}.feed_forward.{name}", y, image) for name in ("w1", "w3"))
            x = x + self.partial(f"{at}.feed_forward.w2", gate / (1 + np.exp(-gate)) * up, image)
            states.append(x)
        return [*states, self.rms_norm("model.norm", x)]
