"""A judge's rating of responses, asked through any OpenAI-compatible endpoint (`/chat/completions`)."""

from __future__ import annotations

import http.client
import json
import logging
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from switchgen.config import JudgeConfig
from switchgen.errors import ConfigError

_log = logging.getLogger("switchgen")
_WAIT_SECONDS = 1.0
"""Before the first retry; twice as long before each further one."""
_RETRIED = {408, 409, 425, 429, 500, 502, 503, 504, 529}

Messages = Sequence[Mapping[str, str]]


class JudgeScorer:
    """Rates responses from 0 to 1: the number that the judge writes as `[[n]]`, of `max_rating`.

    Args:
        config: the recipe's `evaluate.judge`.
    """

    def __init__(self, config: JudgeConfig) -> None:
        self.config = config
        self._rating = re.compile(r"\[\[\s*(\d+(?:\.\d+)?)\s*\]\]")

    def score_batch(
        self, messages_list: Sequence[Messages], responses: Sequence[str], references: Sequence[str | None]
    ) -> list[float | None]:
        """One rating per response, in order; None where the judge wrote no rating in range (counted in one warning).

        Raises:
            ConfigError: the endpoint cannot be reached, refuses the key or the request, or answers something else.
        """
        with ThreadPoolExecutor(max_workers=self.config.parallel) as threads:
            texts = list(threads.map(self._ask, messages_list, responses, references))
        ratings = [self._read(text) for text in texts]
        if missing := [text for text, rating in zip(texts, ratings, strict=True) if rating is None]:
            _log.warning("judge %s: %d of %d answers hold no rating from 0 to %g in [[ ]]; the first: %.80r",
                         self.config.model, len(missing), len(texts), self.config.max_rating, missing[0])  # fmt: skip
        return ratings

    def _read(self, text: str) -> float | None:
        found = self._rating.findall(text)
        rating = float(found[-1]) / self.config.max_rating if found else -1.0
        return rating if 0 <= rating <= 1 else None

    def _ask(self, messages: Messages, response: str, reference: str | None) -> str:
        turns = [message["content"] for message in messages]
        question = turns[0] if len(turns) == 1 else "\n\n".join(f"{m['role']}: {m['content']}" for m in messages)
        fields = {"query": question, "response": response, "reference": reference or "(none)"}
        # One pass: what stands in a response is not filled in again.
        prompt = re.sub(r"\{(query|response|reference)\}", lambda match: fields[match[1]], self.config.prompt)
        body = {"model": self.config.model, "messages": [{"role": "user", "content": prompt}],
                "temperature": 0, "max_tokens": self.config.max_tokens}  # fmt: skip
        answer = self._post(json.dumps(body).encode())
        try:
            return str(answer["choices"][0]["message"]["content"] or "")  # type: ignore[index]
        except (KeyError, IndexError, TypeError):
            raise ConfigError(f"judge {self.config.url}: no chat completion: {json.dumps(answer)[:200]}") from None

    def _post(self, body: bytes) -> object:
        url = self.config.url.rstrip("/") + "/chat/completions"
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(self.config.key_env):
            headers["Authorization"] = f"Bearer {key}"
        for attempt in range(self.config.retries + 1):
            last = attempt == self.config.retries
            try:
                request = urllib.request.Request(url, data=body, headers=headers, method="POST")
                with urllib.request.urlopen(request, timeout=self.config.timeout) as stream:
                    return json.loads(stream.read())
            except urllib.error.HTTPError as error:
                if last or error.code not in _RETRIED:
                    said = error.read().decode("utf-8", "replace")[:200]
                    raise ConfigError(f"judge {url}: HTTP {error.code}: {said}") from None
            except (urllib.error.URLError, TimeoutError, ConnectionError, http.client.HTTPException) as error:
                if last:
                    raise ConfigError(f"judge {url}: no answer: {getattr(error, 'reason', error)}") from None
            except (json.JSONDecodeError, UnicodeDecodeError):
                raise ConfigError(f"judge {url}: its answer is not JSON") from None
            time.sleep(_WAIT_SECONDS * 2**attempt)
        raise AssertionError("the last attempt returns or raises")
