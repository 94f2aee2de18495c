"""What the rivals ask: a user's message of image and question, and the opening of the answer.

Each prompt is tokenised whole, as its model would get it. What prompts of one image begin with alike, token by token,
becomes the prefix that they share in a packed row: so the rivals, too, look at an image once. Sources and differences
from them: docs/baselines.md.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from multitap_jax.data.chat import IMAGE, ChatFormat
from multitap_jax.data.prompts import DEFAULT_REQUEST, Encoded, PromptError, check_text, control_tokens

# LLaVA-Critic (arXiv 2410.02712), its pointwise prompt to the letter.
VERDICT = (
    "Given an image and a corresponding question, please serve as an unbiased and fair judge to evaluate the quality "
    "of answer answers provided by a Large Multimodal Model (LMM). Score the response out of 100 and explain your "
    "reasoning with specific details. Your task is provided as follows:\nQuestion: [{request}]\n"
    "The LMM response: [{text}]\nASSISTANT:\n "
)
# VQAScore (arXiv 2404.01291).
YES_NO = 'Does this figure show "{text}"? Please answer yes or no.'
# After G-VEval (arXiv 2412.13647), in our words, for one token instead of a written chain of thought.
NUMBER = (
    "Request: {request}\nResponse: {text}\nHow well does the response fit the image and the request? Answer with one "
    "whole number from {lowest} (not at all) to {highest} (perfectly), and nothing else."
)
# After VisionReward (arXiv 2412.21059). The question comes last, so that all of a text share what is before it.
CHECK = "Request: {request}\nResponse: {text}\nQuestion: {question} Answer yes or no."


def fill(template: str, text: str, request: str | None, **others: Any) -> str:
    """The body of a prompt, empty where the text is; a text may hold braces, but nothing in it is filled in."""
    text = text.strip()
    return template.format(text=text, request=request or DEFAULT_REQUEST, **others) if text else ""


class JudgePrompter:
    """Turns bodies of prompts into token ids; what packing needs of a prompter.

    Args:
      tokenizer: a fast Hugging Face tokenizer.
      chat: the family's chat format.

    Attributes:
      closing: nothing: a prompt is not cut.
    """

    def __init__(self, tokenizer: Any, chat: ChatFormat):
        self.closing = np.zeros(0, np.int32)
        self._tokenizer, self._chat = tokenizer, chat
        self._control = control_tokens(tokenizer)

    def encode(
        self, texts: Sequence[str], requests: Sequence[str | None], num_images: Sequence[int]
    ) -> list[Encoded | PromptError]:
        """Tokenises prompts and splits them where those that belong together begin to differ.

        Args:
          texts: bodies of prompts, from `fill`.
          requests: any label; prompts of one label and number of images get one prefix.
          num_images: images of each prompt, in front of its body.
        """
        rendered: list[str] = []
        errors: dict[int, PromptError] = {}
        for index, (body, count) in enumerate(zip(texts, num_images, strict=True)):
            try:
                if not body:
                    raise PromptError("the text is empty")
                check_text(body, "prompt", (*self._control, *self._chat.reserved))
            except PromptError as error:
                errors[index] = error
            rendered.append("" if index in errors else self.render(body, count))
        rows = [np.asarray(row, np.int32) for row in self._ids(rendered)]
        families: dict[Any, list[int]] = {}
        for index, label in enumerate(zip(requests, num_images, strict=True)):
            if index not in errors:
                families.setdefault(label, []).append(index)
        split: dict[int, int] = {}
        for members in families.values():
            shared = common_length([rows[index] for index in members])
            split |= dict.fromkeys(members, shared)
        encoded = lambda index: Encoded(rows[index][: split[index]], rows[index][split[index] :])
        return [errors.get(index) or encoded(index) for index in range(len(rows))]

    def render(self, body: str, num_images: int) -> str:
        """The conversation with its open answer, as the family's chat template has it."""
        return self._chat.render([("user", [*[IMAGE] * num_images, body])]) + self._chat.asking

    def shorten(self, text: np.ndarray, room: int) -> np.ndarray:
        """Never asked for: a prompt that is cut asks something else."""
        raise NotImplementedError("a prompt is not cut")

    def answer_token(self, word: str) -> int:
        """The token that an answer of one word begins, and ends, with.

        Raises:
          PromptError: the tokenizer writes the word in several tokens.
        """
        asking = self._chat.asking
        gap = "" if asking[-1:].isspace() else " "
        opening, whole = self._ids([asking, f"{asking}{gap}{word}"])
        if whole[:-1] != opening:
            raise PromptError(
                f"the tokenizer writes the answer {word!r} in {len(whole) - len(opening)} tokens, but its probability "
                "is that of one token; ask for other answers"
            )
        return int(whole[-1])

    def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
        """What tokens spell, without control tokens."""
        return str(self._tokenizer.decode([int(token) for token in tokens], skip_special_tokens=True))

    def _ids(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        return list(self._tokenizer(texts, add_special_tokens=self._chat.opened)["input_ids"])


def common_length(rows: Sequence[np.ndarray]) -> int:
    """Tokens that all rows begin with alike, at least one of each left over for itself."""
    shortest = min(map(len, rows)) - 1
    heads = np.stack([row[:shortest] for row in rows])
    differ = np.flatnonzero((heads != heads[:1]).any(axis=0))
    return int(differ[0]) if len(differ) else shortest
