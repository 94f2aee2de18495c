"""Prompts: a record's text (and request) -> prefix tokens and text tokens, split where the split is exact.

The official prompts (kaist-cvml/MULTI-TAP, the behaviour only) put the image before the text that is judged, so all
texts of one image share everything up to the text: the prefix. Prefix and text are tokenised apart. That is exact
because the split follows a special token, and tokenizers never merge across one:

    <|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nDescribe this image.<|im_end|>\n
    <|im_start|>assistant\n<|vision_start|><|image_pad|><|vision_end|> | {text}<|im_end|>\n

Variants: `official-train` (above), `official-eval` (one assistant message: request or "Describe this image.", image,
text) and `official-stage2` (as evaluation where the record has a request, as training where it has none).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

DEFAULT_REQUEST = "Describe this image."
VARIANTS = ("official-train", "official-eval", "official-stage2")


class PromptError(ValueError):
    """A text that cannot be scored as it is; the message says why and what to do."""


@dataclass(frozen=True)
class ChatFormat:
    """The pieces of a model family's chat template.

    Attributes:
      system: the whole system turn, which the stock template adds where the conversation has none.
      turn: what opens a turn, with `{role}`.
      close: what ends a turn; its last token is the one that is pooled.
      image: what stands for one image; holds `placeholder` exactly once.
      placeholder: the token that is repeated for every merged vision cell.
      split: the special token after which a text-only prompt is split.
    """

    system: str
    turn: str
    close: str
    image: str
    placeholder: str
    split: str


QWEN2_VL = ChatFormat(
    system="<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n",
    turn="<|im_start|>{role}\n",
    close="<|im_end|>\n",
    image="<|vision_start|><|image_pad|><|vision_end|>",
    placeholder="<|image_pad|>",
    split="<|im_start|>",
)
FORMATS = {"qwen2_vl": QWEN2_VL}


class Encoded(NamedTuple):
    """Token ids of a pair: `prefix` int32[p], one placeholder an image; `text` int32[t], closing tokens included."""

    prefix: np.ndarray
    text: np.ndarray


def render(fmt: ChatFormat, variant: str, request: str | None, num_images: int) -> tuple[str, str]:
    """The prompt around a text: (before, after). `before` ends where the text begins."""
    if variant not in VARIANTS:
        raise PromptError(f"unknown prompt variant {variant!r}; the variants are {', '.join(VARIANTS)}")
    images = fmt.image * num_images
    if variant == "official-train" or (variant == "official-stage2" and request is None):
        user = fmt.turn.format(role="user") + (request or DEFAULT_REQUEST) + fmt.close
        return fmt.system + user + fmt.turn.format(role="assistant") + images, fmt.close
    return fmt.system + fmt.turn.format(role="assistant") + (request or DEFAULT_REQUEST) + images, fmt.close


def load_tokenizer(folder: str | Path) -> Any:
    """The tokenizer of a local model folder; nothing is fetched and no remote code runs.

    Raises:
      FileNotFoundError: if the folder holds no tokenizer.
    """
    from transformers import AutoTokenizer

    folder = Path(folder)
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        raise FileNotFoundError(
            f"{folder}: no tokenizer here (tokenizer.json or vocab.json with merges.txt); "
            "copy the tokenizer files of the backbone into the folder"
        )
    return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)


class Prompter:
    """Turns texts into token ids for one tokenizer and one prompt variant.

    Args:
      tokenizer: a fast Hugging Face tokenizer.
      variant: one of `VARIANTS`.
      model_type: picks the chat format, as `config.json` spells it.
    """

    def __init__(self, tokenizer: Any, variant: str, model_type: str = "qwen2_vl"):
        if model_type not in FORMATS:
            raise PromptError(f"no chat format for model_type {model_type!r}; known: {', '.join(FORMATS)}")
        self.variant = variant
        self._tokenizer = tokenizer
        self._format = FORMATS[model_type]
        render(self._format, variant, None, 1)  # refuses an unknown variant here, not at the first record
        self._control = sorted(set(tokenizer.get_added_vocab()), key=len, reverse=True)
        self.placeholder_id = int(tokenizer.convert_tokens_to_ids(self._format.placeholder))
        self.closing = self._ids([self._format.close])[0]
        self._prefix = lru_cache(maxsize=4096)(self._encode_prefix)

    def _ids(self, texts: Sequence[str]) -> list[np.ndarray]:
        rows = self._tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        return [np.asarray(row, np.int32) for row in rows]

    def _encode_prefix(self, request: str | None, num_images: int) -> tuple[np.ndarray, str]:
        """Prefix ids, and the piece of the turn that has to be tokenised with the text (empty after an image)."""
        before, _ = render(self._format, self.variant, request, num_images)
        carried = ""
        if not before.endswith(self._format.image) or num_images == 0:
            cut = before.rindex(self._format.split) + len(self._format.split)
            before, carried = before[:cut], before[cut:]
        return self._ids([before])[0], carried

    def _clean(self, text: str, what: str) -> str:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise PromptError(f"the {what} is no valid Unicode: {error}") from None
        for token in self._control:
            if token in text:
                raise PromptError(f"the {what} contains the control token {token!r}; remove it from the {what}")
        return text

    def encode(
        self, texts: Sequence[str], requests: Sequence[str | None], num_images: Sequence[int]
    ) -> list[Encoded | PromptError]:
        """Tokenises many pairs at once; a pair that cannot be scored comes back as its error, in its place.

        Args:
          texts: the texts that are judged; stripped, and quotes replaced by blanks, as the official code does.
          requests: what the image was asked about, or None.
          num_images: images of each record, placed before the text.
        """
        prepared: list[tuple[np.ndarray, str] | PromptError] = []
        for text, request, images in zip(texts, requests, num_images, strict=True):
            try:
                clean = self._clean(text, "text").strip().replace('"', " ")
                if not clean.strip():
                    raise PromptError("the text is empty")
                if request is not None:
                    self._clean(request, "request")
                prefix, carried = self._prefix(request, images)
                prepared.append((prefix, carried + clean))
            except PromptError as error:
                prepared.append(error)
        ids = iter(self._ids([p[1] for p in prepared if not isinstance(p, PromptError)] or [""]))
        return [
            p if isinstance(p, PromptError) else Encoded(p[0], np.concatenate([next(ids), self.closing]))
            for p in prepared
        ]

    def shorten(self, text: np.ndarray, room: int) -> np.ndarray:
        """Cuts the tail of `text` to `room` tokens; its closing tokens stay, so the same kind of token is pooled."""
        return np.concatenate([text[: max(room - len(self.closing), 0)], self.closing])
