"""The official code's model and forward pass in torch, one recipe a backbone, on tiny random weights.

What the official code does (kaist-cvml/MULTI-TAP on transformers 4.46.1; read, not copied): every picture squeezed to a
square by PIL, then the backbone's own processor, which pads pairs on the left to a fixed length; `hidden_states[-1]` at
the last position, nn.Linear and a sigmoid. Nothing gives positions, so Qwen2-VL's count the padded row on all three
axes.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from multitap_jax.data.stream import Pair
from tests.families import llava, mllama, qwen2_vl
from tests.families.common import Oracle, conversation, picture

torch = pytest.importorskip("torch")
HIDDEN = 64
TEXTS = ("a red ball", "the blue box is far away on the right", 'a "red" ball is near on your left')
PICTURES = (picture(150, 90), picture(60, 200), picture(150, 90))


class OfficialRewardModel(torch.nn.Module):
    def __init__(self, backbone):
        super().__init__()
        self.backbone_model = backbone
        self.reward_head = torch.nn.Linear(HIDDEN, 1)

    def forward(self, **batch):
        hidden = self.backbone_model(**batch, output_hidden_states=True, use_cache=False).hidden_states[-1]
        return torch.sigmoid(self.reward_head(hidden[:, -1, :]).squeeze(-1))


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How the official code uses one backbone.

    Attributes:
      oracle: the backbone as transformers has it.
      side: pixels that pictures are squeezed to; 560 there.
      length: tokens that pairs are padded to; 2048 there.
      inputs: (tokenizer, rendered conversation, squeezed pictures, length) -> the torch model's inputs of one pair.
      older: (prefix of today's names in memory, that of 4.46.1) pairs; the first that a name starts with is replaced.
    """

    oracle: Oracle
    side: int
    length: int
    inputs: Callable[..., Mapping[str, np.ndarray]]
    older: Sequence[tuple[str, str]]

    def rename(self, name: str) -> str:
        """A tensor's name as transformers 4.46.1 had it."""
        found = ((new, old) for new, old in self.older if name.startswith(f"backbone_model.{new}"))
        new, old = next(found, ("", ""))
        return name.replace(f"backbone_model.{new}", f"backbone_model.{old}", 1)

    def write(self, base: Path, folder: Path) -> OfficialRewardModel:
        """The model; its backbone's own folder, and its state as one file without config.json or tokenizer."""
        model = OfficialRewardModel(self.oracle.write(base)).eval()
        with torch.no_grad():
            noise = np.random.default_rng(4).standard_normal((1, HIDDEN)).astype(np.float32)
            model.reward_head.weight.copy_(torch.from_numpy(noise * np.float32(0.1)))
            model.reward_head.bias.fill_(0.25)
        state = {name: value.numpy().copy() for name, value in model.state_dict().items()}
        state["backbone_model.lm_head.weight"] += np.float32(1)  # its own, not the base's
        save_file(state, folder / "model.safetensors")
        return model

    def scores(self, model: OfficialRewardModel, prompt: str) -> np.ndarray:
        """Scores of the pairs, one a forward, as the official evaluation has it."""
        tokenizer, out = self.oracle.tokenizer, []
        for image, text in zip(PICTURES, TEXTS, strict=True):
            rendered = tokenizer.apply_chat_template(conversation(Pair((image,), text), prompt), tokenize=False)
            found = self.inputs(tokenizer, rendered, [image.resize((self.side, self.side))], self.length)
            assert found["input_ids"].shape == (1, self.length)
            assert not found["attention_mask"][0, 0]  # there is padding, and it is on the left
            assert found["attention_mask"][0, -1]
            given = {name: torch.from_numpy(np.asarray(value)) for name, value in found.items()}
            with torch.no_grad():
                out.append(model(**given).numpy()[0])
        return np.asarray(out)


def qwen2_vl_inputs(tokenizer: Any, rendered: str, images: Sequence[Any], length: int) -> dict[str, np.ndarray]:
    """Its processor as a whole needs torchvision, so padding and positions are written out."""
    found = dict(qwen2_vl.inputs(tokenizer, rendered, images))
    left = length - found["input_ids"].shape[1]
    for name, fill in (("input_ids", tokenizer.pad_token_id), ("attention_mask", 0), ("mm_token_type_ids", 0)):
        found[name] = np.pad(found[name], ((0, 0), (left, 0)), constant_values=fill)
    return found | {"position_ids": np.tile(np.arange(length), (3, 1, 1))}


def padded(inputs: Callable[..., Mapping[str, np.ndarray]]) -> Callable[..., Mapping[str, np.ndarray]]:
    """The processor's own padding; masks of cross-attention are those of the padded row."""

    def call(tokenizer: Any, rendered: str, images: Sequence[Any], length: int) -> Mapping[str, np.ndarray]:
        options = {"padding": "max_length", "max_length": length, "truncation": True, "padding_side": "left"}
        return inputs(tokenizer, rendered, images, **options)

    return call


HEADED = (
    ("model.language_model.", "language_model.model."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("lm_head.", "language_model.lm_head."),
)
RECIPES = {
    "qwen2_vl": Recipe(
        qwen2_vl.oracle(),
        56,
        64,
        qwen2_vl_inputs,
        (("model.language_model.", "model."), ("model.visual.", "visual.")),
    ),
    # The official square is one tile, beside which three are filled up. Its oracle's config.json asks for intermediate
    # states "after" their layers, as transformers has them today; at 4.46.1 they were "before", which is what is read
    # without that entry, and what tests/families/test_mllama.py holds against a reference in NumPy.
    "mllama": Recipe(
        mllama.oracle(), mllama.TILE, 128, padded(mllama.inputs), (*HEADED, ("model.vision_model.", "vision_model."))
    ),
    # And here it is larger than a tile: two by two of them.
    "mllama in tiles": Recipe(
        mllama.oracle(), 40, 128, padded(mllama.inputs), (*HEADED, ("model.vision_model.", "vision_model."))
    ),
    # Squeezed to a square, which its processor brings to the tower's size.
    "llava": Recipe(
        llava.oracle(), 80, 128, padded(llava.inputs), (*HEADED, ("model.vision_tower.", "vision_tower.vision_model."))
    ),
}
