"""The tokenizer of a `tokenizer.model` (sentencepiece, arXiv 1808.06226), read as data: no code of the folder runs.

Byte-pair encoding without normalisation, with bytes for what the vocabulary lacks, as InternLM2 has it. The model's
pieces become a tokenizer of the `tokenizers` library: two symbols merge in the order of the score of what they make.
sentencepiece cuts a text at user-defined pieces first; so they are added tokens here, which do the same. The two
agree on every line of this repository, and on made-up ones (docs/parity.md).
"""

import re
from pathlib import Path
from typing import Any

from multitap_jax.parallel.host import hush_transformers
from multitap_jax.weights.files import read_json
from multitap_jax.weights.stored import FolderError

MODEL = "tokenizer.model"
BESIDE = ("tokenizer_config.json", "added_tokens.json")
NAMED = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}  # where no file says so
BLANK = "▁"
BPE = 2  # TrainerSpec.ModelType
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # SentencePiece.Type
# A user-defined piece that is a name, such as [UNUSED_TOKEN_145]; others, such as "——", are text.
NAME = re.compile(r"\[.+\]|<.+>")


def read_sentencepiece(folder: Path) -> Any:
    """The tokenizer of a folder with a `tokenizer.model`, as transformers' fast ones; BOS is put in front as published.

    Its attribute `symbols` holds the added tokens that are text rather than names: texts may spell them.

    Raises:
      FolderError: the file is none, or asks for something that is not implemented: all of it is listed.
    """
    hush_transformers()
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
    from transformers import PreTrainedTokenizerFast

    path = folder / MODEL
    model, settings = _parse(path), _settings(folder)
    pieces = [(piece.piece, piece.score, piece.type) for piece in model.pieces]
    vocab = {piece: number for number, (piece, _, _) in enumerate(pieces)}
    if problems := [*_problems(model), *_setting_problems(settings, vocab)]:
        raise FolderError(f"{path}: this tokenizer is not implemented:\n  " + "\n  ".join(problems))
    core = Tokenizer(models.BPE(vocab, merges(pieces), byte_fallback=True, fuse_unk=True, unk_token=pieces[0][0]))
    core.normalizer = normalizers.Replace(" ", BLANK)
    core.decoder = decoders.Sequence([decoders.Replace(BLANK, " "), decoders.ByteFallback(), decoders.Fuse()])
    own = [piece for piece, _, kind in pieces if kind in (UNKNOWN, CONTROL, USER_DEFINED)]
    symbols = {piece for piece, _, kind in pieces if kind == USER_DEFINED and not NAME.fullmatch(piece)}
    later = [content for _, content in sorted(settings["added"].items()) if content not in vocab]
    core.add_tokens([AddedToken(token, special=token not in symbols, normalized=False) for token in own])
    core.add_tokens([AddedToken(token, special=True, normalized=False) for token in later])
    bos = settings["bos_token"]
    core.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, vocab[bos])])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **{name: settings[name] for name in NAMED})
    tokenizer.symbols = symbols
    return tokenizer


def merges(pieces: list[tuple[str, float, int]]) -> list[tuple[str, str]]:
    """The pairs that merge, in the order in which they do: by the score of what they make, the best first.

    Args:
      pieces: spelling, score and type of each.
    """
    number = {piece: place for place, (piece, _, kind) in enumerate(pieces) if kind == NORMAL}
    pairs = [
        (-pieces[place][1], number[piece[:cut]], number[piece[cut:]])
        for piece, place in number.items()
        for cut in range(1, len(piece))
        if piece[:cut] in number and piece[cut:] in number
    ]
    return [(pieces[left][0], pieces[right][0]) for _, left, right in sorted(pairs)]


def _parse(path: Path) -> Any:
    from google.protobuf.message import DecodeError
    from transformers.convert_slow_tokenizer import import_protobuf

    model = import_protobuf().ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
    except DecodeError as error:
        raise FolderError(f"{path} is no sentencepiece model ({error}); fetch or copy it again") from error
    if not model.pieces:
        raise FolderError(f"{path} is no sentencepiece model (it has no pieces); fetch or copy it again")
    return model


def _problems(model: Any) -> list[str]:
    """What the model asks for and is not implemented."""
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    kinds = [piece.type for piece in model.pieces]
    spelled = {piece.piece for piece in model.pieces}
    plain = {piece.piece for piece in model.pieces if piece.type == NORMAL}
    lost = sorted({sign for piece in plain for sign in piece} - plain)
    wrong = {
        "its model type is not BPE": trainer.model_type != BPE,
        "byte_fallback is off": not trainer.byte_fallback or kinds.count(BYTE) != 256,
        "it normalises texts": bool(normalizer.precompiled_charsmap),
        "add_dummy_prefix puts a blank before texts": normalizer.add_dummy_prefix,
        "remove_extra_whitespaces changes blanks": normalizer.remove_extra_whitespaces,
        "escape_whitespaces is off": not normalizer.escape_whitespaces,
        "treat_whitespace_as_suffix is on": trainer.treat_whitespace_as_suffix,
        "the unknown piece is not the first": kinds[0] != UNKNOWN,
        "it has unused pieces": UNUSED in kinds,
        "pieces are spelled alike": len(spelled) != len(kinds),
        f"{len(lost)} signs of pieces are no pieces, such as {lost[:3]}": bool(lost),
    }
    return [problem for problem, found in wrong.items() if found]


def _settings(folder: Path) -> dict[str, Any]:
    """Entries of tokenizer_config.json and added_tokens.json, or what their absence means."""
    config, added = (read_json(path) if path.is_file() else {} for path in (folder / name for name in BESIDE))
    content = lambda token: str(token["content"] if isinstance(token, dict) else token)
    try:
        found: dict[str, Any] = {name: content(config.get(name) or default) for name, default in NAMED.items()}
        tokens = {int(number): content(token) for token, number in added.items()}
        tokens |= {int(number): content(token) for number, token in config.get("added_tokens_decoder", {}).items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise FolderError(f"{folder}: {' or '.join(BESIDE)} has tokens in no known form ({error!r})") from error
    flags = {name: config.get(name, default) for name, default in (("add_bos_token", True), ("add_eos_token", False))}
    return {**found, **flags, "added": tokens}


def _setting_problems(settings: dict[str, Any], vocab: dict[str, int]) -> list[str]:
    """What the files beside the model ask for and is not implemented."""
    problems = [f"{name} = {settings[name]!r} is none of its pieces" for name in NAMED if settings[name] not in vocab]
    if settings["add_bos_token"] is not True or settings["add_eos_token"] is not False:
        problems.append("only add_bos_token = true, add_eos_token = false is")
    behind = [content for _, content in sorted(settings["added"].items()) if content not in vocab]
    numbers = [number for number, content in settings["added"].items() if content not in vocab]
    if sorted(numbers) != list(range(len(vocab), len(vocab) + len(behind))):
        problems.append(f"added tokens {behind} do not follow its {len(vocab)} pieces")
    moved = [content for number, content in settings["added"].items() if vocab.get(content, number) != number]
    return problems + [f"the added token {content!r} is a piece of another number" for content in moved]
