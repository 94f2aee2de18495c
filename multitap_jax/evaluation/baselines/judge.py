"""`Judge`: asks a whole vision-language model about pairs, as the rivals of a score do; the API is the scorer's.

    judge = Judge.from_pretrained("Qwen2-VL-2B-Instruct")
    verdicts = judge.verdicts(images=["dog.jpg"] * 2, texts=["A dog runs.", "Two cats sleep."])
    verdicts.scores, verdicts.unparsable   # float32[2], 0 to 100 or NaN; how many are NaN

Prompts are packed as pairs are for scoring: what is asked about one image shares its prefix, and logits are made only
where an answer is written. Prompts and parsing: docs/baselines.md.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from multitap_jax.backbones import Backbone, Execution
from multitap_jax.backbones.language import LanguageHead
from multitap_jax.batch import PackedBatch
from multitap_jax.data.processing import Contract, Processing
from multitap_jax.data.prompts import load_tokenizer
from multitap_jax.data.stream import Pair, StreamPacker
from multitap_jax.evaluation.baselines.asking import Asker
from multitap_jax.evaluation.baselines.checklist import Checklist
from multitap_jax.evaluation.baselines.decoding import FirstTokens, Written, first_tokens, greedy
from multitap_jax.evaluation.baselines.parsing import parse_score
from multitap_jax.evaluation.baselines.prompts import CHECK, NUMBER, VERDICT, YES_NO, JudgePrompter, fill
from multitap_jax.evaluation.baselines.results import Checked, Expected, Verdicts, YesNo
from multitap_jax.families import read_config
from multitap_jax.scoring.artefact import Artefact
from multitap_jax.scoring.manifest import MANIFEST
from multitap_jax.scoring.pairs import Source, make_pairs
from multitap_jax.scoring.scorer import DTYPES
from multitap_jax.weights.files import read_json
from multitap_jax.weights.hub import load_backbone
from multitap_jax.weights.language import load_language_head
from multitap_jax.weights.sources import local_folder

YES, NO = ("Yes", "yes"), ("No", "no")
Images = Sequence[Source | Sequence[Source]]


class Judge:
    """A loaded model that is asked about pairs, on one device. Calls from several threads take turns.

    Args:
      folder: of the model: configuration, tokenizer.
      backbone, head: the model.
      contract: image policy and position mode are read.
      dtype, batch_tokens, max_length, attention, workers: see `Scorer`; a prompt is never cut.

    Raises:
      ConfigError: `max_length` is more than the model was made for.
      ValueError: a family that keeps images out of the row (Llama-3.2-Vision), whose layers this cache does not know.
    """

    def __init__(
        self,
        folder: Path,
        backbone: Backbone,
        head: LanguageHead,
        contract: Contract,
        *,
        dtype: str = "float32",
        batch_tokens: int = 16384,
        max_length: int = 4096,
        attention: str = "auto",
        workers: int | None = None,
    ):
        backbone.config.text.check_length(max_length)
        processing = Processing.from_folder(folder, contract)
        if processing.vision.layout.apart:
            raise ValueError(
                f"{folder}: {backbone.config.model_type} attends to images outside of its rows, which decoding does "
                "not do here; the rivals run on Qwen2-VL, Qwen2.5-VL, Qwen3-VL, LLaVA, LLaVA-OneVision and "
                "InternLM-XComposer2.5"
            )
        tokenizer, chat = load_tokenizer(folder), read_config(folder)[0].chat
        self.stop = stop_tokens(folder, tokenizer)
        if chat.stop is not None:
            self.stop = (*self.stop, int(tokenizer.convert_tokens_to_ids(chat.stop)))
        self._prompter = JudgePrompter(tokenizer, chat)
        packer = StreamPacker(
            self._prompter,
            processing.reader,
            processing.vision,
            hidden=backbone.config.text.hidden_size,
            batch_tokens=batch_tokens,
            max_length=max_length,
            workers=workers,
        )
        self._ask = Asker(packer)
        self._model = jax.device_put((backbone, head))
        self._execution = Execution(dtype=dtype, attention=attention)

    @classmethod
    def from_pretrained(cls, path: str | Path, *, dtype: str = "float32", **options: Any) -> "Judge":
        """Loads a folder of a whole model, or an artefact, which keeps the language head of its base.

        Args:
          path: folder, or hub:OWNER/NAME.
          dtype: "float32" or "bfloat16".
          **options: of the class; `image_policy` and `position_mode` in place of the artefact's or family's.

        Raises:
          WeightError: weights or language head are missing or damaged.
        """
        if dtype not in DTYPES:
            raise ValueError(f"dtype {dtype!r}: expected {' or '.join(DTYPES)}")
        folder = local_folder(path)
        names = ("image_policy", "position_mode")
        saved = Artefact.open(folder).manifest.contract if (folder / MANIFEST).is_file() else None
        kept = {name: getattr(saved, name) for name in names} if saved else {}
        chosen = {name: options.pop(name) for name in names if name in options}
        contract = Contract.of(read_config(folder)[0], **{**kept, **chosen})
        backbone = load_backbone(folder, param_dtype=DTYPES[dtype])
        return cls(folder, backbone, load_language_head(folder, backbone), contract, dtype=dtype, **options)

    def verdicts(
        self,
        *,
        images: Images,
        texts: Sequence[str],
        requests: Sequence[str | None] | None = None,
        max_new_tokens: int = 64,
        show_progress: bool = False,
    ) -> Verdicts:
        """Has a score from 0 to 100 and its reasons written, greedily (LLaVA-Critic's pointwise prompt).

        Args:
          images, texts, requests, show_progress: see `Scorer.score`.
          max_new_tokens: length at which a verdict is cut.
        """
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens = {max_new_tokens}: at least 1")
        pairs = make_pairs(images, texts, requests)
        prompts = [Pair(p.images, fill(VERDICT, p.text, p.request), p.request) for p in pairs]
        written, length = np.zeros((len(pairs), max_new_tokens), np.int32), np.zeros(len(pairs), np.int64)
        stopped = np.zeros(len(pairs), bool)

        def compute(batch: PackedBatch) -> Written:
            options: dict[str, Any] = {"stop": self.stop, "execution": self._execution}
            return greedy(*self._model, batch, max_new_tokens=max_new_tokens, **options)

        def collect(places: np.ndarray, found: Written) -> np.ndarray:
            written[places], length[places], stopped[places] = found.tokens, found.length, found.stopped
            return np.asarray(found.finite)

        asked = self._ask(prompts, compute, collect, show_progress=show_progress)
        spelt = [
            None if error is not None else self._prompter.decode(tokens[:count])
            for error, tokens, count in zip(asked.errors, written, length, strict=True)
        ]
        length[asked.lost], stopped[asked.lost] = 0, False
        scores = np.asarray([np.nan if text is None else parse_score(text) for text in spelt], np.float32)
        return Verdicts(scores, spelt, asked.n_tokens, length, stopped, asked.errors)

    def p_yes(
        self,
        *,
        images: Images,
        texts: Sequence[str],
        requests: Sequence[str | None] | None = None,
        show_progress: bool = False,
    ) -> YesNo:
        """How likely the answer "Yes" is where it is asked whether the image shows the text (VQAScore)."""
        pairs = make_pairs(images, texts, requests)
        prompts = [Pair(p.images, fill(YES_NO, p.text, p.request)) for p in pairs]
        return self._yes_no(prompts, 1, show_progress)

    def checklist(
        self,
        *,
        images: Images,
        texts: Sequence[str],
        requests: Sequence[str | None] | None = None,
        checklist: Checklist | None = None,
        show_progress: bool = False,
    ) -> Checked:
        """Answers every question of a checklist about every pair (VisionReward); None takes the package's list."""
        questions = (checklist or Checklist.default()).questions
        pairs = make_pairs(images, texts, requests)
        prompts = [
            Pair(p.images, fill(CHECK, p.text, p.request, question=q.text), f"{p.request}\0{p.text}")
            for p in pairs
            for q in questions
        ]
        found = self._yes_no(prompts, len(questions), show_progress)
        shape = (len(pairs), len(questions))
        errors = [found.errors[start : start + shape[1]] for start in range(0, len(prompts), shape[1])]
        first = [next((error for error in row if error is not None), None) for row in errors]
        good = np.asarray([error is None for error in first], bool)[:, None]
        return Checked(
            names=tuple(question.name for question in questions),
            answer=np.where(good, found.answer.reshape(shape), 0).astype(np.int8),
            p_yes=np.where(good, found.p_yes.reshape(shape), np.float32(np.nan)),
            n_tokens=np.where(good[:, 0], found.n_tokens.reshape(shape).sum(axis=1), 0),
            errors=first,
        )

    def expected_score(
        self,
        *,
        images: Images,
        texts: Sequence[str],
        requests: Sequence[str | None] | None = None,
        numbers: Sequence[int] = range(10),
        top: int | None = 5,
        show_progress: bool = False,
    ) -> Expected:
        """The mean of the numbers that may answer, weighed by their probabilities (G-VEval's expectation).

        Args:
          images, texts, requests, show_progress: see `Scorer.score`.
          numbers: the scale, lowest first; each must be one token. Many tokenizers write digits apart, hence 0 to 9.
          top: only numbers among so many likeliest tokens count, as where a service gives no more; None: all of them.
        """
        if len(numbers) < 2 or list(numbers) != sorted(set(numbers)) or (top is not None and top < 1):
            raise ValueError(f"numbers {list(numbers)} and top = {top}: give two or more, ascending, and top from 1 on")
        tokens = np.asarray([self._prompter.answer_token(str(number)) for number in numbers], np.int32)
        pairs = make_pairs(images, texts, requests)
        scale = {"lowest": numbers[0], "highest": numbers[-1]}
        prompts = [Pair(p.images, fill(NUMBER, p.text, p.request, **scale), p.request) for p in pairs]
        chance = np.zeros((len(pairs), len(numbers)))

        def collect(places: np.ndarray, found: FirstTokens) -> np.ndarray:
            counted = np.exp(np.asarray(found.wanted, np.float64))
            if top is not None:
                counted *= (found.token[:, :, None] == tokens[None, None, :]).any(axis=1)
            chance[places] = counted
            return np.isfinite(found.top[:, 0])

        asked = self._ask(prompts, self._first(tokens, top or 1), collect, show_progress=show_progress)
        mass = chance.sum(axis=1)
        usable = (mass > 0) & ~asked.lost
        mean = chance @ np.asarray(numbers, np.float64) / np.where(usable, mass, 1)
        scores, mass = np.where(usable, mean, np.nan).astype(np.float32), np.where(asked.lost, 0, mass)
        return Expected(scores, mass.astype(np.float32), asked.n_tokens, asked.errors)

    def _yes_no(self, prompts: list[Pair], together: int, show_progress: bool) -> YesNo:
        yes, no = (np.asarray([self._prompter.answer_token(word) for word in words], np.int32) for words in (YES, NO))
        p_yes, p_no = (np.full(len(prompts), np.nan, np.float32) for _ in range(2))
        answer = np.zeros(len(prompts), np.int8)

        def collect(places: np.ndarray, found: FirstTokens) -> np.ndarray:
            p_yes[places], p_no[places] = np.exp(found.wanted).T
            said = lambda words: (found.token[:, :1] == words[None]).any(axis=1)
            answer[places] = said(yes).astype(np.int8) - said(no).astype(np.int8)
            return np.isfinite(found.top[:, 0])

        compute = self._first(np.asarray([yes[0], no[0]]), 1)
        asked = self._ask(prompts, compute, collect, together=together, show_progress=show_progress)
        p_yes[asked.lost], p_no[asked.lost], answer[asked.lost] = np.nan, np.nan, 0
        return YesNo(p_yes, p_no, answer, asked.n_tokens, asked.errors)

    def _first(self, wanted: np.ndarray, top: int) -> Callable[[PackedBatch], FirstTokens]:
        placed = jnp.asarray(wanted)
        return lambda batch: first_tokens(*self._model, batch, placed, top=top, execution=self._execution)


def stop_tokens(folder: Path, tokenizer: Any) -> tuple[int, ...]:
    """The tokens that end an answer: those of `generation_config.json`, else of `config.json`, else the tokenizer's."""
    for name in ("generation_config.json", "config.json"):
        entries = read_json(folder / name) if (folder / name).is_file() else {}
        entries = entries if entries.get("eos_token_id") is not None else entries.get("text_config") or {}
        if (found := entries.get("eos_token_id")) is not None:
            return tuple(found) if isinstance(found, list) else (int(found),)
    return () if tokenizer.eos_token_id is None else (int(tokenizer.eos_token_id),)
