"""Chat formats: how each family writes a conversation down. The pieces are those of the published chat templates."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

IMAGE = None  # a part of a message that stands for one image
Part = str | None
Message = tuple[str, Sequence[Part]]  # role, parts


@dataclass(frozen=True)
class ChatFormat:
    """The pieces of a model family's chat template.

    Attributes:
      turn: what opens a message, with `{role}`.
      close: what ends a message.
      image: what stands for one image; holds `placeholder` exactly once.
      placeholder: the token that stands for an image's tokens.
      begin: what a conversation with images starts with: a standard system message, a first token.
      begin_text: what a conversation without images starts with; None: the same.
      text: a text part, with `{text}`.
      images_first: images of a message come before all of its texts.
      upper_role: roles are written in capitals.
      opened: the tokenizer puts first tokens of its own (BOS) in front of a conversation.
      generation: what asks for an answer; None: what opens a message of the assistant.
      stop: a token that ends an answer besides those that a model's files name; None: there is none.
      queries: the official prompts of this family are one message of the user, as it is, whose answer is asked for.
      reserved: what no text may spell besides the tokenizer's control tokens.
    """

    turn: str
    close: str
    image: str
    placeholder: str
    begin: str = ""
    begin_text: str | None = None
    text: str = "{text}"
    images_first: bool = False
    upper_role: bool = False
    opened: bool = False
    generation: str | None = None
    stop: str | None = None
    queries: bool = False
    reserved: tuple[str, ...] = ()

    def render(self, messages: Sequence[Message]) -> str:
        """The conversation as one string, as the chat template gives it without a generation prompt."""
        with_images = any(part is IMAGE for _, parts in messages for part in parts)
        out = [self.begin if with_images or self.begin_text is None else self.begin_text]
        for role, parts in messages:
            if self.images_first:
                parts = sorted(parts, key=lambda part: part is not IMAGE)
            out.append(self.turn.replace("{role}", role.upper() if self.upper_role else role))
            out += [self.image if part is IMAGE else self.text.replace("{text}", part) for part in parts]
            out.append(self.close)
        return "".join(out)

    @property
    def asking(self) -> str:
        """What stands behind a conversation whose next message the model is to write."""
        return self.turn.replace("{role}", "assistant") if self.generation is None else self.generation


_LLAMA_TURN = "<|start_header_id|>{role}<|end_header_id|>\n\n"

# The standard system message goes with texts only; the date is the template's own where nobody gives one. The official
# code gives the rendered conversation to the processor, whose tokenizer puts a first token before it: there are two.
LLAMA32_VISION = ChatFormat(
    begin="<|begin_of_text|>",
    begin_text="<|begin_of_text|>"
    + _LLAMA_TURN.replace("{role}", "system")
    + "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n<|eot_id|>",
    turn=_LLAMA_TURN,
    close="<|eot_id|>",
    image="<|image|>",
    placeholder="<|image|>",
    opened=True,
)

# Also that of Qwen2.5-VL, whose published template is the same.
QWEN2_VL = ChatFormat(
    begin="<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n",
    turn="<|im_start|>{role}\n",
    close="<|im_end|>\n",
    image="<|vision_start|><|image_pad|><|vision_end|>",
    placeholder="<|image_pad|>",
)

# Without the standard system message. The published template shows images of user messages alone; the official prompts
# have them in the assistant's, where they are written the same way here.
QWEN3_VL = replace(QWEN2_VL, begin="")

# LLaVA-1.5 on Vicuna.
LLAVA = ChatFormat(
    turn="{role}: ",
    close="",
    image="<image>\n",
    placeholder="<image>",
    text="{text} ",
    images_first=True,
    upper_role=True,
    opened=True,
    generation="ASSISTANT:",
)

# LLaVA on Qwen2.
LLAVA_QWEN2 = ChatFormat(
    turn="<|im_start|>{role} ",
    close="<|im_end|>",
    image="<image>",
    placeholder="<image>",
    text="\n{text}",
    images_first=True,
    generation="<|im_start|>assistant\n",
)

# InternLM-XComposer2.5, whose code cuts a prompt at each <ImageHere> and puts the image's features there. A reserved
# token of the vocabulary stands for them here. The ";" is the official prompts'.
XCOMPOSER = ChatFormat(
    turn="[UNUSED_TOKEN_146]{role}\n",
    close="[UNUSED_TOKEN_145]\n",
    image="[UNUSED_TOKEN_144];",
    placeholder="[UNUSED_TOKEN_144]",
    opened=True,
    stop="[UNUSED_TOKEN_145]",
    queries=True,
    reserved=("<ImageHere>",),
)
