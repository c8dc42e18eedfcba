"""One request, from its rows to its answer: whole, or as a stream of server-sent events."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from infer.serve.answers import Answer, Scored, score_answer
from infer.serve.asked import Asked, check_prompts_fit, scorer_of, understand
from infer.serve.feed import Feed, Piece
from infer.serve.protocol import ApiError, ChatBody, CompletionBody
from infer.serve.worker import Ticket, Worker

_LOOK = 0.2
"""Seconds between looks at whether a client is still there."""

Event = tuple[int, Piece | Exception]
"""A choice's index, and what is new of it."""


async def answer(worker: Worker, request: Request, body: ChatBody | CompletionBody) -> Response:
    """Write what a request asks for. A client that leaves takes its rows with it.

    Raises:
        ApiError: see `understand` and `Worker.enter`; 400 for a prompt beyond the context.
    """
    events: asyncio.Queue[Event] = asyncio.Queue()
    asked = await _begin(worker, body, events)
    reply = Answer(asked, body)
    if not body.stream:
        try:
            scores = await _whole(worker, request, asked, body, events)
        finally:
            _cancel(asked)
        return JSONResponse(reply.whole(scores))
    try:
        # What is refused is refused with a status code, so the stream begins with its first piece.
        first = await _or_leave(request, events.get())
        _check(first[1], asked)
    except BaseException:
        _cancel(asked)
        raise
    return StreamingResponse(_stream(reply, first, events), media_type="text/event-stream")


async def _begin(worker: Worker, body: ChatBody | CompletionBody, events: asyncio.Queue[Event]) -> Asked:
    """Understand a request and put its rows in, between the same two rounds."""
    loop = asyncio.get_running_loop()

    def begin() -> Asked:
        asked = understand(worker, body)
        if isinstance(body, CompletionBody) and body.echo and body.num_top is not None:
            check_prompts_fit(asked, scorer_of(asked))
        if body.limit != 0:
            worker.enter(_tickets(asked, body, events, loop))
        return asked

    begun = worker.call(begin)
    try:
        return await asyncio.wrap_future(begun)
    except asyncio.CancelledError:
        # The client has left; rows that are in by now end.
        begun.add_done_callback(lambda done: done.cancelled() or done.exception() or _cancel(done.result()))
        raise


def _tickets(
    asked: Asked, body: ChatBody | CompletionBody, events: asyncio.Queue[Event], loop: asyncio.AbstractEventLoop
) -> list[Ticket]:
    """Rows whose news arrive in `events`: all of them in streams, the end alone otherwise."""

    def ticket(index: int) -> Ticket:
        def tell(news: Piece | Exception) -> None:
            # After the last client has left a server that is stopping, nobody listens any more.
            if not loop.is_closed():
                loop.call_soon_threadsafe(events.put_nowait, (index, news))

        row = asked.rows[index]
        if body.stream:
            feed = Feed(row, asked.decoding.stop, tell)
            row.listener = feed.hear
            return Ticket(row, asked.writer.name, feed.finish, tell)
        return Ticket(row, asked.writer.name, lambda: tell(Piece("", finished=True)), tell)

    return [ticket(index) for index in range(len(asked.rows))]


def _cancel(asked: Asked) -> None:
    for row in asked.rows:
        row.cancelled = True


def _check(news: Piece | Exception, asked: Asked) -> None:
    if isinstance(news, Exception):
        raise news
    if any(row.trace.finish == "too_long" for row in asked.rows):
        raise ApiError(
            400, f"the prompt ({asked.prompt_tokens} tokens) leaves no room in the context of a model that reads it",
            code="context_length_exceeded",
        )  # fmt: skip


async def _or_leave(request: Request, work: Any) -> Any:
    """The work's result; the work is given up when the client leaves.

    Raises:
        ApiError: 499, it has left (nobody reads this).
    """
    task = asyncio.ensure_future(work)
    while not (await asyncio.wait({task}, timeout=_LOOK))[0]:
        if await request.is_disconnected():
            task.cancel()
            raise ApiError(499, "the client has left")
    return task.result()


async def _whole(
    worker: Worker, request: Request, asked: Asked, body: ChatBody | CompletionBody, events: asyncio.Queue[Event]
) -> list[list[Scored] | None]:
    """Wait until all rows have ended; their log-probabilities, where they are wanted."""
    for _ in range(len(asked.rows) if body.limit != 0 else 0):
        _, news = await _or_leave(request, events.get())
        _check(news, asked)
    if body.num_top is None:
        return [None] * len(asked.rows)

    def scoring(index: int) -> Callable[[], list[Scored]]:
        return lambda: score_answer(asked, asked.rows[index], body)

    # One by one: rounds of other requests come between.
    return [
        await _or_leave(request, asyncio.wrap_future(worker.call(scoring(index)))) for index in range(len(asked.rows))
    ]


async def _stream(reply: Answer, first: Event, events: asyncio.Queue[Event]) -> AsyncIterator[str]:
    """Server-sent events; when the client leaves, the generator is closed and the rows end."""
    try:
        for chunk in reply.first_chunks():
            yield _event(chunk)
        going, event = len(reply.asked.rows), first
        while True:
            index, news = event
            if isinstance(news, Exception):
                error = news if isinstance(news, ApiError) else ApiError(500, str(news))
                yield _event(error.body())
                return
            yield _event(reply.chunk(index, news))
            going -= news.finished
            if not going:
                break
            event = await events.get()
        if reply.body.stream_options is not None and reply.body.stream_options.include_usage:
            yield _event(reply.last_chunk())
        yield "data: [DONE]\n\n"
    finally:
        _cancel(reply.asked)


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"
