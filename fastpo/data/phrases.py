"""RRPO's phrases: from <MASK> tags in the text, or from two texts that differ, to a phrase number per response token.

The rule is the authors' (pritamqu/RRPO a905573, train_llavavideo.py:989-1105). It compares two tokenisations and drops
a response whose tags moved a token border; such a response is kept here where character offsets leave no doubt.
"""

import copy
import re
from collections.abc import Sequence
from difflib import SequenceMatcher
from itertools import groupby
from typing import NamedTuple

from transformers import AddedToken, PreTrainedTokenizerBase

from fastpo.sample import BadSample

OPEN, CLOSE = "<MASK>", "</MASK>"
TAG = re.compile(f"({OPEN}|{CLOSE})")


class Tagger(NamedTuple):
    plain: PreTrainedTokenizerBase
    tagged: PreTrainedTokenizerBase  # a copy of plain that knows the two tags as special tokens


def tagger(tokenizer: PreTrainedTokenizerBase) -> Tagger:
    """Copies the tokenizer, which must be a fast one and stays as it is. Build one Tagger per tokenizer."""
    assert tokenizer.is_fast
    tagged = copy.deepcopy(tokenizer)
    tagged.add_tokens([AddedToken(tag, special=True, normalized=False) for tag in (OPEN, CLOSE)], special_tokens=True)
    return Tagger(tokenizer, tagged)


def response_ids(tokenizer: PreTrainedTokenizerBase, text: str, end: str) -> list[int]:
    """Token ids of a response segment: the answer and what the chat template puts after it."""
    return tokenizer(text + end, add_special_tokens=False).input_ids


def strip_tags(tagged: str) -> tuple[str, list[tuple[int, int]]]:
    """The text without tags and the phrases in it, as [first, last + 1) characters. Blank phrases are left out.

    Raises BadSample for a tag that is unclosed, nested or closed before it is opened.
    """
    text, phrases, start = "", [], None
    for part in TAG.split(tagged):
        if part == OPEN:
            if start is not None:
                raise BadSample(f"{OPEN} inside a phrase, at character {len(text)} of the text without tags")
            start = len(text)
        elif part == CLOSE:
            if start is None:
                raise BadSample(f"{CLOSE} without {OPEN}, at character {len(text)} of the text without tags")
            if text[start:].strip():
                phrases.append((start, len(text)))
            start = None
        else:
            text += part
    if start is not None:
        raise BadSample(f"{OPEN} is never closed, at character {start} of the text without tags")
    return text, phrases


def phrase_mask(tagger: Tagger, text: str, tagged: str, end: str = "<|im_end|>\n") -> list[int]:
    """Phrase of each token of `response_ids(tagger.plain, text, end)`: 0 for none, else counted from 1.

    tagged is text with tags; white space beside a tag may differ. The numbers stand for phrases, not their order: only
    zero or not matters to the loss. Raises BadSample where neither the authors' rule nor the offsets decide.
    """
    untagged, phrases = strip_tags(tagged)
    if "".join(untagged.split()) != "".join(text.split()):
        raise BadSample("the tagged text is not the text with tags")
    ids, signs = _drop_tags(tagger, tagged + end)
    plain = response_ids(tagger.plain, text, end)
    if len(ids) == len(plain):
        pairs = zip((a != b for a, b in zip(ids, plain, strict=True)), signs, strict=True)
        if all(len(set(run)) == 1 for differs, run in groupby(pairs, key=lambda pair: pair[0]) if differs):
            return signs
    marks = [n for n, c in zip(_numbers(untagged, phrases), untagged, strict=True) if not c.isspace()]
    return _from_offsets(tagger.plain, text + end, marks + [0] * len("".join(end.split())))


def differences(better: Sequence[int], worse: Sequence[int]) -> tuple[list[int], list[int]]:
    """Phrase of each token of two responses, like phrase_mask: runs of tokens that replace one another.

    Tokens that one response has more than the other are in no phrase (pritamqu/RRPO a905573, videochat2/diff_lib.py:
    197-228). Here no token counts as junk; difflib's default, which the authors keep, ignores frequent ones of a long
    response, and theirs sees prompt and padding too.
    """
    found = [0] * len(better), [0] * len(worse)
    number = 0
    for kind, a, b, c, d in SequenceMatcher(None, better, worse, autojunk=False).get_opcodes():
        if kind == "replace":
            number += 1
            found[0][a:b], found[1][c:d] = [number] * (b - a), [number] * (d - c)
    return found


def _drop_tags(tagger: Tagger, tagged: str) -> tuple[list[int], list[int]]:
    """Ids of the tagged text without its tags, and the phrase of each. A tag takes one lone-space token with it."""
    ids = response_ids(tagger.tagged, tagged, "")
    space = response_ids(tagger.tagged, " ", "")
    tags = [(tagger.tagged.convert_tokens_to_ids(tag), tag == OPEN) for tag in (OPEN, CLOSE)]
    patterns = [(ids, opens) for tag, opens in tags for ids in ([*space, tag], [tag, *space], [tag])]
    kept, signs, phrases, inside, k = [], [], 0, False, 0
    while k < len(ids):
        found = next(((len(ids_of), opens) for ids_of, opens in patterns if ids[k : k + len(ids_of)] == ids_of), None)
        if found is None:
            kept.append(ids[k])
            signs.append(phrases if inside else 0)
            k += 1
        else:
            width, inside = found
            phrases += inside
            k += width
    return kept, signs


def _numbers(text: str, phrases: list[tuple[int, int]]) -> list[int]:
    """Phrase of each character."""
    numbers = [0] * len(text)
    for number, (first, last) in enumerate(phrases, start=1):
        numbers[first:last] = [number] * (last - first)
    return numbers


def _from_offsets(tokenizer: PreTrainedTokenizerBase, text: str, marks: list[int]) -> list[int]:
    """Phrase of each token, from the phrase of each character that is not white space.

    White space does not count: a byte-level token begins with the space before a word, and a space beside a tag may be
    the annotator's. A token of white space alone belongs to the phrase around it.
    """
    solid = [0]  # how many characters before character i are not white space
    for c in text:
        solid.append(solid[-1] + (not c.isspace()))
    signs = []
    for first, last in tokenizer(text, add_special_tokens=False, return_offsets_mapping=True).offset_mapping:
        covered = set(marks[solid[first] : solid[last]])
        if len(covered) > 1:
            raise BadSample(f"a phrase begins or ends inside the token {text[first:last]!r}, at character {first}")
        if not covered and solid[first] > 0:
            around = set(marks[solid[first] - 1 : solid[first] + 1])
            covered = around if len(around) == 1 else set()
        signs.append(covered.pop() if covered else 0)
    return signs
