"""Llama-3.2-Vision through the rest of the house: `multitap score`, FLOP counts, the token table."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from multitap_jax.backbones import Execution
from multitap_jax.backbones.attention import Setup
from multitap_jax.backbones.cross import see
from multitap_jax.config import MeshConfig, OptimizerConfig
from multitap_jax.families import from_config
from multitap_jax.flops import count_work, forward_flops
from multitap_jax.weights.hub import load_backbone
from tests.families.checks import check_score
from tests.families.common import QUICK
from tests.families.mllama import (
    PAIRS,
    POLICY,
    PREPROCESSOR,
    oracle,
    packed_cells,
    reward_model,
    tokenizer,
)

MIXED = MeshConfig(data=2, fsdp=2, tensor=2)
OPTIMIZER = OptimizerConfig(learning_rate=1e-4, weight_decay=0.1, clip_norm=0.5)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mllama")
    return oracle().write(folder), folder


def test_the_score_verb_equals_transformers(model, tmp_path):
    check_score(oracle(), *model, tmp_path, [pair for pair in PAIRS if pair.images], image_policy=POLICY)


def test_the_token_table_has_eight_rows_more(model):
    backbone = load_backbone(model[1])
    vocabulary = len(tokenizer()) - 1
    assert backbone.text.embed.embedding.shape == (vocabulary + 8, 64)
    assert backbone.config.image_token_id == vocabulary
    found = np.asarray(backbone.text.embed(jnp.asarray([vocabulary, vocabulary + 7, vocabulary + 8]), jnp.float32))
    assert np.isfinite(found[:2]).all()
    assert np.isnan(found[2]).all()


def test_work_is_what_the_masks_let_through(model):
    batch = packed_cells(model[1], 1)
    rewards = reward_model()
    config, tower = rewards.backbone.config, rewards.backbone.vision
    work = count_work(batch, block=config.block)
    states = np.zeros((len(batch.patches), 4 * config.vision.tile_tokens, 64), np.float32)
    sight = see(batch, states, tower.real_tiles(batch), row_mask="hf", setup=Setup())
    visible = int(np.asarray(sight.visibility.prepared).sum())
    assert work.cross_pairs * config.vision.tile_tokens == visible * config.vision.tile_patches
    assert work.images == 16
    assert count_work(batch)[:5] == work[:5]
    # Without images only the layers that attend to text run.
    text = work._replace(images=0, cross_pairs=0, patches=0, patch_pairs=0)
    assert forward_flops(config, text).vision == 0
    assert forward_flops(config, text).decoder < forward_flops(config, work).decoder


def test_the_compiler_counts_the_same(model):
    """XLA's own count, products only being a lower bound of it: one tile and all four, dense attention."""
    wide = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2, "cross_attention_layers": [1]}
    vision = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 1, "num_global_layers": 1}
    vision |= {"intermediate_layers_indices": [0], "vision_output_dim": 128}
    changed = oracle(text_config=wide, vision_config=vision).config
    backbone = from_config(changed, rngs=nnx.Rngs(0), preprocessor=PREPROCESSOR)
    batch = packed_cells(model[1], 1)
    config = backbone.config
    # The dense backend computes all pairs of all rows, also those that a mask hides.
    rows, length = batch.tokens.shape
    images, (patches, _) = len(batch.patches), config.block
    work = count_work(batch, block=config.block)._replace(
        tokens=rows * length,
        token_pairs=rows * length**2,
        images=images,
        patches=images * patches,
        patch_pairs=images * patches**2,
        cross_pairs=rows * length * batch.image_token.shape[1] * patches,
        pooled=batch.pool.size,
        pooled_pairs=batch.pool.size * length,
        pooled_cross_pairs=batch.pool.size * batch.image_token.shape[1] * patches,
    )
    ours = forward_flops(config, work).total
    execution = Execution(layers="loop", attention="dense")
    found = jax.jit(lambda m, b: m(b, execution)).lower(backbone, batch).compile(compiler_options=QUICK)
    assert 1.0 <= found.cost_analysis()["flops"] / ours < 1.1
