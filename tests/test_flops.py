"""FLOP counts against slow obvious sums, and the peak table."""

import dataclasses

import numpy as np
import pytest

from multitap_jax.backbones.attention import Keys, Queries, visible
from multitap_jax.backbones.qwen2_vl import Qwen2VLConfig
from multitap_jax.batch import PackedBatch
from multitap_jax.flops import Work, count_work, forward_flops, mfu, peak_flops, train_flops
from tests.stage1.toy import toy_batch
from tests.tiny_qwen2_vl import tiny_config


def packed() -> PackedBatch:
    segment = np.array([[1, 1, 1, 2, 2, 3, 4, 4, 5, 0], [1, 2, 2, 0, 0, 0, 0, 0, 0, 0]], np.int32)
    prefix = np.array([[1, 1, 1, 1, 1, 1, 4, 4, 4, 0], [1, 1, 1, 0, 0, 0, 0, 0, 0, 0]], np.int32)
    patches = np.array([[1] * 4 + [2] * 8 + [0] * 4], np.int32)
    pool, record = (np.array(x, np.int32) for x in ([[4, 5, 8], [2, 0, 0]], [[0, 1, 2], [3, -1, -1]]))
    return toy_batch(0)._replace(segment=segment, prefix=prefix, patch_segment=patches, pool=pool, record=record)


def test_work_is_what_the_mask_lets_through():
    batch = packed()
    column = np.broadcast_to(np.arange(10), batch.segment.shape)
    mask = np.asarray(visible(Queries(batch.segment, batch.prefix, column), Keys(batch.segment, column)))
    pooled = [(0, 4), (0, 5), (0, 8), (1, 2)]
    seen = sum(int(mask[at].sum()) for at in pooled)
    images = int((np.asarray(batch.image_cell) >= 0).sum())
    assert count_work(batch) == Work(12, int(mask.sum()), 12, 4**2 + 8**2, 20, len(pooled), seen, image_tokens=images)


def test_the_parameters_of_a_2b_model_give_its_flops():
    """Without attention, a token costs twice the decoder's matrix entries."""
    hf = Qwen2VLConfig.from_hf(tiny_config(num_hidden_layers=5))
    config = hf.text
    work = Work(7, 0, 0, 0, 7, pooled=3, pooled_pairs=0)
    h, i, kv = config.hidden_size, config.intermediate_size, config.num_kv_heads * config.head_dim
    asking, keys = 2 * h * h + 3 * h * i, 2 * h * kv
    assert forward_flops(hf, work).total == 2 * (7 * 4 * (asking + keys) + 3 * asking + 7 * keys)


def test_the_compiler_counts_the_same():
    """XLA's own count of a forward pass of one image and one text, products only being a lower bound of it."""
    import jax
    from flax import nnx

    from multitap_jax.backbones import Execution
    from multitap_jax.families import from_config

    wide = {"hidden_size": 128, "intermediate_size": 512, "vision_hidden_size": 128}
    hf = tiny_config(num_hidden_layers=2, vision_depth=1, **wide)
    hf["rope_scaling"] = {"type": "mrope", "mrope_section": [4, 6, 6]}
    backbone = from_config(hf, rngs=nnx.Rngs(0))
    rows = 4
    batch = toy_batch(0, rows, 64, 1, cells=rows)._replace(
        patches=np.zeros((rows, 16, 588), np.uint8),
        patch_position=np.zeros((rows, 16, 2), np.int32),
        patch_segment=np.ones((rows, 16), np.int32),
        segment=np.ones((rows, 64), np.int32),
        prefix=np.ones((rows, 64), np.int32),
    )
    work = count_work(batch)
    # The dense backend computes all pairs, also those that the mask hides.
    work = work._replace(token_pairs=rows * 64 * 64, pooled=batch.pool.size, pooled_pairs=batch.pool.size * 64)
    ours = forward_flops(backbone.config, work).total
    found = jax.jit(lambda m, b: m(b, Execution(layers="loop", attention="dense"))).lower(backbone, batch).compile()
    theirs = found.cost_analysis()["flops"]
    assert 1.0 <= theirs / ours < 1.1


def test_what_is_frozen_costs_less():
    config = Qwen2VLConfig.from_hf(tiny_config())
    work = count_work(packed())
    forward = forward_flops(config, work)
    assert train_flops(config, work) == 3 * forward.total
    assert train_flops(config, work, "text") == 3 * forward.decoder + forward.vision
    assert train_flops(config, work, "head") == forward.total


@dataclasses.dataclass
class Device:
    device_kind: str


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989.4e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5p", 459e12),
        ("TPU v6 lite", 918e12),
        ("cpu", None),
    ],
)
def test_peaks_by_device_name(kind, peak):
    assert peak_flops(Device(kind)) == peak


def test_mfu():
    assert mfu(2e12, 0.5, 4, 10e12) == 0.1
    assert mfu(2e12, 0.5, 4, None) is None
