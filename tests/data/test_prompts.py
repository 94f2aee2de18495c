"""Prompts equal what the official procedure tokenises in one piece, and the split is exact."""

import numpy as np
import pytest

from multitap_jax.data.prompts import VARIANTS, Encoded, Prompter, PromptError, load_tokenizer
from tests.tiny_tokenizer import tiny_tokenizer

IMAGE = {"type": "image"}


def text(value):
    return {"type": "text", "text": value}


def official(variant, caption, request, images):
    """The conversation that the official code renders (behaviour: reference/paper.md section 2.2)."""
    caption = caption.strip().replace('"', " ")
    if variant == "official-train" or (variant == "official-stage2" and request is None):
        return [
            {"role": "user", "content": [text(request or "Describe this image.")]},
            {"role": "assistant", "content": [IMAGE] * images + [text(caption)]},
        ]
    content = [text(request or "Describe this image."), *[IMAGE] * images, text(caption)]
    return [{"role": "assistant", "content": content}]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("request_text", [None, "Which way is safe?"])
@pytest.mark.parametrize("images", [0, 1, 2])
@pytest.mark.parametrize(
    "caption", ["a red ball", ' "quoted" and  spaced ', "\n\nnewlines\nfirst", "ünïcödé 漢字 🙂", "!!! ...", "42 it's"]
)
def test_prefix_and_text_are_the_chat_template_cut_in_two(variant, request_text, images, caption):
    tokenizer = tiny_tokenizer()
    (encoded,) = Prompter(tokenizer, variant).encode([caption], [request_text], [images])
    rendered = tokenizer.apply_chat_template(official(variant, caption, request_text, images), tokenize=False)
    whole = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    assert isinstance(encoded, Encoded)
    assert [*encoded.prefix, *encoded.text] == whole


def test_texts_of_one_request_share_their_prefix():
    prompter = Prompter(tiny_tokenizer(), "official-train")
    first, second = prompter.encode(["a ball", "a box"], [None, None], [1, 1])
    np.testing.assert_array_equal(first.prefix, second.prefix)
    assert (first.prefix == prompter.placeholder_id).sum() == 1
    assert first.text[-len(prompter.closing) :].tolist() == prompter.closing.tolist()


@pytest.mark.parametrize(
    ("caption", "message"),
    [("   ", "empty"), ('""', "empty"), ("a <|im_end|> b", "control token"), ("<|image_pad|>", "control token")],
)
def test_texts_that_cannot_be_scored_say_why_and_leave_the_others_alone(caption, message):
    good, bad, after = Prompter(tiny_tokenizer(), "official-eval").encode(["a", caption, "b"], [None] * 3, [1] * 3)
    assert isinstance(bad, PromptError)
    assert message in str(bad)
    assert isinstance(good, Encoded)
    assert isinstance(after, Encoded)


def test_a_request_with_a_control_token_is_refused():
    (bad,) = Prompter(tiny_tokenizer(), "official-eval").encode(["a"], ["<|im_start|>system"], [1])
    assert "request" in str(bad)


def test_shortening_keeps_the_closing_tokens():
    prompter = Prompter(tiny_tokenizer(), "official-train")
    (encoded,) = prompter.encode(["one two three four five six seven"], [None], [1])
    short = prompter.shorten(encoded.text, 6)
    assert len(short) == 6
    np.testing.assert_array_equal(short[: 6 - len(prompter.closing)], encoded.text[: 6 - len(prompter.closing)])
    np.testing.assert_array_equal(short[-len(prompter.closing) :], prompter.closing)


def test_unknown_names_are_refused_at_once():
    with pytest.raises(PromptError, match="official-train"):
        Prompter(tiny_tokenizer(), "offical-train")


def test_a_folder_without_tokenizer_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)
