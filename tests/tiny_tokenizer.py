"""The demo's tokenizer builder on a few sentences: Qwen2's pattern, special tokens and chat template."""

from functools import lru_cache

from transformers import PreTrainedTokenizerFast

from multitap_jax.demo.checkpoint import train_tokenizer

CORPUS = ("a red ball is near on your left", "the blue box is far away on the right", "You are a helpful assistant.")


@lru_cache(maxsize=1)
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Trained once a test process."""
    return train_tokenizer(CORPUS)
