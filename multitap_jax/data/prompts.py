"""Prompts: a record's text (and request) -> prefix tokens and text tokens, split where the split is exact.

The official prompts (kaist-cvml/MULTI-TAP, the behaviour only) put the image before the text that is judged, so all
texts of one image share everything up to the text: the prefix. Prefix and text are tokenised apart. That is exact
because the split follows a control token, and tokenizers never merge across one (Qwen2-VL's format, for example):

    <|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nDescribe this image.<|im_end|>\n
    <|im_start|>assistant\n<|vision_start|><|image_pad|><|vision_end|> | {text}<|im_end|>\n

Variants: `official-train` (above), `official-eval` (one assistant message: request or "Describe this image.", image,
text) and `official-stage2` (as evaluation where the record has a request, as training where it has none). Families
whose chat format `queries` have one user message of the same parts instead, in training without a standard request.
"""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from multitap_jax.data.chat import IMAGE, QWEN2_VL, ChatFormat, Message
from multitap_jax.data.sentencepiece import MODEL, read_sentencepiece
from multitap_jax.parallel.host import hush_transformers

DEFAULT_REQUEST = "Describe this image."
VARIANTS = ("official-train", "official-eval", "official-stage2")
_TEXT = "\0"  # stands for the judged text while a prompt is rendered; no text may hold it


class PromptError(ValueError):
    """A text that cannot be scored as it is; the message says why and what to do."""


class Encoded(NamedTuple):
    """Token ids of a pair: `prefix` int32[p], one placeholder an image; `text` int32[t], closing tokens included."""

    prefix: np.ndarray
    text: np.ndarray


def check_variant(variant: str) -> None:
    """Raises PromptError for an unknown variant."""
    if variant not in VARIANTS:
        raise PromptError(f"unknown prompt variant {variant!r}; the variants are {', '.join(VARIANTS)}")


def render_official(chat: ChatFormat, variant: str, request: str | None, num_images: int, text: str) -> str:
    """A prompt of one of `VARIANTS`."""
    images = [IMAGE] * num_images
    trained = variant == "official-train" or (variant == "official-stage2" and request is None)
    if chat.queries:
        asked = request or ("" if trained else f"{DEFAULT_REQUEST} ")
        return chat.render([("user", [asked, *images, text])]) + chat.asking
    messages: list[Message] = [("assistant", [request or DEFAULT_REQUEST, *images, text])]
    if trained:
        messages = [("user", [request or DEFAULT_REQUEST]), ("assistant", [*images, text])]
    return chat.render(messages)


def official_text(chat: ChatFormat, text: str) -> str:
    """A text as the official code puts it into its prompts: stripped and without quotes, or as it is."""
    return text if chat.queries else text.strip().replace('"', " ")


class SupportsEncode(Protocol):
    """What packing needs of a `Prompter`."""

    closing: np.ndarray

    def encode(
        self, texts: Sequence[str], requests: Sequence[str | None], num_images: Sequence[int]
    ) -> "list[Encoded | PromptError]":
        """Prefix and text of each pair, or why it has none."""

    def shorten(self, text: np.ndarray, room: int) -> np.ndarray:
        """A text cut to `room` tokens."""


def control_tokens(tokenizer: Any) -> list[str]:
    """The tokens that no text may spell, the longest first; symbols that are text (`read_sentencepiece`) are none."""
    return sorted(set(tokenizer.get_added_vocab()) - getattr(tokenizer, "symbols", set()), key=len, reverse=True)


def check_text(text: str, what: str, control: Sequence[str]) -> None:
    """Raises PromptError where a text cannot be encoded, or spells one of the control tokens."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PromptError(f"the {what} is no valid Unicode: {error}") from None
    for token in control:
        if token in text:
            raise PromptError(f"the {what} contains the control token {token!r}; remove it from the {what}")


def load_tokenizer(folder: str | Path) -> Any:
    """The tokenizer of a local model folder; nothing is fetched and no remote code runs.

    Raises:
      FileNotFoundError: if the folder holds no tokenizer.
      FolderError: see `read_sentencepiece`.
    """
    hush_transformers()
    from transformers import AutoTokenizer

    folder = Path(folder)
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        if (folder / MODEL).is_file():
            return read_sentencepiece(folder)
        raise FileNotFoundError(
            f"{folder}: no tokenizer here (tokenizer.json, vocab.json with merges.txt, or {MODEL}); "
            "copy the tokenizer files of the backbone into the folder"
        )
    return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)


class Prompter:
    """Turns texts into token ids for one tokenizer and one prompt variant.

    Args:
      tokenizer: a fast Hugging Face tokenizer.
      variant: one of `VARIANTS`.
      chat: the family's chat format.

    Attributes:
      placeholder_id: id of the image placeholder.
      closing: ids of what follows every text, where it begins with a control token; else none.
    """

    def __init__(self, tokenizer: Any, variant: str, chat: ChatFormat = QWEN2_VL):
        check_variant(variant)
        self.variant = variant
        self._tokenizer, self._chat = tokenizer, chat
        self._control = control_tokens(tokenizer)
        self.placeholder_id = int(tokenizer.convert_tokens_to_ids(chat.placeholder))
        _, after = self._rendered(None, 1)
        apart = any(after.startswith(token) for token in self._control)
        self.closing = self._ids([after])[0] if apart else np.zeros(0, np.int32)
        self._tail = "" if apart else after
        self._opening = np.asarray(tokenizer("")["input_ids"] if chat.opened else [], np.int32)
        self._prefix = lru_cache(maxsize=4096)(self._encode_prefix)

    def _ids(self, texts: Sequence[str]) -> list[np.ndarray]:
        rows = self._tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        return [np.asarray(row, np.int32) for row in rows]

    def _rendered(self, request: str | None, num_images: int) -> tuple[str, str]:
        """What stands before the judged text, and what after it."""
        before, _, after = render_official(self._chat, self.variant, request, num_images, _TEXT).partition(_TEXT)
        return before, after

    def _encode_prefix(self, request: str | None, num_images: int) -> tuple[np.ndarray, str, int]:
        """Prefix ids; what has to be tokenised with the text: the prefix's last token and what follows it; whether
        there is such a token (1) or the text follows nothing but what the tokenizer itself opens with (0).
        """
        before, _ = self._rendered(request, num_images)
        ends = [(before.rindex(token) + len(token), token) for token in self._control if token in before]
        cut, last = max(ends, key=lambda end: (end[0], len(end[1])), default=(0, ""))
        return np.concatenate([self._opening, self._ids([before[:cut]])[0]]), last + before[cut:], min(cut, 1)

    def _clean(self, text: str, what: str) -> str:
        check_text(text, what, (*self._control, *self._chat.reserved, _TEXT))
        return text

    def encode(
        self, texts: Sequence[str], requests: Sequence[str | None], num_images: Sequence[int]
    ) -> list[Encoded | PromptError]:
        """Tokenises many pairs at once; a pair that cannot be scored comes back as its error, in its place.

        Args:
          texts: the texts that are judged, which `official_text` prepares.
          requests: what the image was asked about, or None.
          num_images: images of each record, placed before the text.
        """
        prepared: list[tuple[np.ndarray, str, int] | PromptError] = []
        for text, request, images in zip(texts, requests, num_images, strict=True):
            try:
                clean = official_text(self._chat, self._clean(text, "text"))
                if not clean.strip():
                    raise PromptError("the text is empty")
                if request is not None:
                    self._clean(request, "request")
                prefix, carried, repeated = self._prefix(request, images)
                prepared.append((prefix, carried + clean + self._tail, repeated))
            except PromptError as error:
                prepared.append(error)
        ids = iter(self._ids([p[1] for p in prepared if not isinstance(p, PromptError)] or [""]))

        def encoded(prefix: np.ndarray, repeated: int) -> Encoded:
            # The prefix's last token was tokenised again in front of the text, so that blanks fall as they do there.
            return Encoded(prefix, np.concatenate([next(ids)[repeated:], self.closing]))

        return [p if isinstance(p, PromptError) else encoded(p[0], p[2]) for p in prepared]

    def shorten(self, text: np.ndarray, room: int) -> np.ndarray:
        """Cuts the tail of `text` to `room` tokens; its closing tokens stay, so the same kind of token is pooled."""
        closing = text[-1:] if self._tail else self.closing
        return np.concatenate([text[: max(room - len(closing), 0)], closing])
