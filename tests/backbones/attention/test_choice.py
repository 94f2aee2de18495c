"""Who is chosen when, what is refused, and that kernels are imported when they are used."""

import logging
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from multitap_jax.backbones.attention import (
    AUTO,
    BACKENDS,
    Setup,
    UnsupportedAttentionError,
    attention,
    check_backend,
    choice,
    make_visibility,
)
from multitap_jax.backbones.attention.rule import Setup as Given
from multitap_jax.config import ConfigError, MeshConfig, ModelConfig
from multitap_jax.parallel.mesh import make_mesh

LONG, SHORT, ENDLESS, BETWEEN = (2048, 2048), (256, 256), (131072, 131072), (4096, 4096)


class Elsewhere(Given):
    """A setup for devices that are not here."""

    def __init__(self, platform: str, **options):
        super().__init__(AUTO, **options)
        object.__setattr__(self, "elsewhere", platform)

    @property
    def platform(self) -> str:
        return self.elsewhere


@pytest.mark.parametrize(
    ("platform", "dtype", "lengths", "causal", "expected"),
    [
        ("cpu", "float32", SHORT, True, "dense"),
        ("cpu", "float32", LONG, True, "blockwise"),
        ("cpu", "bfloat16", LONG, False, "chunked"),
        ("cpu", "float32", ENDLESS, False, "blockwise"),
        ("gpu", "bfloat16", SHORT, True, "dense"),
        ("gpu", "bfloat16", LONG, True, "cudnn"),
        ("gpu", "float32", LONG, True, "dense"),
        ("gpu", "float32", BETWEEN, True, "blockwise"),
        ("gpu", "bfloat16", ENDLESS, True, "blockwise"),
        ("tpu", "bfloat16", LONG, False, "splash"),
        ("tpu", "float32", LONG, False, "dense"),
        ("tpu", "float32", BETWEEN, False, "blockwise"),
        ("tpu", "bfloat16", ENDLESS, True, "blockwise"),
    ],
)
def test_auto_chooses_by_platform_type_and_length(platform, dtype, lengths, causal, expected):
    setup = Elsewhere(platform, dtype=dtype)
    assert choice.choose(setup, *lengths, spread_keys=True, causal=causal) == expected


def test_rows_that_are_spread_take_the_ring_and_what_is_not_spread_does_not():
    mesh = make_mesh(MeshConfig(data=1, context=8))
    for backend in (AUTO, "ring"):
        setup = Setup(backend, mesh=mesh, along_context=True)
        assert choice.choose(setup, *LONG, spread_keys=True, causal=True) == "ring"
        assert choice.choose(setup, *LONG, spread_keys=False, causal=False) == "chunked"
        assert choice.choose(Setup(backend, mesh=mesh), *LONG, spread_keys=True, causal=False) == "chunked"


def test_a_choice_is_logged_once(caplog):
    choice._log.cache_clear()
    with caplog.at_level(logging.INFO, logger=choice.__name__):
        for _ in range(3):
            make_visibility(np.ones((1, 640), np.int32), causal=True, setup=Setup(AUTO))
    said = [record.getMessage() for record in caplog.records]
    assert said == ["attention=auto: blockwise for 640 queries and 640 keys a row, float32 on cpu"]


def test_an_unknown_backend_is_refused_by_name():
    known = r"'flash' is no backend; known: auto, dense, chunked, blockwise, cudnn, splash, ring"
    with pytest.raises(UnsupportedAttentionError, match=known):
        make_visibility(np.ones((1, 4), np.int32), causal=True, setup=Setup("flash"))
    with pytest.raises(ConfigError, match=rf"config.model.attention = {known}"):
        ModelConfig(attention="flash")
    for name in (AUTO, *BACKENDS):
        check_backend(name)


@pytest.mark.parametrize(
    ("backend", "dtype", "dim", "message"),
    [
        (
            "cudnn",
            jnp.float32,
            16,
            r"'cudnn' takes bfloat16 or float16 .* not float32 and 16; use 'blockwise'",
        ),
        ("cudnn", jnp.bfloat16, 20, r"not bfloat16 and 20"),
        ("splash", jnp.float32, 16, r"'splash' takes bfloat16, not float32; use 'blockwise'"),
    ],
)
def test_kernels_refuse_what_they_cannot_compute(backend, dtype, dim, message):
    x = jnp.ones((1, 8, 2, dim), dtype)
    visibility = make_visibility(np.ones((1, 8), np.int32), causal=True, setup=Setup(backend))
    with pytest.raises(UnsupportedAttentionError, match=message):
        attention(x, x, x, visibility)


def test_kernels_are_imported_when_they_are_used():
    code = (
        "import sys, multitap_jax.backbones.qwen2_vl, multitap_jax.backbones.mllama\n"
        "import multitap_jax.scoring.scorer, multitap_jax.stage1.train\n"
        "kernels = 'attention.splash', 'attention.cudnn', 'experimental.pallas'\n"
        "found = [name for name in sys.modules if name.endswith(kernels)]\n"
        "assert not found, found"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"JAX_PLATFORMS": "cpu", "PYTHONPATH": "."})
    assert jax.default_backend() == "cpu"
