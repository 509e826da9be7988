"""A model behind an OpenAI-compatible endpoint: one question with its media, one reply."""

import base64
import io
import json
import time
from collections.abc import Callable
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from PIL import Image

from fastpo.data import media
from fastpo.data.formats.fields import PLACEHOLDER
from fastpo.sample import Sample, Sampling

TRIES, PAUSE, TIMEOUT = 4, 2.0, 300.0  # the pause, in seconds, doubles


def critic(
    base: str, model: str, key: str | None, sampling: Sampling, *, max_tokens: int = 64, pause: float = PAUSE
) -> Callable[[Sample], str]:
    """A function that sends a sample's media, then its question, to base/chat/completions and returns the reply.

    A video goes as its sampled frames, in JPEG as all pictures. Raises ValueError with the address and what it says,
    after some more tries where it is busy (429) or broken (5xx, no connection).
    """
    address = base.rstrip("/") + "/chat/completions"
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})

    def ask(sample: Sample) -> str:
        content = [*_pictures(sample, sampling), {"type": "text", "text": PLACEHOLDER.sub("", sample.question).strip()}]
        body = {
            "model": model,
            "messages": [{"role": "user", "content": content}],
            "temperature": 0,
            "max_tokens": max_tokens,
        }
        reply = _post(Request(address, json.dumps(body).encode(), headers), pause)
        try:
            return str(reply["choices"][0]["message"]["content"] or "")
        except (KeyError, IndexError, TypeError):
            raise ValueError(f"{address}: not a chat completion: {json.dumps(reply)[:200]}") from None

    return ask


def _post(request: Request, pause: float) -> Any:
    for left in reversed(range(TRIES)):
        try:
            with urlopen(request, timeout=TIMEOUT) as answer:
                return json.load(answer)
        except HTTPError as error:
            reason = f"{error.code} {error.reason}: {error.read(200).decode(errors='replace')}"
            again = error.code == 429 or error.code >= 500
        except (URLError, TimeoutError, ConnectionError) as error:
            reason, again = str(getattr(error, "reason", error)), True
        except ValueError as error:
            reason, again = f"not JSON: {error}", False
        if not again or not left:
            raise ValueError(f"{request.full_url}: {reason}")
        time.sleep(pause)
        pause *= 2
    raise AssertionError


def _pictures(sample: Sample, sampling: Sampling) -> list[dict[str, Any]]:
    found = []
    for item in sample.media:
        for frame in media.decode(item, media.frame_count(item, sampling)):
            file = io.BytesIO()
            Image.fromarray(frame).save(file, "JPEG", quality=90)
            data = base64.b64encode(file.getvalue()).decode()
            found.append({"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{data}"}})
    return found
