"""The server, asked by the real `openai` client: what it answers is what the loops write."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

httpx = pytest.importorskip("httpx")
openai = pytest.importorskip("openai")
uvicorn = pytest.importorskip("uvicorn")

from infer.serve.app import make_app  # noqa: E402
from infer.serve.command import main as serve  # noqa: E402
from infer.serve.feed import Feed, Piece  # noqa: E402
from infer.serve.worker import Worker  # noqa: E402
from switchgen.api import generate  # noqa: E402
from switchgen.config import DecodingConfig  # noqa: E402
from switchgen.errors import ConfigError, ServerError  # noqa: E402
from switchgen.ids import content_hash  # noqa: E402
from switchgen.rows import Row  # noqa: E402
from switchgen.rundir import Run  # noqa: E402
from switchgen.trace import Query, Segment  # noqa: E402
from switchgen.vocabulary import MAX_UTF8_EXTRA  # noqa: E402

MESSAGES = [{"role": "user", "content": "How old is person 3?"}]


class Server:
    """A server in this process, and clients of it."""

    def __init__(self, run: Run, worker: Worker, port: int) -> None:
        self.run, self.worker, self.port = run, worker, port

    def client(self, key: str = "none") -> Any:
        return openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key=key, max_retries=0, timeout=60)

    @property
    def pool(self) -> Any:
        return self.worker.writer("aligned").pool

    def wait_until_idle(self) -> None:
        deadline = time.monotonic() + 30
        while self.worker._num_rows:
            assert time.monotonic() < deadline, "rows are still being written"
            time.sleep(0.02)


@contextmanager
def serving(run: Run, *, api_key: str | None = None) -> Iterator[Server]:
    worker = Worker(run, max_waiting=run.recipe.serve.max_waiting)
    config = uvicorn.Config(make_app(worker, api_key=api_key), port=0, log_level="error")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield Server(run, worker, server.servers[0].sockets[0].getsockname()[1])
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def server(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(open_ladder(home, tmp_path_factory.mktemp("serve"))) as running:
        yield running


def open_ladder(home: Path, folder: Path, *overrides: str) -> Run:
    import yaml

    from switchgen.rundir import open_run

    names = ("base", "tuned", "aligned")
    recipe = {
        "pool": [{"name": name, "model": str(home / "ladder" / name), "dtype": "float64"} for name in names],
        "decoding": {"max_new_tokens": 16, "segment": 5},
        "engine": {"max_rows": 32, "threads": 1},
        "infer": {"policy": "random"},
        "serve": {"max_new_tokens": 400, "max_waiting": 64},
    }
    (folder / "ladder.yaml").write_text(yaml.safe_dump(recipe))
    return open_run(str(folder / "ladder.yaml"), overrides, folder / "run")


def expected(server: Server, policy: str, decoding: DecodingConfig, seed: int) -> Any:
    """What the library writes for the conversation, by itself."""
    writer = server.worker.call(lambda: server.worker.writer(policy)).result()
    query = Query(content_hash(MESSAGES), tuple(MESSAGES))
    return server.worker.call(
        lambda: generate(writer.pool, [query], writer.policy, decoding=decoding, seed=seed)[0]
    ).result()


# -- answers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["random", "untuned", "tuned", "baco-p@0.3"])
def test_a_chat_is_what_the_library_writes(server: Server, policy: str) -> None:
    answer = server.client().chat.completions.create(
        model=f"switchgen/{policy}", messages=MESSAGES, seed=7, max_tokens=23, temperature=1.1, top_p=0.8
    )
    decoding = server.run.recipe.decoding.model_copy(
        update={"max_new_tokens": 23, "temperature": 1.1, "top_p": 0.8}
    )  # fmt: skip
    trace = expected(server, policy, decoding, 7)
    (choice,) = answer.choices
    assert choice.message.content == trace.text
    segments = choice.switchgen["segments"]
    assert [segment["writer"] for segment in segments] == [server.pool.names[s.writer] for s in trace.segments]
    assert "".join(segment["text"] for segment in segments) == trace.text
    assert answer.usage.completion_tokens == trace.num_tokens
    assert choice.finish_reason == ("length" if trace.finish == "length" else "stop")
    if policy == "untuned":
        assert all(abs(sum(segment["scores"].values()) - 1) < 1e-4 for segment in segments)


def test_models_are_policies(server: Server) -> None:
    client = server.client()
    names = [model.id for model in client.models.list()]
    assert {"switchgen/base", "switchgen/aligned", "switchgen/random", "switchgen/untuned"} <= set(names)
    assert client.models.retrieve("switchgen/baco-h@0.5").id == "switchgen/baco-h@0.5"
    with pytest.raises(openai.NotFoundError, match="unknown policy"):
        client.models.retrieve("switchgen/nobody")


def test_seeds_and_choices(server: Server) -> None:
    """The same seed gives the same answers; each of the n choices is another; without a seed every answer is new."""

    def ask(**settings: Any) -> list[str]:
        answer = server.client().chat.completions.create(
            model="switchgen/random", messages=MESSAGES, temperature=1.5, top_p=1.0, max_tokens=12, **settings
        )
        return [choice.message.content for choice in answer.choices]

    four = ask(seed=1, n=4)
    assert len(set(four)) == 4
    assert four == ask(seed=1, n=4)
    assert ask(seed=1) == four[:1]
    assert ask(seed=2) != four[:1]
    assert ask() != ask()


def test_text_and_token_prompts(server: Server) -> None:
    """A completion's prompt is read as it is, by every candidate; as token ids it is the same prompt."""
    client = server.client()
    text = "The age of Vudak is"
    vocabulary = server.pool.vocabularies[0]
    ids = vocabulary.encode_text(text, opens=True)
    settings = {"model": "switchgen/random", "seed": 5, "max_tokens": 12}
    one = client.completions.create(prompt=text, **settings)
    other = client.completions.create(prompt=ids, **settings)
    both = client.completions.create(prompt=[ids, ids], n=2, **settings)
    assert one.choices[0].text == other.choices[0].text == both.choices[0].text
    assert one.usage.prompt_tokens == len(ids) and len(both.choices) == 4
    texts = [choice.text for choice in both.choices]
    assert len(set(texts)) == 4 and texts[0] == one.choices[0].text
    # The same answers, whatever else the request asks, and in which order.
    mixed = client.completions.create(prompt=[ids[:2], ids, ids[:3]], n=2, **settings)
    assert [choice.text for choice in mixed.choices][2:4] == texts[:2]
    echoed = client.completions.create(prompt=text, echo=True, **settings)
    assert echoed.choices[0].text == text + one.choices[0].text


def test_stop_strings(server: Server) -> None:
    settings = {"model": "switchgen/random", "prompt": "Vudak", "seed": 3, "max_tokens": 60, "temperature": 1.0}
    whole = server.client().completions.create(**settings).choices[0].text
    stop = next(whole[start : start + 3] for start in range(20, len(whole)) if "\ufffd" not in whole[start : start + 3])
    stopped = server.client().completions.create(stop=[stop, "never there"], **settings).choices[0]
    assert stopped.text == whole[: whole.index(stop)] and stopped.finish_reason == "stop"
    streamed = list(server.client().completions.create(stop=stop, stream=True, **settings))
    assert "".join(chunk.choices[0].text for chunk in streamed) == stopped.text


# -- log-probabilities -------------------------------------------------------------------------------------------------


def plain_logprobs(server: Server, candidate: int, ids: list[int]) -> torch.Tensor:
    """Log-probabilities after each token, shape [tokens, V], by one forward of the plain model."""
    engine = server.pool.candidates[candidate].engine

    def forward() -> torch.Tensor:
        engine.activate()
        with torch.inference_mode():
            return torch.log_softmax(engine.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0], dim=-1)

    return server.worker.call(forward).result()


def test_logprobs_of_prompt_and_answer(server: Server) -> None:
    ids = server.pool.vocabularies[0].encode_text("How old is Vudak", opens=True)
    answer = server.client().completions.create(
        model="switchgen/tuned", prompt=ids, max_tokens=8, logprobs=3, echo=True, seed=1
    )
    found = answer.choices[0].logprobs
    written = found.tokens[len(ids) :]
    assert found.token_logprobs[0] is None and found.top_logprobs[0] is None
    # A last character of several tokens is finished, but has no entries beyond `max_tokens`.
    assert len(written) == 8 <= answer.usage.completion_tokens
    logprobs_TV = plain_logprobs(server, 1, ids)
    for position, token in enumerate(ids[1:], start=1):
        assert found.token_logprobs[position] == pytest.approx(logprobs_TV[position - 1, token].item(), abs=1e-9)
        best = logprobs_TV[position - 1].topk(3).values.tolist()
        assert sorted(found.top_logprobs[position].values(), reverse=True) == pytest.approx(best, abs=1e-9)
    assert found.text_offset[: len(ids)] == sorted(found.text_offset[: len(ids)])
    scored = server.client().completions.create(
        model="switchgen/tuned", prompt=ids, max_tokens=0, logprobs=1, echo=True
    )
    assert scored.choices[0].logprobs.token_logprobs == pytest.approx(found.token_logprobs[: len(ids)], nan_ok=True)
    assert scored.usage.completion_tokens == 0


def test_logprobs_are_the_writers(server: Server) -> None:
    """Every token's log-probability is its own writer's, who has read what the others wrote."""
    answer = server.client().chat.completions.create(
        model="switchgen/random", messages=MESSAGES, max_tokens=20, seed=4, logprobs=True, top_logprobs=2
    )
    decoding = server.run.recipe.decoding.model_copy(update={"max_new_tokens": 20})
    trace = expected(server, "random", decoding, 4)
    row = Row(server.pool, trace.query, 0)
    wanted = []
    for segment in trace.segments:
        context = row.context(segment.writer).ids
        logprobs_TV = plain_logprobs(server, segment.writer, [*context, *segment.ids])
        wanted += [logprobs_TV[len(context) - 1 + k, token].item() for k, token in enumerate(segment.ids)]
        row.append(segment)
    got = answer.choices[0].logprobs.content
    assert len({segment.writer for segment in trace.segments}) > 1
    assert [entry.logprob for entry in got] == pytest.approx(wanted, abs=1e-9)
    assert b"".join(bytes(entry.bytes) for entry in got).decode(errors="replace") == trace.text
    assert all(len(entry.top_logprobs) == 2 for entry in got)


# -- streams -----------------------------------------------------------------------------------------------------------


def stream(server: Server, policy: str = "random", **settings: Any) -> list[Any]:
    return list(
        server.client().chat.completions.create(
            model=f"switchgen/{policy}", messages=MESSAGES, stream=True, stream_options={"include_usage": True},
            **settings,
        )
    )  # fmt: skip


@pytest.mark.parametrize("policy", ["random", "untuned", "baco-p@0.3"])
def test_a_stream_is_the_answer_in_pieces(server: Server, policy: str) -> None:
    settings = {"seed": 9, "max_tokens": 60, "n": 2}
    whole = server.client().chat.completions.create(model=f"switchgen/{policy}", messages=MESSAGES, **settings)
    chunks = stream(server, policy, **settings)
    assert chunks[-1].usage == whole.usage
    for index, choice in enumerate(whole.choices):
        own = [chunk.choices[0] for chunk in chunks if chunk.choices and chunk.choices[0].index == index]
        assert "".join(part.delta.content for part in own) == choice.message.content
        assert [part.finish_reason for part in own if part.finish_reason] == [choice.finish_reason]
        segments = [segment for part in own for segment in getattr(part, "switchgen", {}).get("segments", [])]
        assert segments == choice.switchgen["segments"]


def test_streams_share_batches(server: Server) -> None:
    """32 streams at once, of several policies and lengths, each as if it were alone."""
    server.wait_until_idle()
    engines = [candidate.engine for candidate in server.pool]
    before = [(engine.stats.decoded_tokens, engine.stats.steps) for engine in engines]

    def ask(seed: int) -> str:
        chunks = stream(server, "random" if seed % 4 else "aligned", seed=seed, max_tokens=120 + seed % 3)
        return "".join(chunk.choices[0].delta.content for chunk in chunks if chunk.choices)

    with ThreadPoolExecutor(32) as threads:
        together = list(threads.map(ask, range(32)))
    decoded, steps = (
        sum(getattr(engine.stats, name) - start[place] for engine, start in zip(engines, before, strict=True))
        for place, name in enumerate(("decoded_tokens", "steps"))
    )
    assert decoded / steps > 4
    assert [ask(seed) for seed in (0, 1, 31)] == [together[0], together[1], together[31]]


def test_who_leaves_takes_the_rows_along(server: Server) -> None:
    """A stream that is closed, and a client whose patience ends, while 400 tokens were asked for."""
    server.wait_until_idle()
    written = [candidate.engine.stats.decoded_tokens for candidate in server.pool]
    chunks = server.client().chat.completions.create(
        model="switchgen/base", messages=MESSAGES, stream=True, max_tokens=400, n=16, temperature=2.0, top_p=1.0
    )
    for _, chunk in zip(range(20), chunks, strict=False):
        assert chunk.choices
    chunks.close()
    with pytest.raises(openai.APITimeoutError):
        server.client().with_options(timeout=0.3).chat.completions.create(
            model="switchgen/base", messages=MESSAGES, max_tokens=400, n=16, temperature=2.0, top_p=1.0
        )
    server.wait_until_idle()
    decoded = sum(
        candidate.engine.stats.decoded_tokens - start for candidate, start in zip(server.pool, written, strict=True)
    )
    assert decoded < 2 * 16 * 400 * 0.8
    assert all(owner is None for candidate in server.pool for owner in candidate.engine.table.owners)


def test_nothing_of_a_stop_string_is_sent(server: Server) -> None:
    """Tokens are held back while they may be the beginning of a stop string, or of a character."""
    row = Row(server.pool, Query.from_text("x"), 0)
    pieces: list[Piece] = []
    feed = Feed(row, ["STOP"], pieces.append)
    feed._flush, feed._sent_at = feed._flush, -1e9
    for index, raw in enumerate((b"a\xc3", b"\xa9 S", b"TO", b"X ST", b"O", b"P tail")):
        feed._sent_at = -1e9
        feed.hear(index, raw)
    sent = [piece.text for piece in pieces]
    assert sent == ["a", "é ", "STOX "]
    row.append(Segment(0, "aé STOX ", (), "stop"))
    feed.finish()
    assert pieces[-1].text == "" and pieces[-1].finished and len(pieces[-1].segments) == 1


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "status", "said"),
    [
        ({"model": "switchgen/baco-p@x"}, 404, "baco-p"),
        ({"model": "switchgen/switcher"}, 404, "no switcher"),
        ({"max_tokens": 401}, 400, "at most 400"),
        ({"n": 0}, 400, "n:"),
        ({"temperature": -1}, 400, "temperature"),
        ({"stop": ""}, 400, "empty stop"),
        ({"presence_penalty": 0.5}, 400, "presence_penalty"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]}, 400, "tools"),
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, 400, "last one"),
        ({"messages": [{"role": "user", "content": " "}]}, 400, "empty"),
        ({"messages": [{"role": "user", "content": "Vudak " * 2000}]}, 400, "no room"),
        ({"messages": [{"role": "user", "content": "Vudak " * 2000}], "stream": True}, 400, "no room"),
        ({"stream": True, "logprobs": True}, 400, "logprobs"),
        ({"n": 97}, 400, "at most 96 here"),
    ],
)
def test_chats_that_are_refused(server: Server, settings: dict[str, Any], status: int, said: str) -> None:
    body = {"model": "switchgen/random", "messages": MESSAGES, **settings}
    with pytest.raises(openai.APIStatusError) as caught:
        server.client().chat.completions.create(**body)
    assert caught.value.status_code == status
    assert said in caught.value.body["message"]
    assert set(caught.value.body) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"prompt": [10**6]}, "token ids"),
        ({"prompt": []}, "empty"),
        ({"prompt": "x", "echo": True, "logprobs": 1}, "several"),
        ({"prompt": "x", "max_tokens": 0}, "echo"),
        ({"prompt": "x", "best_of": 3}, "best_of"),
        ({"prompt": "x", "suffix": "y"}, "suffix"),
        ({"prompt": ["x"] * 97}, "at most 96 here"),
        ({"prompt": ["x"] * 50_000, "n": 128}, "6400000 answers are asked for at once; at most 96 here"),
        ({"prompt": ["x", [1]]}, "a text, token ids, or a list of either"),
        ({"model": "aligned", "prompt": "Vudak " * 2000, "echo": True, "logprobs": 1, "max_tokens": 0}, "context"),
    ],
)
def test_completions_that_are_refused(server: Server, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(openai.BadRequestError, match=said):
        server.client().completions.create(**{"model": "switchgen/random", **settings})


def test_bodies_that_are_refused(server: Server) -> None:
    url = f"http://127.0.0.1:{server.port}/v1/chat/completions"
    assert httpx.post(url, content=b"{").json()["error"]["code"] == "invalid_json"
    assert httpx.post(url, content=b'"' + b"x" * (9 << 20)).status_code == 413
    assert httpx.post(url, content=b"[]").json()["error"]["message"] == "the request's body must be a JSON object"
    for body in (rb'{"model": "random", "prompt": "a\ud800"}', b'{"model": "random", "prompt": "a\xed\xa0\x80"}',
                 rb'{"model": "random", "prompt": "a", "stop": "\ud800"}'):  # fmt: skip
        answer = httpx.post(url.replace("chat/", ""), content=body)
        assert answer.status_code == 400 and "surrogate" in answer.json()["error"]["message"]
    assert httpx.get(url).status_code == 405
    assert httpx.get(f"http://127.0.0.1:{server.port}/v2").json()["error"]["message"] == "Not Found"
    assert httpx.get(f"http://127.0.0.1:{server.port}/health").status_code == 200


def test_the_key_and_a_round_that_fails(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the key nothing is answered. What goes wrong in a round is told, and the server goes on."""
    with serving(open_ladder(home, tmp_path), api_key="secret") as running:
        for key in ("wrong", "sécret".encode().decode("latin-1")):
            with pytest.raises(openai.AuthenticationError):
                running.client(key.encode("ascii", "ignore").decode()).models.list()
        url = f"http://127.0.0.1:{running.port}/v1/models"
        for scheme, status in (("Bearer ", 200), ("bearer  ", 200), ("", 401), ("Basic ", 401)):
            assert httpx.get(url, headers={"Authorization": f"{scheme}secret"}).status_code == status
        client = running.client("secret")
        settings = {"model": "aligned", "messages": MESSAGES, "seed": 1}
        before = client.chat.completions.create(**settings).choices[0].message.content
        engine = running.pool.candidates[2].engine
        write: Callable[..., Any] = engine.write
        monkeypatch.setattr(engine, "write", lambda *_: 1 / 0)
        with pytest.raises(openai.InternalServerError, match="ZeroDivisionError"):
            client.chat.completions.create(**settings)
        monkeypatch.setattr(engine, "write", write)
        assert client.chat.completions.create(**settings).choices[0].message.content == before


def test_a_full_queue_and_a_server_that_stops(home: Path, tmp_path: Path) -> None:
    """Beyond `serve.max_waiting` a request is asked to come back (429); who still waits at the end is told so (503)."""
    small = open_ladder(home, tmp_path, "engine.max_rows=1", "serve.max_waiting=1")
    with serving(small) as running, ThreadPoolExecutor(1) as thread:
        settings = {"model": "aligned", "messages": MESSAGES, "max_tokens": 400, "temperature": 2.0, "top_p": 1.0}
        # No answer ends early.
        running.pool.candidates[2].engine.stop_ids = frozenset()
        chunks = running.client().chat.completions.create(stream=True, **settings)
        next(iter(chunks))
        second = thread.submit(running.client().chat.completions.create, **settings)
        while running.worker._num_rows < 2:
            time.sleep(0.005)
        with pytest.raises(openai.RateLimitError, match="2 answers are being written or wait, 2 may") as refused:
            running.client().chat.completions.create(**settings)
        assert refused.value.response.headers["Retry-After"] == "1" and refused.value.code == "queue_full"
        running.worker.stop()
        with pytest.raises(openai.InternalServerError, match="the server is stopping") as stopped:
            second.result()
        assert stopped.value.status_code == 503 and stopped.value.code == "stopping"


def test_a_candidates_own_server_that_fails(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not this server's fault: a 502, and what went wrong there."""

    def fail(*_: Any) -> None:
        raise ServerError("aligned: no server answered in 3 tries")

    monkeypatch.setattr(server.pool.candidates[2].engine, "write", fail)
    with pytest.raises(openai.InternalServerError, match="no server answered in 3 tries") as caught:
        server.client().chat.completions.create(model="aligned", messages=MESSAGES)
    assert caught.value.status_code == 502


def test_a_key_of_other_letters(home: Path, tmp_path: Path) -> None:
    with serving(open_ladder(home, tmp_path), api_key="schlüssel-鍵") as running:
        url = f"http://127.0.0.1:{running.port}/v1/models"
        for key, status in (("schlüssel-鍵", 200), ("schlussel-鍵", 401)):
            assert httpx.get(url, headers={"Authorization": f"Bearer {key}".encode()}).status_code == status


@pytest.mark.parametrize("port", [-1, 65536])
def test_a_port_that_there_is_not(home: Path, tmp_path: Path, port: int) -> None:
    with pytest.raises(ConfigError, match=rf"port {port}; allowed: 0 \(a free one\) to 65535"):
        serve(open_ladder(home, tmp_path), port=port, say=print)


def test_the_command(home: Path, tmp_path: Path) -> None:
    """`switchgen serve` as a process: says its address, answers, and ends when it is interrupted."""
    run = open_ladder(home, tmp_path)
    recipe = tmp_path / "ladder.yaml"
    environment = {**os.environ, "SWITCHGEN_API_KEY": "secret", "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    command = [sys.executable, "-m", "switchgen", "serve", str(recipe), "--run-dir", str(run.dir), "--port", "0"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            said = process.stdout.readline()
            assert "serving base, tuned, aligned at http://127.0.0.1:" in said
            client = openai.OpenAI(base_url=said.split(" at ")[1].strip(), api_key="secret", max_retries=0)
            answer = client.chat.completions.create(model="switchgen/random", messages=MESSAGES, max_tokens=8)
            # A last character of several tokens is finished beyond the limit.
            assert answer.usage.completion_tokens <= 8 + MAX_UTF8_EXTRA
            port = said.strip().removesuffix("/v1").rpartition(":")[2]
            second = subprocess.run([*command[:-1], port], env=environment, capture_output=True, text=True, check=False)
            assert second.returncode == 2 and "cannot listen" in second.stderr
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=60) in (0, 130, -signal.SIGINT)
        finally:
            process.kill()


def test_lm_eval_drops_one_token_whatever_was_drawn(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval asks for one token and drops the last entry: an end of text had none, a character's first byte several,
    and the likelihood lacked a token of the continuation or held some of the answer."""
    pytest.importorskip("lm_eval")
    pytest.importorskip("tenacity")  # lm-eval[api]
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    from switchgen.engines import writing

    server.wait_until_idle()
    vocabulary = server.pool.vocabularies[0]
    (end,) = server.pool.candidates[1].engine.stop_ids
    ids = vocabulary.encode_text("How old is Vudak", opens=True)
    logprobs_TV = plain_logprobs(server, 1, ids)
    wanted = sum(logprobs_TV[place - 1, ids[place]].item() for place in range(2, len(ids)))
    first_byte = vocabulary.token_bytes.index("🙂".encode()[:1])
    for forced, stop in ((end, []), (first_byte, []), (vocabulary.token_bytes.index(b"a"), ["a"])):
        monkeypatch.setattr(
            writing, "sample_tokens", lambda logits_NV, *_, forced=forced: torch.full((len(logits_NV),), forced)
        )
        answer = server.client().completions.create(
            model="tuned", prompt=ids, max_tokens=1, logprobs=1, echo=True, temperature=0, seed=1, stop=stop
        )
        found = answer.choices[0].logprobs
        assert len(found.tokens) == len(found.token_logprobs) == len(found.text_offset) == len(ids) + 1
        ((total, _),) = LocalCompletionsAPI.parse_logprobs(answer.model_dump(), ctxlens=[2])
        assert total == pytest.approx(wanted, abs=1e-9)
        if forced == end:
            assert found.token_logprobs[-1] == pytest.approx(logprobs_TV[-1, end].item(), abs=1e-9)


@pytest.mark.slow
def test_lm_eval_scores_choices(server: Server) -> None:
    """lm-eval's `local-completions` gets the log-likelihoods that the candidate's plain model gives."""
    pytest.importorskip("lm_eval")
    pytest.importorskip("tenacity")  # lm-eval[api]
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    folder = server.run.recipe.pool[2].model
    model = LocalCompletionsAPI(
        base_url=f"http://127.0.0.1:{server.port}/v1/completions", model="switchgen/aligned", tokenizer=folder,
        tokenizer_backend="huggingface", max_length=512,
    )  # fmt: skip
    pairs = [("How old is Vudak?", " 12"), ("How old is Vudak?", " Vudak is"), ("A list:", " one")]
    asked = [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(pairs)]
    got = model.loglikelihood(asked)
    for (context, continuation), (total, _) in zip(pairs, got, strict=True):
        whole, head = model.tok_encode(context + continuation), model.tok_encode(context)
        logprobs_TV = plain_logprobs(server, 2, whole)
        wanted = sum(logprobs_TV[place - 1, whole[place]].item() for place in range(len(head), len(whole)))
        assert total == pytest.approx(wanted, abs=1e-6)
    print(json.dumps([total for total, _ in got]))
