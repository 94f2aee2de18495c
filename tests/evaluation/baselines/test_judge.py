"""`Judge` against transformers, which gets each prompt alone, and against itself in other company."""

import functools
import importlib
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from multitap_jax.data.prompts import PromptError
from multitap_jax.demo.checkpoint import train_tokenizer
from multitap_jax.evaluation.baselines import Checklist, Judge, Question
from multitap_jax.evaluation.baselines.judge import stop_tokens
from multitap_jax.evaluation.baselines.prompts import CHECK, NUMBER, VERDICT, YES_NO, JudgePrompter, fill
from multitap_jax.families import settle
from tests.families.common import picture
from tests.families.qwen2_vl import POLICY, qwen_oracle, token_ids
from tests.tiny_qwen2_vl import tiny_config
from tests.tiny_tokenizer import CORPUS

WIDE, SMALL = picture(84, 56), picture(56, 56)
IMAGES = [WIDE, WIDE, SMALL, WIDE]
TEXTS = ["a red ball", 'the "blue" box is {far} away', "a ball", "on your left"]
REQUESTS = [None, None, "Which way is safe?", "Which way is safe?"]
NEW = 6
TOLERANCE = 1e-4
FAMILIES = {
    "qwen2_vl": {"image_policy": POLICY},
    "qwen2_5_vl": {"image_policy": POLICY},
    "qwen3_vl": {"image_policy": "native:4096:36864"},
    "llava": {"image_policy": "crop:56"},
    "llava_onevision": {"image_policy": "anyres:16"},
}


@functools.lru_cache
def tokenizer():
    """One that knows the answers as single tokens, as those of published models do."""
    answers = ["Yes", "yes", "No", "no", " Yes", " No", *"0123456789"]
    return train_tokenizer([*CORPUS, *answers * 9])


def oracle():
    config = tiny_config(**token_ids(tokenizer()))
    return qwen_oracle(config, "Qwen2VLForConditionalGeneration", "Qwen2VLConfig", tokenizer())


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder, and transformers' model of it."""
    folder = tmp_path_factory.mktemp("model")
    return folder, oracle().write(folder)


@pytest.fixture(scope="module")
def judge(saved):
    return Judge.from_pretrained(saved[0], image_policy=POLICY)


def torch_inputs(found, body: str, image: Image.Image) -> dict:
    """What transformers gets for one prompt: its own chat template, its own processor."""
    import torch

    content = [{"type": "image"}, {"type": "text", "text": body}]
    messages = [{"role": "user", "content": content}]
    rendered = found.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    inputs = found.inputs(found.tokenizer, rendered, [image])
    return {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in inputs.items()}


def torch_chances(saved, body: str, image: Image.Image) -> np.ndarray:
    """float64[vocab]: probabilities of the first token of the answer."""
    import torch

    with torch.no_grad():
        logits = saved[1](**torch_inputs(oracle(), body, image)).logits[0, -1].double()
    return torch.softmax(logits, dim=-1).numpy()


@pytest.mark.parametrize("family", FAMILIES)
def test_verdicts_are_those_of_transformers(family, tmp_path):
    found = importlib.import_module(f"tests.families.{family}").oracle()
    model = found.write(tmp_path)
    judge = Judge.from_pretrained(tmp_path, **FAMILIES[family])
    got = judge.verdicts(images=IMAGES, texts=TEXTS, requests=REQUESTS, max_new_tokens=NEW)
    assert got.errors == [None] * len(TEXTS)
    for index, (image, text, request) in enumerate(zip(IMAGES, TEXTS, REQUESTS, strict=True)):
        inputs = torch_inputs(found, fill(VERDICT, text, request), image)
        prompt = inputs["input_ids"].shape[1]
        options = {"do_sample": False, "max_new_tokens": NEW, "eos_token_id": list(judge.stop), "pad_token_id": 0}
        tokens = model.generate(**inputs, **options)[0, prompt:].tolist()
        ended = [token in judge.stop for token in tokens]
        tokens = tokens[: ended.index(True)] if True in ended else tokens
        assert got.texts[index] == found.tokenizer.decode(tokens, skip_special_tokens=True)
        assert (got.n_tokens[index], got.n_written[index]) == (prompt, len(tokens))
        assert got.stopped[index] == (True in ended)


def test_p_yes_is_that_of_the_whole_softmax(saved, judge):
    yes, no = (tokenizer().convert_tokens_to_ids(word) for word in ("Yes", "No"))
    got = judge.p_yes(images=IMAGES, texts=TEXTS, requests=REQUESTS)
    for index, (image, text) in enumerate(zip(IMAGES, TEXTS, strict=True)):
        chances = torch_chances(saved, fill(YES_NO, text, None), image)
        np.testing.assert_allclose([got.p_yes[index], got.p_no[index]], chances[[yes, no]], rtol=TOLERANCE)
    assert got.unparsable == int((got.answer == 0).sum()) > 0  # random weights say anything


def test_the_expected_score_is_that_of_the_whole_softmax(saved, judge):
    numbers = [tokenizer().convert_tokens_to_ids(str(number)) for number in range(10)]
    every, none = (judge.expected_score(images=IMAGES, texts=TEXTS, requests=REQUESTS, top=top) for top in (None, 1))
    for index, (image, text, request) in enumerate(zip(IMAGES, TEXTS, REQUESTS, strict=True)):
        body = fill(NUMBER, text, request, lowest=0, highest=9)
        chances = torch_chances(saved, body, image)
        counted = chances[numbers]
        np.testing.assert_allclose(every.mass[index], counted.sum(), rtol=TOLERANCE)
        np.testing.assert_allclose(every.scores[index], counted @ np.arange(10) / counted.sum(), rtol=TOLERANCE)
        best = int(chances.argmax())
        expected = numbers.index(best) if best in numbers else np.nan
        np.testing.assert_allclose(none.scores[index], expected)
    assert (every.unparsable, none.unparsable) == (0, int(np.isnan(none.scores).sum()))


def test_the_likeliest_tokens_alone_may_count(saved, judge):
    """With few of the vocabulary left out, as with a service that tells the likeliest tokens only."""
    numbers = np.array([tokenizer().convert_tokens_to_ids(str(number)) for number in range(10)])
    top = len(tokenizer()) // 2
    got = judge.expected_score(images=[WIDE], texts=["a ball"], top=top)
    chances = torch_chances(saved, fill(NUMBER, "a ball", None, lowest=0, highest=9), WIDE)
    counted = np.where(np.isin(numbers, np.argsort(-chances)[:top]), chances[numbers], 0)
    assert 0 < (counted > 0).sum() < 10
    np.testing.assert_allclose(got.scores[0], counted @ np.arange(10) / counted.sum(), rtol=TOLERANCE)


def test_a_question_of_a_checklist_is_answered_as_if_asked_alone(saved, judge):
    checklist = Checklist(tuple(Question(f"q{n}", f"Is there {n} ball?", mask=n == 0) for n in range(5)))
    got = judge.checklist(images=IMAGES, texts=TEXTS, requests=REQUESTS, checklist=checklist)
    yes = tokenizer().convert_tokens_to_ids("Yes")
    for index in (1, 2):
        for number, question in enumerate(checklist.questions):
            body = fill(CHECK, TEXTS[index], REQUESTS[index], question=question.text)
            chances = torch_chances(saved, body, IMAGES[index])
            np.testing.assert_allclose(got.p_yes[index, number], chances[yes], rtol=TOLERANCE)
            words = [tokenizer().convert_tokens_to_ids(word) for word in ("Yes", "yes", "No", "no")]
            best = int(chances.argmax())
            assert got.answer[index, number] == (1 if best in words[:2] else -1 if best in words[2:] else 0)
    alone = [
        judge.checklist(images=[i], texts=[t], requests=[r], checklist=checklist)
        for i, t, r in zip(IMAGES, TEXTS, REQUESTS, strict=True)
    ]
    np.testing.assert_allclose(got.p_yes, np.concatenate([one.p_yes for one in alone]), rtol=TOLERANCE)
    np.testing.assert_array_equal(got.answer, np.concatenate([one.answer for one in alone]))
    assert got.n_tokens.tolist() == [int(one.n_tokens[0]) for one in alone]
    assert got.unparsable == sum(one.unparsable for one in alone)
    assert checklist.encode(got.answer).shape == (4, 4)


def test_an_artefact_judges_as_its_base(saved, tmp_path):
    from flax import nnx

    from multitap_jax.data.processing import Contract
    from multitap_jax.reward import RewardHead, RewardModel
    from multitap_jax.scoring.artefact import Artefact
    from multitap_jax.weights.hub import load_backbone

    backbone = load_backbone(saved[0])
    model = RewardModel(backbone, RewardHead(64, rngs=nnx.Rngs(0)))
    Artefact.save(
        tmp_path / "a", model, base=saved[0], contract=Contract(image_policy="square:56", position_mode="flat")
    )
    ours = Judge.from_pretrained(tmp_path / "a").p_yes(images=IMAGES, texts=TEXTS)
    base = Judge.from_pretrained(saved[0], image_policy="square:56", position_mode="flat")
    np.testing.assert_array_equal(ours.p_yes, base.p_yes(images=IMAGES, texts=TEXTS).p_yes)


def test_a_pair_that_cannot_be_asked_has_an_error_in_its_place(judge, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    images = [WIDE, broken, WIDE, WIDE, WIDE]
    texts = ["a ball", "a ball", "a <|im_end|>", "ball " * 5000, " "]
    checklist = Checklist((Question("q", "Is it?"), Question("r", "Or?")))
    found = [
        judge.verdicts(images=images, texts=texts, max_new_tokens=2),
        judge.p_yes(images=images, texts=texts),
        judge.expected_score(images=images, texts=texts, top=None),
        judge.checklist(images=images, texts=texts, checklist=checklist),
    ]
    for one in found:
        assert one.errors[0] is None
        assert "broken.png" in one.errors[1]
        assert "control token '<|im_end|>'" in one.errors[2]
        assert "more than 4096; shorten it, or raise max_length" in one.errors[3]
        assert one.errors[4] == "the text is empty"
        assert one.n_tokens[0] > 0
        assert not one.n_tokens[1:].any()
    assert found[0].texts[1:] == [None] * 4
    for numbers in (found[0].scores, found[1].p_yes, found[2].scores, found[3].p_yes):
        assert np.isnan(numbers[1:]).all()


def test_nan_of_one_pair_is_the_failure_of_that_pair_alone(judge, monkeypatch):
    texts = ["a red ball", "the box is far", "a ball"]
    own = set(tokenizer().encode(fill(VERDICT, texts[1], None)))
    others = {token for n in (0, 2) for token in tokenizer().encode(fill(VERDICT, texts[n], None))}
    arguments = {"images": [WIDE] * 3, "texts": texts, "max_new_tokens": NEW}
    whole = judge.verdicts(**arguments)
    written = {token for text in whole.texts for token in tokenizer().encode(text)}
    backbone, head = jax.tree.map(lambda x: x, judge._model)
    table = backbone.text.embed.embedding
    table[...] = table[...].at[min(own - others - written)].set(jnp.nan)
    monkeypatch.setattr(judge, "_model", (backbone, head))
    found = judge.verdicts(**arguments)
    assert "NaN or infinity" in found.errors[1]
    assert (found.texts[1], found.n_written[1], found.n_tokens[1]) == (None, 0, 0)
    for index in (0, 2):
        assert found.errors[index] is None
        assert found.texts[index] == whole.texts[index]


def test_what_cannot_be_asked_is_refused(judge, saved, tmp_path):
    with pytest.raises(ValueError, match="max_new_tokens = 0"):
        judge.verdicts(images=[WIDE], texts=["a"], max_new_tokens=0)
    with pytest.raises(ValueError, match="ascending"):
        judge.expected_score(images=[WIDE], texts=["a"], numbers=[3, 1])
    with pytest.raises(PromptError, match="'10' in 2 tokens"):
        judge.expected_score(images=[WIDE], texts=["a"], numbers=range(11))
    with pytest.raises(ValueError, match="dtype 'int8'"):
        Judge.from_pretrained(saved[0], dtype="int8")


def test_llama_vision_is_refused(tmp_path):
    mllama = importlib.import_module("tests.families.mllama").oracle()
    folder = mllama.write_without_weights(tmp_path)
    _, config = settle(mllama.config)
    backbone = type("Backbone", (), {"config": config})()
    from multitap_jax.data.processing import Contract

    with pytest.raises(ValueError, match="mllama attends to images outside of its rows"):
        Judge(folder, backbone, None, Contract(position_mode="flat", image_policy="tiles:4"))


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_are_those_of_the_chat_template(family):
    found = importlib.import_module(f"tests.families.{family}").oracle()
    chat = settle(found.config)[0].chat
    prompter = JudgePrompter(found.tokenizer, chat)
    bodies = [fill(VERDICT, text, request) for text, request in zip(TEXTS, REQUESTS, strict=True)]
    content = [{"type": "image"}, {"type": "text", "text": bodies[0]}]
    template = found.tokenizer.apply_chat_template
    expected = template([{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True)
    assert prompter.render(bodies[0], 1) == expected
    encoded = prompter.encode(bodies, REQUESTS, [1] * len(bodies))
    for body, item in zip(bodies, encoded, strict=True):
        ids = found.tokenizer(prompter.render(body, 1), add_special_tokens=chat.opened)["input_ids"]
        assert [*item.prefix, *item.text] == ids
    shared = [item.prefix.tobytes() for item in encoded]
    assert shared[0] == shared[1] != shared[2] == shared[3]
    assert all(len(item.text) < len(item.prefix) for item in encoded)


def test_where_answers_end(tmp_path):
    named = type("Tokenizer", (), {"eos_token_id": 9})()
    assert stop_tokens(tmp_path, named) == (9,)
    write = lambda name, **entries: (Path(tmp_path) / name).write_text(json.dumps(entries))
    write("config.json", text_config={"eos_token_id": 7})
    assert stop_tokens(tmp_path, named) == (7,)
    write("config.json", eos_token_id=6, text_config={"eos_token_id": 7})
    assert stop_tokens(tmp_path, named) == (6,)
    write("generation_config.json", eos_token_id=[4, 5])
    assert stop_tokens(tmp_path, named) == (4, 5)


@pytest.mark.parametrize("template", [VERDICT, YES_NO, NUMBER, CHECK])
def test_the_documentation_has_the_prompts_to_the_letter(template):
    text = (Path(__file__).parents[3] / "docs" / "baselines.md").read_text()
    assert f"```\n{template}\n```\n" in text
