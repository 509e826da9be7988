"""Text of a sample to token ids: the chat template around it, responses as segments, phrase masks."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from fastpo.data import phrases
from fastpo.models.files import read_json
from fastpo.sample import BadSample, Encoded, Sample, Turn


@dataclass(frozen=True, kw_only=True, slots=True)
class Chat:
    tokenizer: PreTrainedTokenizerBase
    tagger: phrases.Tagger
    end: str  # what the chat template puts after an answer
    typed: bool = False  # the template takes lists of {"type": "text", ...}, not strings
    asks: str = ""  # what it puts between an answer, ended, and the next question
    asks_itself: str = ""  # the same where the model asks
    asked: str = ""  # after a question, at its end
    answers: str = ""  # between a question, ended, and its answer

    @property
    def end_id(self) -> int:
        """The token that ends an answer."""
        return self.tokenizer(self.end, add_special_tokens=False).input_ids[0]


class Responses(NamedTuple):
    """See Encoded."""

    responses: tuple[Tensor, ...]
    trained: tuple[Tensor, ...] | None
    parents: tuple[int, ...] | None


def read(folder: Path, question_role: str = "user") -> Chat:
    """Raises ValueError for a folder without a fast tokenizer and a chat template, or with a broken file of these.

    A template that ends an answer with nothing visible (LLaVA-1.5's) is read as ending it with the end-of-text token,
    as these models are trained. question_role: the name under which the model itself asks (SPO: "vuser").
    """
    for file in folder.glob("tokenizer*.json"):
        read_json(file)  # transformers would not name a file that was cut
    tokenizer = AutoTokenizer.from_pretrained(folder)
    older = folder / "chat_template.json"  # processors of transformers 4 kept theirs here, and it wins
    if older.is_file() and not (folder / "chat_template.jinja").is_file():
        tokenizer.chat_template = read_json(older)["chat_template"]
    if not tokenizer.is_fast or not tokenizer.chat_template:
        raise ValueError(f"model.path: {folder}: needs a fast tokenizer (tokenizer.json) with a chat template")
    for typed in (False, True):
        text = _render(tokenizer, typed, [("user", "QUESTION"), ("assistant", "ANSWER")])
        before, answer, end = text.rpartition("ANSWER")
        if answer and "QUESTION" in before:
            between = _between(tokenizer, typed)
            visible = bool(end.strip())
            asked = end if visible and between[1].startswith(end) else ""
            asks = between[0].removeprefix(end) if visible else between[0]
            return Chat(
                tokenizer=tokenizer,
                tagger=phrases.tagger(tokenizer),
                end=end if visible else str(tokenizer.eos_token),
                typed=typed,
                asks=asks,
                asks_itself=asks.replace("user", question_role),
                asked=asked,
                answers=between[1].removeprefix(asked),
            )
    raise ValueError(f"model.path: {folder}: its chat template leaves out the question or the answer")


def prompt_ids(chat: Chat, question: str, sample: Sample | None = None) -> Tensor:
    """[n] int64: the question as a user turn and sample.turns, up to where the responses begin.

    What the tokenizer puts before any text (Llama's <s>) comes first, unless the template has it already. Media tokens
    are not expanded. Responses begin as answers, or right after the last turn where the model itself asks.
    """
    text = _render(chat.tokenizer, chat.typed, [("user", question)])
    bos = chat.tokenizer.bos_token
    started = bos is not None and text.startswith(str(bos))
    ids = chat.tokenizer(text, add_special_tokens=not started).input_ids
    for turn in () if sample is None else sample.turns:
        ids = ids + (_question(chat, turn.text) if turn.role == "user" else _ids(chat, turn.text + chat.end))
    return torch.tensor(ids)


def responses(chat: Chat, sample: Sample) -> Responses:
    """S responses as token ids [n_s] int64: text and what the template puts after it, then their further turns.

    A question that the model asks comes behind the template's user header, which is not trained, nor is what stands
    between it and its answers; they continue it. Raises BadSample for a response that does not fit what it continues.
    """
    after_answer = bool(sample.turns) and sample.turns[-1].role == "assistant"
    found, masks = [], []
    for n, response in enumerate(sample.responses):
        asks = response.role == "user"
        before = sample.responses[response.parent].role if response.parent is not None else None
        if asks != (before == "assistant" if before else after_answer):
            raise BadSample(f"{sample.key}: response {n} is a {response.role} turn and so is what it continues")
        ids, trained = [], []
        for turn in (Turn(role=response.role, text=response.text, trained=True), *response.turns):
            asking = chat.asks_itself if turn.trained else chat.asks
            header = _ids(chat, asking) if turn.role == "user" else []
            body = _ids(chat, turn.text + (chat.asked if turn.role == "user" else chat.end))
            tail = _ids(chat, chat.answers) if turn.role == "user" else []
            ids += header + body + tail
            trained += [False] * len(header) + [turn.trained] * len(body) + [False] * len(tail)
        found.append(torch.tensor(ids))
        masks.append(torch.tensor(trained))
    nested = any(response.parent is not None for response in sample.responses)
    return Responses(
        tuple(found),
        None if all(bool(mask.all()) for mask in masks) else tuple(masks),
        tuple(-1 if r.parent is None else r.parent for r in sample.responses) if nested else None,
    )


def encoded(chat: Chat, sample: Sample, prompt: Tensor, media: Iterable[int], **visual: Any) -> Encoded:
    """The sample with its prompt, media tokens expanded, and what the family says of its media.

    media: ids of the media tokens. Raises BadSample, also where a response holds one: there are no pixels for it.
    """
    answers = responses(chat, sample)
    for n, ids in enumerate(answers.responses):
        if found := {*ids.tolist()}.intersection(media):
            token = chat.tokenizer.convert_ids_to_tokens(min(found))
            raise BadSample(f"{sample.key}: response {n} holds {token}, which stands for pixels")
    return Encoded(
        key=sample.key,
        prompt=prompt,
        weights=phrase_weights(chat, sample),
        scores=tuple(response.score for response in sample.responses),
        media=sample.media,
        **answers._asdict(),
        **visual,
    )


def _ids(chat: Chat, text: str) -> list[int]:
    return chat.tokenizer(text, add_special_tokens=False).input_ids


def _question(chat: Chat, text: str) -> list[int]:
    return _ids(chat, chat.asks + text + chat.asked + chat.answers)


def _between(tokenizer: PreTrainedTokenizerBase, typed: bool) -> tuple[str, str]:
    """What stands between an answer and the next question, and between that and its answer."""
    turns = [("user", "QUESTION"), ("assistant", "ANSWER"), ("user", "SECOND"), ("assistant", "LAST")]
    text = _render(tokenizer, typed, turns)
    rest = text.partition("ANSWER")[2]
    first, _, rest = rest.partition("SECOND")
    return first, rest.partition("LAST")[0]


def _render(tokenizer: PreTrainedTokenizerBase, typed: bool, turns: Sequence[tuple[str, str]]) -> str:
    """Turns through the chat template, with the start of an answer where the last is the user's."""
    messages = [{"role": role, "content": [{"type": "text", "text": text}] if typed else text} for role, text in turns]
    start = turns[-1][0] == "user"
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=start))


def phrase_weights(chat: Chat, sample: Sample) -> tuple[Tensor, ...] | None:
    """S tensors [n_s] float32, 1 in a phrase; None where a response has no tags. Raises BadSample."""
    if sample.phrases == "different":
        if len(sample.responses) != 2:
            raise BadSample(f"{sample.key}: two responses differ in phrases, there are {len(sample.responses)}")
        better, worse = (phrases.response_ids(chat.tokenizer, r.text, chat.end) for r in sample.responses)
        return _weights(phrases.differences(better, worse))
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
    return _weights(masks)


def _weights(masks: Iterable[list[int]]) -> tuple[Tensor, ...]:
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
