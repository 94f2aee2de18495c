"""The demo's checkpoint is a real Hugging Face folder: transformers opens every part of it."""

import json

import jax
import numpy as np
import pytest
from flax import nnx
from transformers import AutoImageProcessor, AutoTokenizer

from multitap_jax.demo.checkpoint import IMAGE_SIZE, SPECIAL_TOKENS, build_checkpoint
from multitap_jax.demo.render import SIZE, render_scene
from multitap_jax.demo.scenes import draw_scene, scene_rng
from multitap_jax.demo.texts import vocabulary_sample, write_texts
from multitap_jax.weights.hub import load_backbone


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build_checkpoint(tmp_path_factory.mktemp("tiny"), vocabulary_sample(), seed=0)


def test_files_are_those_of_a_published_folder(folder):
    names = {path.name for path in folder.iterdir()}
    assert names >= {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "preprocessor_config.json",
    }
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "qwen2_vl"
    assert config["architectures"] == ["Qwen2VLForConditionalGeneration"]


def test_torch_loads_every_weight(folder):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    model, report = transformers.Qwen2VLForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    deviation = float(model.model.language_model.layers[0].self_attn.q_proj.weight.detach().std())
    assert deviation == pytest.approx(model.config.text_config.hidden_size**-0.5, rel=0.1)


def test_our_loader_reads_it_back(folder):
    model = load_backbone(folder)
    assert all(bool(np.isfinite(np.asarray(leaf)).all()) for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


def test_words_are_whole_tokens_and_the_template_is_the_official_one(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for index in range(30):
        for said in write_texts(draw_scene(scene_rng(0, index, 0)), scene_rng(0, index, 2)):
            pieces = said.text.replace(".", " .").replace(":", " :").replace(",", " ,").split()
            assert len(tokenizer(said.text)["input_ids"]) == len(pieces)
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "Describe this image."}]},
        {"role": "assistant", "content": [{"type": "image"}, {"type": "text", "text": "Keep left."}]},
    ]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nDescribe this image.<|im_end|>\n"
        "<|im_start|>assistant\n<|vision_start|><|image_pad|><|vision_end|>Keep left.<|im_end|>\n"
    )
    for token in SPECIAL_TOKENS:
        assert len(tokenizer(token)["input_ids"]) == 1
    assert tokenizer.decode(tokenizer("Grüße, 世界!")["input_ids"]) == "Grüße, 世界!"


def test_processor_brings_pictures_to_the_size_of_the_model(folder):
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    picture = render_scene(draw_scene(scene_rng(0, 0, 0)), scene_rng(0, 0, 1))
    assert picture.size == (SIZE, SIZE)
    grid = processor(images=[picture], return_tensors="np")["image_grid_thw"]
    assert grid.tolist() == [[1, IMAGE_SIZE // 14, IMAGE_SIZE // 14]]


def test_same_seed_same_bytes(folder, tmp_path):
    again = build_checkpoint(tmp_path, vocabulary_sample(), seed=0)
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (again / name).read_bytes() == (folder / name).read_bytes()
