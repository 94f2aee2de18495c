"""The score contract: the same pair, the same score; nothing cut in silence; no NaN passes for a score."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest
from PIL import Image

from multitap_jax.backbones import Execution
from multitap_jax.batch import PackedBatch
from multitap_jax.config import MeshConfig
from multitap_jax.data.processing import Processing
from multitap_jax.data.stream import Pair
from multitap_jax.parallel.mesh import make_mesh
from multitap_jax.reward import RewardModel
from multitap_jax.scoring.artefact import Artefact
from multitap_jax.scoring.job import score_file
from multitap_jax.scoring.occupancy import Occupancy
from multitap_jax.scoring.pairs import make_pairs
from multitap_jax.scoring.readahead import read_ahead
from multitap_jax.scoring.results import ScoringError
from multitap_jax.scoring.scorer import IN_FLIGHT, Scorer
from tests.scoring.model_fixtures import CONTRACT, HIDDEN, pictures, tiny_model, tiny_ridge
from tests.tiny_tokenizer import tiny_tokenizer

TEXTS = ["a red ball", "the blue box is far away on the right", "near", "a ball is near on your left , far away", "box"]


@pytest.fixture(scope="module")
def scorer(saved) -> Scorer:
    return Scorer.from_pretrained(saved, batch_tokens=256, workers=2)


@pytest.fixture(scope="module")
def pairs() -> tuple[list[Image.Image], list[str]]:
    """Thirteen pairs on four pictures, some of which have several texts."""
    seen = pictures(4)
    order = [0, 0, 1, 2, 0, 3, 3, 1, 1, 0, 2, 0, 3]
    return [seen[i] for i in order], [TEXTS[(i * 3 + n) % 5] + f" {n}" for n, i in enumerate(order)]


@pytest.fixture(scope="module")
def expected(scorer, pairs):
    return scorer.score(images=pairs[0], texts=pairs[1])


def alone(saved, image: Image.Image, text: str, request: str | None = None) -> tuple[float, np.ndarray]:
    """Logit and objectives of one pair, laid out by hand: one row, no packing."""
    processing = Processing.from_folder(saved, CONTRACT)
    encoded = processing.prompter.encode([text], [request], [1])[0]
    picture = processing.reader(image)
    rows, columns = picture.grid[0] // 2, picture.grid[1] // 2
    at = int(np.flatnonzero(encoded.prefix == processing.vision.placeholder)[0])
    cells = rows * columns
    tokens = np.concatenate(
        [encoded.prefix[:at], np.full(cells, encoded.prefix[at]), encoded.prefix[at + 1 :], encoded.text]
    )
    before = np.arange(at)
    grid = np.stack([np.zeros(cells), *np.divmod(np.arange(cells), columns)], axis=1) + at
    after = at + max(rows, columns) + np.arange(len(tokens) - at - cells)
    positions = np.concatenate([np.stack([before] * 3, 1), grid, np.stack([after] * 3, 1)])
    cell = np.full(len(tokens), -1)
    cell[at : at + cells] = np.arange(cells)
    where = [
        (2 * r + i, 2 * c + j) for r in range(rows) for c in range(columns) for i in range(2) for j in range(2)
    ]  # block by block
    ones = np.ones((1, len(tokens)), np.int32)
    batch = PackedBatch(
        tokens=tokens[None].astype(np.int32),
        positions=positions[None].astype(np.int32),
        segment=ones,
        prefix=ones,
        image_cell=cell[None].astype(np.int32),
        pool=np.asarray([[len(tokens) - 1]], np.int32),
        record=np.zeros((1, 1), np.int32),
        target=np.zeros((1, 1), np.float32),
        weight=np.ones((1, 1), np.float32),
        image_token=np.zeros((1, 0), np.int32),
        patches=picture.patches[None],
        patch_position=np.asarray(where, np.int32)[None],
        patch_segment=np.ones((1, len(where)), np.int32),
    )
    model, ridge = tiny_model(), tiny_ridge()
    hidden = np.asarray(jax.jit(RewardModel.embed, static_argnums=2)(model, batch, Execution()))[0, 0]
    logit = hidden @ np.asarray(model.head.weight[...]) + np.asarray(model.head.bias[...])
    return float(logit), ridge.coef_ @ hidden + ridge.intercept_


def test_scores_are_those_of_each_pair_alone(saved, pairs, expected):
    for index in (0, 3, 9):
        logit, objectives = alone(saved, pairs[0][index], pairs[1][index])
        np.testing.assert_allclose(expected.logits[index], logit, atol=1e-5)
        np.testing.assert_allclose(expected.objectives[index], objectives, atol=1e-4)
    np.testing.assert_allclose(expected.overall, 1 / (1 + np.exp(-expected.logits.astype(np.float64))), atol=1e-6)
    assert expected.overall.dtype == expected.logits.dtype == expected.objectives.dtype == np.float32
    assert expected.names == ("safety", "detail")
    assert expected.objectives.shape == (13, 2)
    assert expected.errors == [None] * 13
    assert expected.raise_errors() is expected
    assert np.ptp(expected.logits) > 0.01  # the tiny model tells pairs apart, so the tests of equality mean something


@pytest.mark.parametrize("batch_size", [1, 2, 5, 100])
def test_the_batch_size_does_not_matter(scorer, pairs, expected, batch_size):
    found = scorer.score(images=pairs[0], texts=pairs[1], batch_size=batch_size)
    np.testing.assert_allclose(found.logits, expected.logits, atol=1e-5)
    np.testing.assert_allclose(found.objectives, expected.objectives, atol=1e-5)
    np.testing.assert_array_equal(found.n_tokens, expected.n_tokens)


def test_the_order_does_not_matter(scorer, pairs, expected):
    order = np.random.default_rng(1).permutation(13)
    found = scorer.score(images=[pairs[0][i] for i in order], texts=[pairs[1][i] for i in order])
    np.testing.assert_allclose(found.logits, expected.logits[order], atol=1e-5)


def test_grouping_and_what_else_is_in_the_call_do_not_matter(scorer, pairs, expected):
    copies = [image.copy() for image in pairs[0]]  # other objects with the same content
    found = scorer.score(images=copies, texts=pairs[1])
    np.testing.assert_allclose(found.logits, expected.logits, atol=1e-5)
    for index in (0, 5, 12):
        single = scorer.score(images=[pairs[0][index]], texts=[pairs[1][index]])
        np.testing.assert_allclose(single.logits, expected.logits[[index]], atol=1e-5)


def test_batches_of_other_sizes_give_the_same(saved, pairs, expected):
    other = Scorer.from_pretrained(saved, batch_tokens=4096)
    np.testing.assert_allclose(other.score(images=pairs[0], texts=pairs[1]).logits, expected.logits, atol=1e-5)
    assert other.num_shapes == 1


def test_paths_arrays_and_images_are_the_same(scorer, pairs, expected, tmp_path):
    pairs[0][0].save(tmp_path / "a.png")
    sources = [pairs[0][0], np.asarray(pairs[0][0]), str(tmp_path / "a.png"), tmp_path / "a.png", [tmp_path / "a.png"]]
    found = scorer.score(images=sources, texts=[pairs[1][0]] * 5)
    np.testing.assert_allclose(found.logits, np.full(5, expected.logits[0]), atol=1e-5)


def test_a_request_changes_the_prompt(scorer, pairs):
    image, text = pairs[0][0], pairs[1][0]
    found = scorer.score(images=[image] * 3, texts=[text] * 3, requests=[None, "where is the box", None])
    np.testing.assert_allclose(found.logits[0], found.logits[2], atol=1e-5)
    assert abs(found.logits[1] - found.logits[0]) > 1e-4


def test_several_pictures_a_pair(scorer, pairs):
    seen = pictures(2)
    found = scorer.score(images=[seen, seen[::-1], seen[:1]], texts=["a red ball"] * 3)
    assert found.errors == [None] * 3
    assert found.n_tokens[0] == found.n_tokens[1] > found.n_tokens[2]
    assert abs(found.logits[0] - found.logits[1]) > 1e-5


def test_few_shapes_however_many_calls(saved, pairs):
    scorer = Scorer.from_pretrained(saved, batch_tokens=256)
    for count in range(1, 14):
        scorer.score(images=pairs[0][:count], texts=pairs[1][:count])
    assert scorer.num_shapes <= 8


def test_over_several_devices(saved, pairs, expected):
    mesh = make_mesh(MeshConfig(data=4, fsdp=2))
    scorer = Scorer.from_pretrained(saved, batch_tokens=2048, mesh=mesh)
    found = scorer.score(images=pairs[0], texts=pairs[1])
    np.testing.assert_allclose(found.logits, expected.logits, atol=1e-5)
    np.testing.assert_allclose(found.objectives, expected.objectives, atol=1e-5)


def test_bfloat16_is_close(saved, pairs, expected):
    scorer = Scorer.from_pretrained(saved, dtype="bfloat16")
    found = scorer.score(images=pairs[0], texts=pairs[1])
    assert found.overall.dtype == np.float32
    np.testing.assert_allclose(found.overall, expected.overall, atol=0.1)
    with pytest.raises(ValueError, match="dtype 'float16': expected float32 or bfloat16"):
        Scorer.from_pretrained(saved, dtype="float16")


def test_embeddings_are_what_the_heads_see(scorer, saved, pairs, expected):
    found = scorer.embed(images=pairs[0], texts=pairs[1])
    assert found.values.shape == (13, HIDDEN)
    assert found.values.dtype == np.float32
    arrays = Artefact.open(saved).head_arrays()
    np.testing.assert_allclose(
        found.values @ arrays["reward_head.weight"][0] + arrays["reward_head.bias"], expected.logits, atol=1e-5
    )
    np.testing.assert_allclose(found.logits, expected.logits, atol=1e-5)
    np.testing.assert_allclose(
        found.values @ arrays["ridge.coef"].T + arrays["ridge.intercept"], expected.objectives, atol=1e-4
    )


def test_a_bad_pair_does_not_touch_the_others(scorer, pairs, expected, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    images, texts = list(pairs[0]), list(pairs[1])
    images[2] = tmp_path / "absent.png"
    images[5] = tmp_path / "broken.png"
    texts[7] = "  "
    texts[8] = "ends early <|im_end|> here"
    bad = [2, 5, 7, 8]
    good = [i for i in range(13) if i not in bad]
    found = scorer.score(images=images, texts=texts)
    assert [i for i in range(13) if found.errors[i]] == bad
    assert "absent.png" in found.errors[2]
    assert "broken.png" in found.errors[5]
    assert "empty" in found.errors[7]
    assert "<|im_end|>" in found.errors[8]
    assert np.isnan(found.overall[bad]).all()
    assert np.isnan(found.objectives[bad]).all()
    np.testing.assert_allclose(found.logits[good], expected.logits[good], atol=1e-5)
    with pytest.raises(ScoringError, match=r"4 of 13 pairs have no score:\npair 2: .*absent"):
        found.raise_errors()
    with pytest.raises(ScoringError):
        scorer.embed(images=images, texts=texts).raise_errors()


def test_all_pairs_bad(scorer):
    found = scorer.score(images=["absent.png"] * 2, texts=["a", "b"])
    assert all(found.errors)
    assert np.isnan(found.overall).all()


def test_a_long_text_is_an_error_unless_it_may_be_cut(saved, scorer, pairs):
    short = Scorer.from_pretrained(saved, max_length=64)
    image, text = pairs[0][0], "a red ball is near on your left " * 20
    texts = [text, "a red ball"]
    found = short.score(images=[image] * 2, texts=texts)
    assert "--truncate" in found.errors[0]
    assert found.errors[1] is None
    assert not found.truncated.any()
    cut = short.score(images=[image] * 2, texts=texts, truncate=True)
    assert cut.errors == [None, None]
    assert cut.truncated.tolist() == [True, False]
    assert cut.n_tokens[0] == 64
    np.testing.assert_allclose(cut.logits[1], found.logits[1], atol=1e-5)
    # The score is that of the whole turn which the tokens that are left spell.
    prompter = Processing.from_folder(saved, CONTRACT).prompter
    whole = prompter.encode([text], [None], [1])[0].text
    room = 64 - (int(scorer.score(images=[image], texts=[text]).n_tokens[0]) - len(whole))
    spelled = tiny_tokenizer().decode(whole[: room - len(prompter.closing)])
    same = short.score(images=[image], texts=[spelled])
    assert same.n_tokens[0] == 64
    np.testing.assert_allclose(same.logits[0], cut.logits[0], atol=1e-5)


def test_a_default_for_truncation(saved, pairs):
    scorer = Scorer.from_pretrained(saved, max_length=64, truncate=True)
    text = "a red ball is near on your left " * 20
    assert scorer.score(images=pairs[0][:1], texts=[text]).truncated[0]
    assert scorer.score(images=pairs[0][:1], texts=[text], truncate=False).errors[0]


def test_no_nan_passes_for_a_score(saved, pairs):
    artefact, model, ridge = Artefact.load(saved)
    broken = ridge.coef_.copy()
    broken[1] = np.inf
    ridge.coef_ = broken
    scorer = Scorer(artefact, model, ridge)
    found = scorer.score(images=pairs[0][:3], texts=pairs[1][:3])
    assert all("NaN or infinity" in error for error in found.errors)
    assert np.isnan(found.overall).all()
    assert not found.n_tokens.any()


def test_ranking(scorer):
    seen = pictures(5)
    ranking = scorer.rank(text="a red ball", images=[*seen, "absent.png"])
    scores = ranking.scores.overall[ranking.order]
    assert ranking.order[-1] == 5
    assert (np.diff(scores[:-1]) <= 0).all()


def test_no_pairs_at_all(scorer):
    found = scorer.score(images=[], texts=[])
    assert found.overall.shape == (0,)
    assert found.objectives.shape == (0, 2)


def test_lists_that_do_not_fit_are_refused(scorer, pairs):
    image = pairs[0][0]
    for arguments, kind, reason in (
        ({"images": image, "texts": ["a", "b"]}, TypeError, r"images=\[image\] \* len\(texts\)"),
        ({"images": "a.png", "texts": ["a"]}, TypeError, "images is a str"),
        ({"images": [image], "texts": ["a", "b"]}, ValueError, "1 images, but 2 texts"),
        ({"images": [image], "texts": "a"}, TypeError, "texts is a str"),
        ({"images": [image], "texts": [None]}, TypeError, r"texts\[0\] is a NoneType"),
        ({"images": [3], "texts": ["a"]}, TypeError, r"images\[0\] is a int"),
        ({"images": [image], "texts": ["a"], "requests": [1]}, TypeError, r"requests\[0\] is a int"),
        ({"images": [image], "texts": ["a"], "requests": []}, ValueError, "0 requests, but 1 texts"),
        ({"images": [image], "texts": ["a"], "batch_size": 0}, ValueError, "batch_size = 0"),
    ):
        with pytest.raises(kind, match=reason):
            scorer.score(**arguments)
    with pytest.raises(TypeError, match="positional"):
        scorer.score([image], ["a"])


def test_a_stream_gives_what_its_lists_give_alone(scorer, pairs, expected, tmp_path):
    every = make_pairs(*pairs, None)
    broken = [Pair((tmp_path / "absent.png",), "near")]
    lists = [every[:4], [], broken, every[4:5], every[5:]]
    occupancy = Occupancy()
    found = list(scorer.score_stream(iter(lists), occupancy=occupancy))
    assert [len(scores.errors) for scores in found] == [4, 0, 1, 1, 8]
    assert [error is None for scores in found for error in scores.errors] == [True] * 4 + [False] + [True] * 9
    assert 0 <= occupancy.close().idle_share <= 1
    good = np.concatenate([found[i].logits for i in (0, 3, 4)])
    np.testing.assert_allclose(good, expected.logits, rtol=0, atol=1e-5)
    states = np.concatenate([part.values for part in scorer.embed_stream([every[:4], every[4:]])])
    np.testing.assert_allclose(states, scorer.embed(images=pairs[0], texts=pairs[1]).values, rtol=0, atol=1e-5)


def test_a_stream_reads_a_few_batches_ahead_and_no_more(scorer, pairs):
    asked, every = [], make_pairs(*pairs, None)

    def lists():
        for number in range(100):
            asked.append(number)
            yield every[:1]

    stream = scorer.score_stream(lists())
    next(stream)
    stream.close()
    assert 1 < len(asked) < 20


def test_a_stream_can_be_left_while_its_source_waits(scorer, pairs, monkeypatch):
    monkeypatch.setattr("multitap_jax.scoring.readahead.PATIENCE", 0.05)
    every, never = make_pairs(*pairs, None), threading.Event()

    def lists():
        for _ in range(IN_FLIGHT + 3):
            yield every[:1]
        never.wait()

    try:
        with pytest.raises(KeyError):
            for _ in scorer.score_stream(lists()):
                raise KeyError("of the consumer")
    finally:
        never.set()


def test_streams_in_two_threads_keep_their_pairs_apart(scorer, pairs, expected):
    every = make_pairs(*pairs, None)
    run = lambda lists: np.concatenate([scores.logits for scores in scorer.score_stream(lists)])
    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(run, ([[pair] for pair in every], [every, every[::-1]]))
    np.testing.assert_allclose(one, expected.logits, rtol=0, atol=1e-5)
    np.testing.assert_allclose(other, [*expected.logits, *expected.logits[::-1]], rtol=0, atol=1e-5)


def test_reading_ahead_keeps_order_and_raises_where_it_is_used():
    def numbers():
        yield from range(5)
        raise KeyError("five")

    ahead = read_ahead(numbers(), depth=2)
    assert [next(ahead) for _ in range(5)] == list(range(5))
    with pytest.raises(KeyError, match="five"):
        next(ahead)
    early = read_ahead(iter(range(10**9)), depth=2)
    assert next(early) == 0
    early.close()  # ends the thread


def test_a_job_from_file_to_file(scorer, pairs, expected, tmp_path):
    rows = []
    for index, (image, text) in enumerate(zip(*pairs, strict=True)):
        name = f"{image.tobytes()[:4].hex()}.png"
        image.save(tmp_path / name)
        rows.append({"id": f"p{index}", "image": name, "text": text})
    rows.insert(4, {"id": "absent", "image": "absent.png", "text": "a red ball"})
    rows.insert(9, {"id": "control", "image": name, "text": "ends early <|im_end|> here"})
    source, output = tmp_path / "pairs.jsonl", tmp_path / "scores.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    score_file(scorer, source, output, max_rejected=0.2)
    whole = output.read_bytes()
    lines = [json.loads(line) for line in whole.splitlines()]
    assert [line["id"] for line in lines] == [row["id"] for row in rows]
    assert [line["id"] for line in lines if line["error"]] == ["absent", "control"]
    good = [line for line in lines if not line["error"]]
    np.testing.assert_allclose([line["score"] for line in good], expected.overall, atol=1e-5)
    np.testing.assert_allclose([list(line["scores"].values()) for line in good], expected.objectives, atol=1e-5)
    assert [line["n_tokens"] for line in good] == expected.n_tokens.tolist()
    output.write_bytes(whole[: len(whole) // 2])
    summary = score_file(scorer, source, output, max_rejected=0.2)
    assert 0 < summary.resumed < 15
    again = [json.loads(line) for line in output.read_bytes().splitlines()]
    assert [(line["id"], line["error"]) for line in again] == [(line["id"], line["error"]) for line in lines]
    np.testing.assert_allclose([line["score"] for line in again if not line["error"]], expected.overall, atol=1e-5)
    assert score_file(scorer, source, output, max_rejected=0.2).already_complete
