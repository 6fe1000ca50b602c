"""Ask a language model behind an OpenAI-compatible endpoint what a latent is about: a label from its top contexts.

    POST <base_url>/chat/completions    {"model", "messages", "temperature": 0, "max_tokens"}

Nothing is sent unless a user makes an `Explainer` and calls it; what is sent are the contexts and the promoted tokens.
Redirects are not followed, so that the key goes to the endpoint that was named and to no other.
"""

import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any
from urllib.parse import urlsplit

from saeguard import strict_json
from saeguard.errors import ModelUnavailable
from saeguard.scoring.contexts import Context
from saeguard.scoring.labels import Label, printable

MAX_ANSWER = 1_000_000
"""Bytes of one answer."""
MAX_LABEL = 200
"""Characters of a label."""
LONGEST_WAIT_S = 30.0
_AGAIN = (408, 425, 429, 500, 502, 503, 504)

TASK = (
    "You will see places in texts at which one unit of a neural network is active, with the active token between « and "
    "», most active first, and tokens that the unit makes likelier. Say in at most twelve words what the unit responds "
    "to. Answer with that phrase alone."
)


@dataclass(frozen=True)
class Explainer:
    """``base_url`` is what stands before /chat/completions; ``api_key_env`` names the variable that holds the key.

    Raises `ModelUnavailable` for a URL that is neither http nor https.
    """

    base_url: str
    model: str
    api_key_env: str | None = None
    timeout_s: float = 60.0
    retries: int = 3
    """Further tries after the endpoint was busy, broken or silent."""
    wait_s: float = 1.0
    """Before the first of them; twice as long before each next one, unless the endpoint says how long."""
    max_tokens: int = 60

    def __post_init__(self):
        if urlsplit(self.base_url).scheme not in ("http", "https") or not urlsplit(self.base_url).netloc:
            raise ModelUnavailable(
                f"an explainer at {self.base_url!r}", "that is no http or https address",
                "Give an address like http://localhost:8000/v1.",
            )  # fmt: skip

    def explain(self, latent: int, contexts: Sequence[Context], promoted: Sequence[str] = ()) -> Label:
        """The model's label of a latent, its first line. Raises `ModelUnavailable` after the last try."""
        answer = self._ask(question(contexts, promoted))
        lines = [printable(line) for line in answer.splitlines() if printable(line)]
        text = lines[0].strip("\"'`“”* ")[:MAX_LABEL].strip() if lines else ""
        if not text:
            raise self._failed("its answer has no text")
        return Label(latent, text, self.model)

    def _ask(self, content: str) -> str:
        messages = [{"role": "system", "content": TASK}, {"role": "user", "content": content}]
        body = {"model": self.model, "messages": messages, "temperature": 0, "max_tokens": self.max_tokens}
        headers = {"Content-Type": "application/json"}
        if self.api_key_env is not None:
            key = os.environ.get(self.api_key_env)
            if not key:
                raise self._failed(f"the variable {self.api_key_env} is not set")
            headers["Authorization"] = f"Bearer {key}"
        url = self.base_url.rstrip("/") + "/chat/completions"
        data = self._send(urllib.request.Request(url, json.dumps(body).encode(), headers, method="POST"))
        try:
            answer: Any = strict_json.parse(data)["choices"][0]["message"]["content"]
            if not isinstance(answer, str):
                raise TypeError(f"the content is a {type(answer).__name__}")
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise self._failed(f"its answer is no chat completion ({type(error).__name__}: {error})") from error
        return answer

    def _send(self, request: urllib.request.Request) -> bytes:
        opener = urllib.request.build_opener(_NoRedirect)
        wait = self.wait_s
        for left in range(self.retries, -1, -1):
            try:
                with opener.open(request, timeout=self.timeout_s) as response:
                    data = response.read(MAX_ANSWER + 1)
                if len(data) > MAX_ANSWER:
                    raise self._failed(f"its answer has more than {MAX_ANSWER} bytes")
                return data
            except urllib.error.HTTPError as error:
                found, again, asked = f"HTTP {error.code} {error.reason}", error.code in _AGAIN, _seconds(error)
                error.close()
            except (OSError, HTTPException) as error:
                found, again, asked = f"{type(error).__name__}: {error}", True, None
            if not again or not left:
                raise self._failed(found)
            time.sleep(min(wait if asked is None else asked, LONGEST_WAIT_S))
            wait *= 2
        raise self._failed("retries is below 0")

    def _failed(self, found: str) -> ModelUnavailable:
        return ModelUnavailable(
            f"an explanation by {self.model} at {self.base_url}", printable(found)[:300],
            "Check the address, the model's name and the key; labels by rule need no endpoint.",
        )  # fmt: skip


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


def question(contexts: Sequence[Context], promoted: Sequence[str] = ()) -> str:
    """What the model is asked: one line per context with its share of the largest activation, then the tokens."""
    top = max((context.activation for context in contexts), default=1.0) or 1.0
    lines = [
        f"{round(10 * context.activation / top)}/10: {printable(context.before)} «{printable(context.token)}» "
        f"{printable(context.after)}"
        for context in contexts
    ]
    if promoted:
        lines.append("Makes likelier: " + ", ".join(printable(token) for token in promoted))
    return "\n".join(lines)


def _seconds(error: urllib.error.HTTPError) -> float | None:
    """What a Retry-After header asks for, if it is a number."""
    given = error.headers.get("Retry-After", "") if error.headers else ""
    return float(given) if given.isdecimal() else None
