"""Candidates behind servers: what is sent, what is made of the answers, and servers that fail."""

from __future__ import annotations

import json
import logging
import random
import subprocess
import sys
import threading
import time
from _thread import interrupt_main
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from ladders import make_tokenizer, save_ladder

pytest.importorskip("httpx")

from switchgen.api import generate, make_policy  # noqa: E402
from switchgen.candidates import Pool  # noqa: E402
from switchgen.config import CandidateConfig, DecodingConfig, SwitcherConfig  # noqa: E402
from switchgen.engines.remote import RemoteEngine  # noqa: E402
from switchgen.errors import ConfigError, ModelError, ServerError  # noqa: E402
from switchgen.trace import Query, Trace  # noqa: E402

QUERIES = [Query.from_text(f"How old is person {row}? 12 + 35", str(row)) for row in range(12)]
Answer = tuple[str, str]
"""Text and finish reason."""


def ascii_text(prompt: Any, count: int) -> Answer:
    """As many tokens as were asked for, which depend on the prompt; they are tokenized as they were drawn."""
    draw = random.Random(json.dumps(prompt))
    return "".join(draw.choice("abcdefgh") + draw.choice(" .\n") for _ in range(count)), "length"


class Server:
    """A server of the tests; `answer` may be replaced, `before` is called first and may misbehave."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.answer: Callable[[Any, int], Answer] = ascii_text
        self.before: Callable[[BaseHTTPRequestHandler, dict[str, Any]], bool] = lambda *_: False
        self.in_flight = self.most_in_flight = 0
        self.lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer.lock:
                    outer.requests.append(body)
                    outer.in_flight += 1
                    outer.most_in_flight = max(outer.most_in_flight, outer.in_flight)
                try:
                    if outer.before(self, body):
                        return
                    text, finish = outer.answer(body["prompt"], body["max_tokens"])
                    send(self, 200, {"choices": [{"text": text, "finish_reason": finish}]})
                finally:
                    with outer.lock:
                        outer.in_flight -= 1

            def log_message(self, *_: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"


def send(handler: BaseHTTPRequestHandler, status: int, value: Any) -> bool:
    raw = json.dumps(value).encode()
    handler.send_response(status)
    handler.send_header("Content-Length", str(len(raw)))
    handler.end_headers()
    handler.wfile.write(raw)
    return True


@contextmanager
def running() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.http.shutdown()
        server.http.server_close()
        thread.join()


@pytest.fixture
def server() -> Iterator[Server]:
    with running() as one:
        yield one


@pytest.fixture
def other() -> Iterator[Server]:
    with running() as one:
        yield one


@pytest.fixture(scope="module")
def ladder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_ladder(tmp_path_factory.mktemp("remote"), ("base", "aligned"))


def remote_pool(ladder: Path, *urls: str, **settings: Any) -> Pool:
    configs = [
        CandidateConfig.model_validate(
            {"name": name, "model": str(ladder / name), "engine": "openai",
             "server": {"base_urls": list(urls), "model": f"served-{name}", **settings}}
        )
        for name in ("base", "aligned")
    ]  # fmt: skip
    pool = Pool.load(configs)
    for candidate in pool:
        assert isinstance(candidate.engine, RemoteEngine)
        candidate.engine._replicas.pause = 0.02
    return pool


def write(pool: Pool, policy: str = "random", **decoding: Any) -> list[Trace]:
    settings = DecodingConfig.model_validate({"max_new_tokens": 30, "segment": 8, **decoding})
    return generate(pool, QUERIES, policy, decoding=settings)


def signed(traces: list[Trace]) -> list[Any]:
    return [(trace.finish, [(s.writer, s.text, s.ids, s.finish) for s in trace.segments]) for trace in traces]


# -- what is sent and what is made of it -------------------------------------------------------------------------------


def test_contexts_go_out_and_segments_come_in(ladder: Path, server: Server) -> None:
    """Every request holds the writer's prompt and the trace so far; the segment is the answer, cut to its length."""
    pool = remote_pool(ladder, server.url)
    server.answer = lambda prompt, count: (time.sleep(0.05), ascii_text(prompt, count))[1]
    traces = write(pool)
    asked = {(body["model"], tuple(body["prompt"])): body for body in server.requests}
    assert len(asked) == len(server.requests)
    for trace in traces:
        context: list[int] = []
        for segment in trace.segments:
            candidate = pool.candidates[segment.writer]
            prompt = [*candidate.prompt_ids(trace.query), *context]
            body = asked.pop((f"served-{candidate.name}", tuple(prompt)))
            text, _ = ascii_text(prompt, body["max_tokens"])
            assert text.startswith(segment.text) and segment.finish == "length"
            assert body["temperature"] == 0.7 and body["top_p"] == 0.9
            context += segment.ids
        assert len(context) == 30 and trace.finish == "length"
    assert not asked, "nothing else was asked for"
    assert {writer for trace in traces for writer in trace.writers} == {0, 1}
    assert server.most_in_flight > 4, "rows of both candidates are in flight together"
    assert signed(write(pool)) == signed(traces)


def test_ends(ladder: Path, server: Server) -> None:
    """Sentences, stop strings that two writers share, ends of text, and an empty answer."""
    pool = remote_pool(ladder, server.url)
    server.answer = lambda *_: ("One. Two and more", "length")
    sentences = write(pool, segment={"tokens": 20, "end": "sentence"})
    assert {segment.text for trace in sentences for segment in trace.segments[:-1]} == {"One."}
    server.answer = lambda prompt, _: ("xxEN" if len(prompt) % 2 else "Dyy", "stop")
    stopped = write(pool, stop=["END"], eos="segment")
    assert all("END" not in trace.text for trace in stopped)
    assert any(trace.finish == "stop" for trace in stopped)
    server.answer = lambda *_: ("Done", "stop")
    assert {(trace.text, trace.finish) for trace in write(pool)} == {("Done", "eos")}
    server.answer = lambda *_: ("", "stop")
    assert {(trace.text, trace.finish) for trace in write(pool, eos="segment")} == {("", "eos")}
    # Once an endless loop: a segment of nothing leaves the row where it was, and the same is asked for again.
    for nothing in ("", "\ufffd", "\ud83d"):
        server.answer = lambda *_, nothing=nothing: (nothing, "length")  # type: ignore[misc]
        for eos in ("response", "segment"):
            assert {(trace.text, trace.finish) for trace in write(pool, eos=eos)} == {("", "eos")}
    server.answer = lambda *_: ("é\ufffd", "length")
    assert all("\ufffd" not in trace.text for trace in write(pool))


def test_segments_that_end_by_logits_are_refused(ladder: Path, server: Server) -> None:
    """Text comes over the wire, not the writer's distribution; said before anything is asked for."""
    pool = remote_pool(ladder, server.url)
    with pytest.raises(
        ConfigError, match="'p@0.3' reads the writer's distribution, and candidate 'base' is behind a s"
    ):
        write(pool, segment={"tokens": 8, "end": "p@0.3"})
    assert not server.requests


def test_prompts_as_text(ladder: Path, server: Server) -> None:
    """A server that takes no token ids gets text that its tokenizer turns into the same tokens; forged control
    tokens are no control tokens in it."""
    server.before = lambda handler, body: (
        isinstance(body["prompt"], list) and send(handler, 400, {"error": {"message": "prompt must be a string"}})
    )
    pool = remote_pool(ladder, server.url)
    traces = write(pool, "aligned")
    refused = [body for body in server.requests if isinstance(body["prompt"], list)]
    assert len(refused) == 1, "tried once"
    assert all(trace.num_tokens == 30 for trace in traces)
    candidate = pool.candidates[1]
    vocabulary = candidate.vocabulary
    prompts = {body["prompt"] for body in server.requests if isinstance(body["prompt"], str)}
    for trace in traces:
        ids = candidate.prompt_ids(trace.query)
        (first,) = [prompt for prompt in prompts if vocabulary.tokenizer(prompt)["input_ids"] == ids]
        assert "<|" in first
    engine = candidate.engine
    assert isinstance(engine, RemoteEngine)
    control = next(iter(vocabulary.control_ids))
    forged = str(vocabulary.tokenizer.convert_ids_to_tokens(control))
    ids = candidate.prompt_ids(Query.from_text(f"end it {forged} now"))
    again = vocabulary.tokenizer(engine.as_text(ids))["input_ids"]
    kept = [token for token in ids if token in vocabulary.control_ids]
    assert [token for token in again if token in vocabulary.control_ids] == kept


# -- servers that fail -------------------------------------------------------------------------------------------------


def test_load_is_spread_and_a_dead_replica_is_left_out(
    ladder: Path, server: Server, other: Server, caplog: pytest.LogCaptureFixture
) -> None:
    """One of two servers breaks off in mid-request and is gone: its rows go on elsewhere, and come out the same."""
    pool = remote_pool(ladder, server.url, other.url)
    for one in (server, other):
        one.answer = lambda prompt, count: (time.sleep(0.01), ascii_text(prompt, count))[1]
    expected = write(pool)
    shares = [len(one.requests) for one in (server, other)]
    assert min(shares) > 0.3 * sum(shares)
    count = len(other.requests)

    def die(handler: BaseHTTPRequestHandler, _: Any) -> bool:
        if len(other.requests) < count + 4:
            return False
        handler.close_connection = True
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 900\r\n\r\n{")
        return True

    other.before = die
    with caplog.at_level(logging.INFO, "switchgen"):
        assert signed(write(pool)) == signed(expected)
    said = [record for record in caplog.records if "left out" in record.message]
    assert said and all(other.url in record.message for record in said)
    assert len([record for record in said if record.levelno == logging.WARNING]) <= 2, "once a candidate"


def test_slow_and_overloaded_servers(ladder: Path, server: Server, other: Server) -> None:
    """A server that does not answer in time, one that says it has too much to do."""
    pool = remote_pool(ladder, server.url, other.url, timeout=0.4)
    tired = iter(range(10))
    server.before = lambda handler, _: next(tired, None) is not None and send(handler, 503, {"error": "later"})
    slow = iter([1])
    other.before = lambda *_: bool(next(slow, 0) and time.sleep(1.0))
    assert all(trace.num_tokens == 30 for trace in write(pool))


def test_a_hung_replica_is_tried_with_one_request(ladder: Path, server: Server, other: Server) -> None:
    """It once got a burst after each pause, being the least busy one, and every round took a full timeout."""
    pool = remote_pool(ladder, server.url, other.url, timeout=1.0)
    hung = threading.Event()
    other.before = lambda *_: hung.wait(10)
    replica = pool.candidates[1].engine._replicas._replicas[1]
    asked, pauses = [], []
    for _ in range(3):
        before, replica.out_until = len(other.requests), 0.0
        write(pool, "aligned", max_new_tokens=8, segment=8)
        asked.append(len(other.requests) - before)
        pauses.append(replica.out_until - time.monotonic())
    hung.set()
    assert asked[0] > 1 and asked[1:] == [1, 1]
    # A second, two, four, less what the others' answers took.
    assert 1.0 < pauses[1] < pauses[2]


def test_a_replica_that_is_back_is_used_again(ladder: Path, server: Server, other: Server) -> None:
    pool = remote_pool(ladder, server.url, other.url)
    failing = iter([1])
    other.before = lambda handler, _: bool(next(failing, 0)) and send(handler, 503, {"error": "later"})
    write(pool)
    time.sleep(0.05)
    before = len(other.requests)
    for one in (server, other):
        one.answer = lambda prompt, count: (time.sleep(0.01), ascii_text(prompt, count))[1]
    write(pool)
    assert len(other.requests) - before > 10


def test_bodies_that_cannot_be_decoded(ladder: Path, server: Server, other: Server) -> None:
    """What is no gzip counts as a failure like others; the server once kept a request in flight for ever."""
    pool = remote_pool(ladder, server.url, other.url)

    def garble(handler: BaseHTTPRequestHandler, _: Any) -> bool:
        handler.send_response(200)
        handler.send_header("Content-Encoding", "gzip")
        handler.send_header("Content-Length", "4")
        handler.end_headers()
        handler.wfile.write(b"nope")
        return True

    other.before = garble
    assert all(trace.num_tokens == 30 for trace in write(pool))
    for candidate in pool:
        assert [replica.in_flight for replica in candidate.engine._replicas._replicas] == [0, 0]


@pytest.mark.parametrize("reason", ["abort", "content_filter", None])
def test_answers_that_were_broken_off(ladder: Path, server: Server, reason: Any) -> None:
    """They once counted as ends of text. Asked for again; one that is broken off each time is an error."""
    pool = remote_pool(ladder, server.url, retries=1, prompts="tokens")
    asked: set[str] = set()

    def once(prompt: Any, count: int) -> Any:
        key = json.dumps(prompt)
        text, finish = ascii_text(prompt, count)
        broken = key not in asked
        asked.add(key)
        return (text[:4], reason) if broken else (text, finish)

    server.answer = once
    assert all((trace.num_tokens, trace.finish) == (30, "length") for trace in write(pool))
    server.answer = lambda *_: ("partial", reason)
    with pytest.raises(ServerError, match=rf"finish_reason {reason!r}, 2 times; allowed: stop, length"):
        write(pool)


def test_nobody_goes_on_asking_after_an_error(ladder: Path, server: Server) -> None:
    """Requests that waited for a server to come back held the process open; the engine itself works on."""
    pool = remote_pool(ladder, server.url, retries=3, prompts="tokens")
    first = iter([1])
    server.before = lambda handler, _: send(handler, *((404, {}) if next(first, 0) else (500, {"error": "later"})))
    for candidate in pool:
        candidate.engine._replicas.pause = 60.0
    with pytest.raises(ServerError, match="404"):
        write(pool, "aligned")
    (replica,) = pool.candidates[1].engine._replicas._replicas
    deadline = time.monotonic() + 10
    while replica.in_flight:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    before = len(server.requests)
    time.sleep(0.1)
    assert len(server.requests) == before
    server.before, replica.out_until = lambda *_: False, 0.0
    assert all(trace.num_tokens == 30 for trace in write(pool, "aligned"))


def test_nobody_answers(ladder: Path, server: Server) -> None:
    """The error names the candidate, the server and what it said; a request that is wrong is not sent again."""
    pool = remote_pool(ladder, server.url, retries=2, prompts="tokens")
    server.before = lambda handler, _: send(handler, 500, {"error": "out of order"})
    with pytest.raises(ServerError, match=rf"(base|aligned): no server answered in 3 tries.*{server.url}: 500.*order"):
        write(pool)
    before = -1
    while before < len(server.requests):
        # Requests that were on their way when the first one was given up.
        before = len(server.requests)
        time.sleep(0.5)
    server.before = lambda handler, _: send(handler, 404, {"error": "no such model"})
    with pytest.raises(ServerError, match=rf"{server.url}: 404.*no such model"):
        write(pool, "base")
    assert len(server.requests) - before <= len(QUERIES)
    server.before = lambda handler, _: send(handler, 200, {"object": "error"})
    with pytest.raises(ServerError, match=r"without choices\[0\].text"):
        write(pool)


def test_a_stopped_command_does_not_go_on_asking(ladder: Path, server: Server) -> None:
    """A process waits for its threads, and requests that are sent again and again kept it alive for minutes."""
    pool = remote_pool(ladder, server.url, prompts="tokens")
    for candidate in pool:
        candidate.engine._replicas.pause = 60.0
    control_c = iter([interrupt_main])

    def fail(handler: BaseHTTPRequestHandler, _: Any) -> bool:
        next(control_c, lambda: None)()
        return send(handler, 500, {"error": "out of order"})

    server.before = fail
    with pytest.raises(KeyboardInterrupt):
        write(pool)
    started = time.monotonic()
    for candidate in pool:
        candidate.engine._threads.shutdown(wait=True)
    assert time.monotonic() - started < 10


# -- what cannot be remote ---------------------------------------------------------------------------------------------


def test_what_needs_logits_is_refused(ladder: Path) -> None:
    pool = remote_pool(ladder, "http://127.0.0.1:9/v1")
    with pytest.raises(ConfigError, match="behind servers"):
        make_policy("baco-p@0.3", pool)
    with pytest.raises(ModelError, match="behind servers"):
        pool.load_switcher(SwitcherConfig())
    with pytest.raises(ConfigError, match="under a probe"):
        pool.candidates[0].engine.hidden([])
    with pytest.raises(ConfigError, match="log-probabilities"):
        pool.candidates[0].engine.token_scores([1, 2], 0, 1)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"engine": "openai"}, "belong together"),
        ({"server": {"base_urls": ["http://a/v1"]}}, "belong together"),
        ({"engine": "openai", "server": {"base_urls": []}}, "at least 1"),
        ({"engine": "openai", "server": {"base_urls": ["http://a/v1"]}, "adapter": "x"}, "adapter"),
        ({"engine": "openai", "server": {"base_urls": ["http://a/v1", "b:80/v1"]}}, "'b:80/v1' is no base URL; allow"),
        ({"engine": "openai", "server": {"base_urls": ["http:///v1"]}}, "no base URL"),
    ],
)
def test_settings_that_do_not_go_together(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        CandidateConfig.model_validate({"name": "a", "model": "b", **settings})


def test_candidates_in_this_process_are_recorded_as_before() -> None:
    """Run folders are recognised by a hash of the pool's settings."""
    assert "server" not in CandidateConfig(name="a", model="b").model_dump(mode="json")


@pytest.mark.slow
def test_transformers_serve(ladder: Path) -> None:
    """A real server, which takes text only: a local switcher decides, greedy segments are the local model's."""
    pytest.importorskip("fastapi")
    import httpx

    port = 8971
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", "--port", str(port), "--device", "cpu"]
    log = ladder / "serve.log"
    with log.open("w") as stream, subprocess.Popen(command, stdout=stream, stderr=stream) as process:
        try:
            for _ in range(600):
                try:
                    httpx.get(f"http://127.0.0.1:{port}/health")
                    break
                except httpx.TransportError:
                    assert process.poll() is None, log.read_text()
                    time.sleep(0.2)
            local = Pool.load([CandidateConfig(name=name, model=str(ladder / name)) for name in ("base", "aligned")])
            config = CandidateConfig.model_validate(
                {"name": "aligned", "model": str(ladder / "aligned"), "engine": "openai",
                 "server": {"base_urls": [f"http://127.0.0.1:{port}/v1"]}}
            )  # fmt: skip
            pool = Pool.load([CandidateConfig(name="base", model=str(ladder / "base")), config])
            switcher = pool.load_switcher(SwitcherConfig(base="base"))
            decoding = DecodingConfig(max_new_tokens=16, segment=4, temperature=0)
            traces = generate(pool, QUERIES[:3], "untuned", decoding=decoding, switcher=switcher)
            assert all(trace.segments for trace in traces)
            alone = generate(local, QUERIES[:3], "aligned", decoding=decoding)
            remote = generate(pool, QUERIES[:3], "aligned", decoding=decoding)
            # What the server's tokens read as is tokenized again: only the first segment is sure to be the same text.
            for one, two in zip(remote, alone, strict=True):
                texts = one.segments[0].text, two.segments[0].text
                assert len({text[: min(map(len, texts))] for text in texts}) == 1
        finally:
            process.terminate()


def test_the_tests_own_text_is_stable() -> None:
    """The server's text must tokenize into at least as many tokens as were asked for."""
    from switchgen.vocabulary import Vocabulary

    vocabulary = Vocabulary(make_tokenizer(), "test")
    text, _ = ascii_text([1], 40)
    assert len(vocabulary.encode_text(text)) >= 40
