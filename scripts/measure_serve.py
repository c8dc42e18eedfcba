"""Tokens per second of 32 concurrent streams ÷ those of a batch of the same rows.

    python scripts/measure_serve.py [--policy untuned] [--queries 96] [--new-tokens 256] [--repeats 3]

Three candidates of the bench's size `tiny` and a switcher, random weights, one thread. The server is a process of its
own; the clients are 32 streams in this one, which also writes the batch. Both write the same responses, token for
token (checked). Clocks: wall (the clients' own work is in it: one core does everything), and the processor seconds of
the server against those of the batch; `http_share` is the part of the server's that its main thread took, which talks
to the clients while the other writes. One JSON line last.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import yaml  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from infer.bench.ladders import NAMES, SIZES, make_tokenizer  # noqa: E402
from switchgen.api import generate  # noqa: E402
from switchgen.assembly import Writer, load_writers  # noqa: E402
from switchgen.ids import content_hash  # noqa: E402
from switchgen.rundir import Run, open_run  # noqa: E402
from switchgen.trace import Query  # noqa: E402

STREAMS = 32


def save_ladder(folder: Path, policy: str, new_tokens: int) -> Path:
    """Models that never end a text by themselves, and a recipe over them."""
    shape = SIZES["tiny"]
    for seed, name in enumerate(NAMES):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(shape.config())
        with torch.no_grad():
            model.get_output_embeddings().weight.mul_(4)
        model.save_pretrained(folder / name)
        make_tokenizer(shape.vocab_size)(chat=seed > 0).save_pretrained(folder / name)
    recipe = {
        "pool": [{"name": name, "model": str(folder / name)} for name in NAMES],
        "decoding": {"max_new_tokens": new_tokens, "segment": 50},
        "engine": {"max_rows": STREAMS, "threads": 1},
        "infer": {"policy": policy},
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    return folder / "tiny.yaml"


def batch(writer: Writer, run: Run, conversations: list[list[dict[str, str]]]) -> tuple[list[str], int, float, float]:
    """Responses, their tokens, wall and processor seconds of one batch."""
    queries = [Query(content_hash(messages), tuple(messages)) for messages in conversations]
    wall, cpu = time.perf_counter(), time.process_time()
    traces = generate(
        writer.pool, queries, writer.policy, decoding=run.recipe.decoding, seed=0, max_rows=STREAMS
    )  # fmt: skip
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return [trace.text for trace in traces], sum(trace.num_tokens for trace in traces), wall, cpu


async def streams(url: str, policy: str, conversations: list[list[dict[str, str]]]) -> list[str]:
    """Responses, 32 streams at a time, over plain sockets: a client's own work would count as the server's."""
    free, place = asyncio.Semaphore(STREAMS), urlsplit(url)

    async def ask(messages: list[dict[str, str]]) -> str:
        body = {"model": f"switchgen/{policy}", "messages": messages, "seed": 0, "stream": True}
        data = json.dumps(body).encode()
        async with free:
            reader, writer = await asyncio.open_connection(place.hostname, place.port)
            # HTTP/1.0: the response is what comes until the server closes, event by event.
            writer.write(b"POST %s/chat/completions HTTP/1.0\r\nContent-Type: application/json\r\n"
                         b"Content-Length: %d\r\n\r\n%s" % (place.path.encode(), len(data), data))  # fmt: skip
            head, _, events = (await reader.read()).partition(b"\r\n\r\n")
            writer.close()
        assert b" 200 " in head.split(b"\r\n")[0], head
        chunks = [json.loads(line[6:]) for line in events.decode().split("\n") if line.startswith("data: {")]
        return "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)

    return list(await asyncio.gather(*map(ask, conversations)))


def cpu_seconds(pid: int) -> tuple[float, float]:
    """Processor seconds of a process, and of its main thread."""

    def spent(file: str) -> float:
        fields = Path(file).read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    return spent(f"/proc/{pid}/stat"), spent(f"/proc/{pid}/task/{pid}/stat")


def measure(server: subprocess.Popen[str], url: str, run: Run, arguments: argparse.Namespace) -> dict[str, Any]:
    """Interleaved repeats."""
    policy = arguments.policy
    writer = load_writers(run, [policy])[policy]
    conversations = [
        [{"role": "user", "content": f"What is {row}? " * (2 + row % 6)}] for row in range(arguments.queries)
    ]
    walls, cpus, http, rates, same = [], [], [], [], True
    for repeat in range(-1, arguments.repeats):
        # The first one warms up.
        chosen = conversations if repeat >= 0 else conversations[:STREAMS]
        texts, tokens, wall, cpu = batch(writer, run, chosen)
        started, before = time.perf_counter(), cpu_seconds(server.pid)
        streamed = asyncio.run(streams(url, policy, chosen))
        served = time.perf_counter() - started
        spent, talked = (now - then for now, then in zip(cpu_seconds(server.pid), before, strict=True))
        same &= streamed == texts
        if repeat >= 0:
            walls.append(wall / served)
            cpus.append(cpu / spent)
            http.append(talked / spent)
            rates.append((tokens / served, tokens / wall))
    return {
        "measure": "serve",
        "policy": policy,
        "queries": arguments.queries,
        "streams": STREAMS,
        "new_tokens": arguments.new_tokens,
        "serve_over_infer": round(statistics.median(walls), 3),
        "serve_over_infer_cpu": round(statistics.median(cpus), 3),
        "http_share": round(statistics.median(http), 3),
        "serve_tokens_per_s": round(statistics.median(rate for rate, _ in rates), 1),
        "infer_tokens_per_s": round(statistics.median(rate for _, rate in rates), 1),
        "same_responses": same,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", default="untuned", choices=["untuned", "random", *NAMES])
    parser.add_argument("--queries", type=int, default=96)
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        recipe = save_ladder(Path(name), arguments.policy, arguments.new_tokens)
        run = open_run(str(recipe), (), Path(name) / "run")
        command = [sys.executable, "-m", "switchgen", "serve", str(recipe), "--run-dir", name + "/run", "--port", "0"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout is not None
            found = re.search(r"http://\S+", server.stdout.readline())
            assert found is not None, "the server did not start"
            try:
                line = measure(server, found.group(), run, arguments)
            finally:
                server.terminate()
    line["passed"] = line["same_responses"] and line["serve_over_infer"] >= 0.8
    print(json.dumps(line))
    return 0 if line["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
