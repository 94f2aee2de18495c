"""A tokenizer.model read as data: the ids of sentencepiece (goldens), and what is refused."""

import json

import pytest
from transformers.convert_slow_tokenizer import import_protobuf

from multitap_jax.data.chat import XCOMPOSER
from multitap_jax.data.prompts import VARIANTS, Encoded, Prompter, PromptError, load_tokenizer
from multitap_jax.data.sentencepiece import merges, read_sentencepiece
from multitap_jax.weights.stored import FolderError
from tests.families.internlm2 import GOLDENS, PAIRS, sentencepiece_model, tokenizer, vocabulary, write_tokenizer

FOUND = json.loads(GOLDENS.read_text(encoding="utf-8"))
PROTO = import_protobuf()


def changed(folder, change):
    """A folder with the tiny tokenizer after `change` of its message."""
    write_tokenizer(folder)
    model = PROTO.ModelProto.FromString(sentencepiece_model())
    change(model)
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())
    return folder


@pytest.mark.parametrize("variant", VARIANTS)
def test_prompts_are_those_of_the_official_code(variant):
    """Its parts before, between and behind pictures, each tokenised apart by sentencepiece; BOS in front."""
    prompter = Prompter(tokenizer(), variant, XCOMPOSER)
    columns = ([pair.text for pair in PAIRS], [pair.request for pair in PAIRS], [len(pair.images) for pair in PAIRS])
    for found, expected in zip(prompter.encode(*columns), FOUND["ids"][variant], strict=True):
        assert isinstance(found, Encoded)
        assert [*found.prefix, *found.text] == expected
    pooled = tokenizer().convert_ids_to_tokens(int(prompter.closing[-1]))
    assert pooled == "\n"  # the last token of "assistant\n"


def test_texts_go_in_as_they_are():
    """Blanks and quotes stay: the official code touches neither for this family."""
    prompter = Prompter(tokenizer(), "official-train", XCOMPOSER)
    (plain, spaced) = prompter.encode(['a "red" ball', ' a "red" ball '], [None] * 2, [1] * 2)
    spelled = tokenizer().decode(plain.text[: -len(prompter.closing)])
    assert spelled == ';a "red" ball'
    assert tokenizer().decode(spaced.text[: -len(prompter.closing)]) == '; a "red" ball '


@pytest.mark.parametrize("name", ["[UNUSED_TOKEN_145]", "<s>", "<unk>", "<|im_end|>", "<ImageHere>"])
def test_a_text_may_not_spell_a_control_token(name):
    (found,) = Prompter(tokenizer(), "official-train", XCOMPOSER).encode([f"a {name} b"], [None], [1])
    assert isinstance(found, PromptError)
    assert f"contains the control token {name!r}" in str(found)


def test_symbols_that_are_text_may_be_spelled():
    """Pieces that sentencepiece cuts a text at, but that are no names; the longest match counts, from the left."""
    (found,) = Prompter(tokenizer(), "official-train", XCOMPOSER).encode(["a———Ｅ…"], [None], [1])
    pieces = tokenizer().convert_ids_to_tokens(found.text.tolist())
    assert pieces[:4] == [";a", "——", "<0xE2>", "<0x80>"]
    assert "Ｅ" in pieces


def test_what_merges_first():
    """By the score of the whole; of equal ones the pair of earlier pieces."""
    pieces = [("a", 0.0, 1), ("b", 0.0, 1), ("ab", -2.0, 1), ("ba", -1.0, 1), ("aba", -1.0, 1), ("<ab>", 0.0, 4)]
    assert merges(pieces) == [("a", "ba"), ("b", "a"), ("ab", "a"), ("a", "b")]


def test_a_folder_with_a_fast_tokenizer_is_read_as_before(tmp_path):
    from tests.tiny_tokenizer import tiny_tokenizer

    tiny_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model())
    assert len(load_tokenizer(tmp_path)) == len(tiny_tokenizer())


def spell_alike(model):
    model.pieces[300].piece = model.pieces[301].piece


def lose_a_sign(model):
    model.pieces.add(piece="漢字", score=-900.0, type=1)


WRONG = {
    "its model type is not BPE": lambda m: setattr(m.trainer_spec, "model_type", 1),
    "byte_fallback is off": lambda m: setattr(m.trainer_spec, "byte_fallback", False),
    "it normalises texts": lambda m: setattr(m.normalizer_spec, "precompiled_charsmap", b"x"),
    "add_dummy_prefix puts a blank": lambda m: setattr(m.normalizer_spec, "add_dummy_prefix", True),
    "remove_extra_whitespaces changes": lambda m: setattr(m.normalizer_spec, "remove_extra_whitespaces", True),
    "escape_whitespaces is off": lambda m: setattr(m.normalizer_spec, "escape_whitespaces", False),
    "treat_whitespace_as_suffix is on": lambda m: setattr(m.trainer_spec, "treat_whitespace_as_suffix", True),
    "the unknown piece is not the first": lambda m: setattr(m.pieces[0], "type", 3),
    "it has unused pieces": lambda m: setattr(m.pieces[300], "type", 5),
    "pieces are spelled alike": spell_alike,
    "2 signs of pieces are no pieces, such as ": lose_a_sign,
}


@pytest.mark.parametrize("message", WRONG)
def test_what_is_not_implemented_is_named(tmp_path, message):
    with pytest.raises(FolderError, match=f"tokenizer.model: this tokenizer is not implemented:(.|\n)*{message}"):
        read_sentencepiece(changed(tmp_path, WRONG[message]))


def test_everything_wrong_is_said_at_once(tmp_path):
    def change(model):
        model.normalizer_spec.add_dummy_prefix = model.normalizer_spec.remove_extra_whitespaces = True

    with pytest.raises(FolderError) as caught:
        read_sentencepiece(changed(tmp_path, change))
    assert len(str(caught.value).splitlines()) == 3


@pytest.mark.parametrize("content", [b"", b"no model", b"\x0a\xff\xff\xff\xff"])
def test_a_broken_file_is_named(tmp_path, content):
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(FolderError, match=r"tokenizer\.model is no sentencepiece model \(.*fetch or copy it again"):
        read_sentencepiece(tmp_path)


SETTINGS = {
    "bos_token = '<bos>' is none of its pieces": {"bos_token": "<bos>"},
    "only add_bos_token = true": {"add_eos_token": True},
    r"added tokens \['<a>'\] do not follow its \d+ pieces": {"added_tokens_decoder": {"900": {"content": "<a>"}}},
    "the added token '<s>' is a piece of another number": {"added_tokens_decoder": {"7": {"content": "<s>"}}},
    r"tokens in no known form \(KeyError": {"bos_token": {"token": "<s>"}},
    r"tokens in no known form \(AttributeError": {"added_tokens_decoder": ["<s>"]},
    r"tokens in no known form \(ValueError": {"added_tokens_decoder": {"one": "<s>"}},
}


@pytest.mark.parametrize("message", SETTINGS)
def test_settings_that_are_not_implemented_are_named(tmp_path, message):
    write_tokenizer(tmp_path)
    (tmp_path / "added_tokens.json").unlink()
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(SETTINGS[message]))
    with pytest.raises(FolderError, match=message):
        read_sentencepiece(tmp_path)


def test_the_model_alone_will_do(tmp_path):
    """Its names are the usual ones; a file beside it may give them as the objects that transformers writes."""
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model())
    alone = load_tokenizer(tmp_path)
    assert (alone.bos_token, alone.eos_token, len(alone)) == ("<s>", "</s>", vocabulary())
    objects = {"bos_token": {"content": "</s>"}, "added_tokens_decoder": {"1": {"content": "<s>"}}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(objects))
    assert load_tokenizer(tmp_path)("a")["input_ids"][0] == 2
