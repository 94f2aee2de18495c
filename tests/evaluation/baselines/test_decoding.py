"""Decoding with a cache against the slow obvious way: a whole forward for every token, each continuation alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from multitap_jax.backbones import Execution
from multitap_jax.backbones.attention import (
    Keys,
    Queries,
    attention,
    attention_in_parts,
    make_cross_visibility,
    make_visibility,
)
from multitap_jax.evaluation.baselines.decoding import first_tokens, greedy
from multitap_jax.weights.hub import load_backbone
from multitap_jax.weights.language import load_language_head
from multitap_jax.weights.mapping import WeightError
from tests.tiny_qwen2_vl import Group, pack, pack_one, random_group, tiny_config, write_folder

FLOAT32 = Execution()
NEW = 7


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = write_folder(tmp_path_factory.mktemp("model"), tiny_config())
    backbone = load_backbone(folder)
    return backbone, load_language_head(folder, backbone)


@pytest.fixture(scope="module")
def rows() -> list[list[Group]]:
    """Two rows; the first has two groups, one of them of two images, and the last group has none."""
    rng = np.random.default_rng(0)
    first = [random_group(rng, [(4, 4)], [5, 2, 9]), random_group(rng, [(2, 4), (4, 2)], [3])]
    return [first, [random_group(rng, [(6, 4)], [4, 4]), random_group(rng, [], [6])]]


def slow_logits(model, group: Group, text: list[int]) -> np.ndarray:
    """float32[vocab]: what follows one text alone, by a whole forward."""
    vision = 64 if group.images else 0
    batch = pack_one(Group(group.prefix, group.images, [text]), row_length=48, vision_length=vision)
    return np.asarray(_logits(*model, batch))[0, 0]


_logits = jax.jit(lambda backbone, head, batch: head(backbone(batch, FLOAT32)))


def slow_greedy(model, group: Group, text: list[int], stop: tuple[int, ...]) -> list[int]:
    out: list[int] = []
    while len(out) < NEW:
        token = int(slow_logits(model, group, text + out).argmax())
        if token in stop:
            break
        out.append(token)
    return out


def fast_greedy(model, rows: list[list[Group]], stop: tuple[int, ...], **options) -> list[list[int]]:
    """Continuations in the order of rows, groups, texts."""
    batch = pack(rows, spare=1)
    found = greedy(*model, batch, max_new_tokens=options.pop("new", NEW), stop=stop, execution=Execution(**options))
    tokens, length, finite = (np.asarray(x)[batch.record >= 0] for x in (found.tokens, found.length, found.finite))
    assert finite.all()
    return [row[:count].tolist() for row, count in zip(tokens, length, strict=True)]


def test_the_cache_changes_nothing(model, rows):
    alone = [(group, text) for row in rows for group in row for text in group.texts]
    expected = [slow_greedy(model, group, text, ()) for group, text in alone]
    assert len({tuple(row) for row in expected}) == len(expected)
    assert fast_greedy(model, rows, ()) == expected
    assert fast_greedy(model, rows, (), new=1) == [row[:1] for row in expected]
    assert fast_greedy(model, rows, (), attention="blockwise") == expected
    assert {len(row) for row in fast_greedy(model, rows, (), dtype="bfloat16")} == {NEW}
    stop = (expected[0][3], expected[4][0])  # one text stops in the middle, one at once
    stopping = [slow_greedy(model, group, text, stop) for group, text in alone]
    assert {len(row) for row in stopping} >= {0, NEW}
    assert fast_greedy(model, rows, stop) == stopping


def test_first_tokens_are_those_of_the_whole_softmax(model, rows):
    batch, wanted = pack(rows), np.array([3, 77, 0])
    found = first_tokens(*model, batch, jnp.asarray(wanted), top=5, execution=FLOAT32)
    index = 0
    for row in rows:
        for group in row:
            for text in group.texts:
                place = np.argwhere(batch.record == index)[0]
                logits = slow_logits(model, group, text).astype(np.float64)
                chance = np.log(np.exp(logits) / np.exp(logits).sum())
                order = np.argsort(-logits)[:5]
                np.testing.assert_allclose(found.wanted[*place], chance[wanted], atol=1e-4)
                np.testing.assert_allclose(found.top[*place], chance[order], atol=1e-4)
                np.testing.assert_array_equal(found.token[*place], order)
                index += 1


def test_nan_is_noticed(model, rows):
    backbone, head = model
    broken = jax.tree.map(lambda x: x, head)
    broken.weight[...] = head.weight[...].at[5].set(jnp.nan)
    batch = pack(rows)
    found = greedy(backbone, broken, batch, max_new_tokens=2, stop=(), execution=FLOAT32)
    assert not np.asarray(found.finite)[batch.record >= 0].any()


def poisoned(model, token: int):
    """A model in which a token is no number."""
    backbone = jax.tree.map(lambda x: x, model[0])
    table = backbone.text.embed.embedding
    table[...] = table[...].at[token].set(jnp.nan)
    return backbone, model[1]


def decoded(model, batch, **options):
    """Continuations of all texts, and which of them are whole."""
    found = greedy(*model, batch, max_new_tokens=NEW, stop=(), execution=Execution(**options))
    return np.asarray(found.tokens)[batch.record >= 0], np.asarray(found.finite)[batch.record >= 0]


@pytest.mark.parametrize("options", [{}, {"attention": "blockwise"}, {"layers": "loop"}], ids=str)
@pytest.mark.parametrize("where", ["text", "prefix", "written"])
def test_nan_of_one_text_stays_with_it(model, rows, where, options):
    """Read as a part of its text, of the prefix of its group, or written by itself: the others never learn of it."""
    used = {token for row in rows for group in row for text in [group.prefix, *group.texts] for token in text}
    free = next(token for token in range(100) if token not in used)
    clean, _ = decoded(model, pack(rows, spare=1), **options)
    token, changed, lost = free, rows, [1] if where == "text" else [0, 1, 2]
    if where == "written":  # one that a single text writes, and reads again
        writers = {t: np.flatnonzero((clean == t).any(axis=1)).tolist() for t in clean[:, : NEW - 1].flat}
        token, lost = next((t, found) for t, found in writers.items() if t not in used and len(found) == 1)
    else:
        group = rows[0][0]
        texts = [[free, *text[1:]] if where == "text" and n == 1 else text for n, text in enumerate(group.texts)]
        prefix = [free, *group.prefix[1:]] if where == "prefix" else group.prefix
        changed = [[Group(prefix, group.images, texts), *rows[0][1:]], *rows[1:]]
    tokens, finite = decoded(poisoned(model, int(token)), pack(changed, spare=1), **options)
    np.testing.assert_array_equal(np.flatnonzero(~finite), lost)
    np.testing.assert_array_equal(tokens[finite], clean[finite])


def test_attention_in_parts_is_attention_over_all():
    rng = np.random.default_rng(3)
    shape = (2, 9, 4, 8)
    q, k, v = (rng.standard_normal((*shape[:2], heads, 8)).astype(np.float32) for heads in (4, 2, 2))
    segment = np.array([[1, 1, 2, 2, 2, 3, 3, 0, 0], [1, 2, 2, 2, 3, 3, 3, 4, 0]], np.int32)
    prefix = np.where(segment > 0, 1, 0)
    whole = attention(q, k, v, make_visibility(segment, prefix, causal=True))
    column = np.tile(np.arange(9, dtype=np.int32), (2, 1))
    parts = [
        (
            k[:, part],
            v[:, part],
            make_cross_visibility(Queries(segment, prefix, column), Keys(segment[:, part], column[:, part])),
        )
        for part in (slice(0, 4), slice(4, 9))
    ]
    seen = segment > 0
    np.testing.assert_allclose(attention_in_parts(q, parts)[seen], whole[seen], atol=1e-6)


def test_a_tied_head_is_the_token_table_and_a_lost_one_an_error(tmp_path):
    folder = write_folder(tmp_path, tiny_config(tie_word_embeddings=True))
    backbone = load_backbone(folder)
    table = load_language_head(folder, backbone).weight[...]
    assert table.unsafe_buffer_pointer() == backbone.text.embed.embedding[...].unsafe_buffer_pointer()
    (folder / "config.json").write_text(
        (folder / "config.json").read_text().replace('"tie_word_embeddings": true', '"tie_word_embeddings": false')
    )
    with pytest.raises(WeightError, match=r"lm_head\.weight, the language head, is not here"):
        load_language_head(folder, load_backbone(folder))
