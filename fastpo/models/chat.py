"""Text of a sample to token ids: the chat template around it, responses as segments, phrase masks."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from fastpo.data import phrases
from fastpo.sample import BadSample, Sample


@dataclass(frozen=True, kw_only=True, slots=True)
class Chat:
    tokenizer: PreTrainedTokenizerBase
    tagger: phrases.Tagger
    end: str  # what the chat template puts after an answer
    typed: bool = False  # the template takes lists of {"type": "text", ...}, not strings

    @property
    def end_id(self) -> int:
        """The token that ends an answer."""
        return self.tokenizer(self.end, add_special_tokens=False).input_ids[0]


def read(folder: Path) -> Chat:
    """Raises ValueError for a folder without a fast tokenizer and a chat template.

    A template that ends an answer with nothing visible (LLaVA-1.5's) is read as ending it with the end-of-text token,
    as these models are trained.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    older = folder / "chat_template.json"  # processors of transformers 4 kept theirs here, and it wins
    if older.is_file() and not (folder / "chat_template.jinja").is_file():
        tokenizer.chat_template = json.loads(older.read_text())["chat_template"]
    if not tokenizer.is_fast or not tokenizer.chat_template:
        raise ValueError(f"model.path: {folder}: needs a fast tokenizer (tokenizer.json) with a chat template")
    for typed in (False, True):
        before, answer, end = _render(tokenizer, typed, user="QUESTION", assistant="ANSWER").rpartition("ANSWER")
        if answer and "QUESTION" in before:
            end = end if end.strip() else str(tokenizer.eos_token)
            return Chat(tokenizer=tokenizer, tagger=phrases.tagger(tokenizer), end=end, typed=typed)
    raise ValueError(f"model.path: {folder}: its chat template leaves out the question or the answer")


def prompt_ids(chat: Chat, question: str) -> Tensor:
    """[n] int64: the question as a user turn, up to where the answer begins. Media tokens are not expanded.

    What the tokenizer puts before any text (Llama's <s>) comes first, unless the template has it already.
    """
    text = _render(chat.tokenizer, chat.typed, user=question)
    bos = chat.tokenizer.bos_token
    started = bos is not None and text.startswith(str(bos))
    return torch.tensor(chat.tokenizer(text, add_special_tokens=not started).input_ids)


def _render(tokenizer: PreTrainedTokenizerBase, typed: bool, **turns: str) -> str:
    """Turns by role through the chat template, with the start of an answer where the last is the user's."""
    messages = [
        {"role": role, "content": [{"type": "text", "text": text}] if typed else text} for role, text in turns.items()
    ]
    start = "assistant" not in turns
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=start))


def response_ids(chat: Chat, sample: Sample) -> tuple[Tensor, ...]:
    """S tensors [n_s] int64: each answer and what the template puts after it."""
    return tuple(torch.tensor(phrases.response_ids(chat.tokenizer, r.text, chat.end)) for r in sample.responses)


def phrase_weights(chat: Chat, sample: Sample) -> tuple[Tensor, ...] | None:
    """S tensors [n_s] float32, 1 in a tagged phrase; None where a response has no tags. Raises BadSample."""
    if any(response.tagged is None for response in sample.responses):
        return None
    try:
        masks = [
            phrases.phrase_mask(chat.tagger, r.text, r.tagged, chat.end)
            for r in sample.responses
            if r.tagged is not None
        ]
    except BadSample as error:
        raise BadSample(f"{sample.key}: {error}") from None
    return tuple(torch.tensor([float(sign > 0) for sign in mask]) for mask in masks)


def expand(ids: Tensor, counts: dict[int, list[int]], where: str) -> Tensor:
    """Every media token repeated as often as its item has visual tokens. counts: token id -> tokens of each item.

    Raises BadSample where the number of media tokens is not that of the items.
    """
    repeats = torch.ones_like(ids)
    for token, lengths in counts.items():
        found = ids == token
        if int(found.sum()) != len(lengths):
            raise BadSample(f"{where}: {int(found.sum())} media placeholders for {len(lengths)} media items")
        repeats[found] = torch.tensor(lengths, dtype=repeats.dtype)
    return ids.repeat_interleave(repeats)
