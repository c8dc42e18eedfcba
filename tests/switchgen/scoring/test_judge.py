"""The judge behind an OpenAI-compatible endpoint: a real server on the loopback."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from switchgen.config import JudgeConfig
from switchgen.errors import ConfigError
from switchgen.scoring import judge as judge_module
from switchgen.scoring.judge import JudgeScorer

BREAKS_OFF = 0
"""Instead of a status: the answer ends in its middle."""


class Endpoint(ThreadingHTTPServer):
    """Rates a response by the number of its letters; answers as `script` says while that lasts."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: list[dict[str, Any]] = []
        self.script: list[int] = []
        self.text = "Good. [[3]] No: [[{rating}]]"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1/"


class Handler(BaseHTTPRequestHandler):
    server: Endpoint

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append({**body, "path": self.path, "key": self.headers.get("Authorization")})
        status = self.server.script.pop(0) if self.server.script else 200
        response = body["messages"][0]["content"].partition("R: ")[2].partition("\n")[0]
        text = self.server.text.format(rating=len(response))
        answer = json.dumps({"choices": [{"message": {"content": text}}]} if status == 200 else {"error": "busy"})
        if status == BREAKS_OFF:
            self.send_response(200)
            self.send_header("Content-Length", str(len(answer) + 9))
            self.end_headers()
            self.wfile.write(b'{"choices": ')
            return
        self.send_response(status)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer.encode())

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    monkeypatch.setattr(judge_module, "_WAIT_SECONDS", 0.01)
    server = Endpoint()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def scorer(endpoint: Endpoint, **settings: Any) -> JudgeScorer:
    prompt = "Q: {query}\nA: {reference}\nR: {response}\n"
    return JudgeScorer(JudgeConfig(**{"url": endpoint.url, "model": "m", "prompt": prompt, **settings}))


QUESTION = [{"role": "user", "content": "How old is {response}?"}]


def test_the_last_rating_counts_and_texts_are_filled_in_once(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", "secret")
    ratings = scorer(endpoint, key_env="MY_KEY").score_batch([QUESTION] * 3, ["ab", "abcde", ""], ["7", None, "9"])
    assert ratings == [0.2, 0.5, 0.0]
    asked = {request["messages"][0]["content"] for request in endpoint.requests}
    assert "Q: How old is {response}?\nA: (none)\nR: abcde\n" in asked and len(asked) == 3
    request = endpoint.requests[0]
    assert (request["path"], request["model"], request["key"]) == ("/v1/chat/completions", "m", "Bearer secret")


def test_no_rating_is_no_score(endpoint: Endpoint, caplog: pytest.LogCaptureFixture) -> None:
    endpoint.text = "I would say {rating}"
    assert scorer(endpoint).score_batch([QUESTION], ["ab"], [None]) == [None]
    assert "1 of 1 answers hold no rating" in caplog.text
    endpoint.text = "[[{rating}1]]"
    assert scorer(endpoint).score_batch([QUESTION], ["ab"], [None]) == [None]  # 21 of 10


def test_a_busy_endpoint_is_asked_again_and_a_refusal_is_not(endpoint: Endpoint) -> None:
    endpoint.script = [429, BREAKS_OFF]
    assert scorer(endpoint).score_batch([QUESTION], ["ab"], [None]) == [0.2]
    assert len(endpoint.requests) == 3
    endpoint.script = [401]
    with pytest.raises(ConfigError, match='HTTP 401: {"error": "busy"}'):
        scorer(endpoint).score_batch([QUESTION], ["ab"], [None])
    assert len(endpoint.requests) == 4
    endpoint.script = [BREAKS_OFF]
    with pytest.raises(ConfigError, match="no answer: IncompleteRead"):
        scorer(endpoint, retries=0).score_batch([QUESTION], ["ab"], [None])
    endpoint.script = [500, 500]
    with pytest.raises(ConfigError, match="HTTP 500"):
        scorer(endpoint, retries=1).score_batch([QUESTION], ["ab"], [None])


def test_nobody_there(endpoint: Endpoint) -> None:
    silent = JudgeConfig(url="http://127.0.0.1:9", model="m", retries=0)
    with pytest.raises(ConfigError, match="no answer"):
        JudgeScorer(silent).score_batch([QUESTION], ["ab"], [None])
    with pytest.raises(ValueError, match="holds {query} and {response}"):
        JudgeConfig(url="http://x", model="m", prompt="Rate {query}")
