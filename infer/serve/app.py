"""The routes: /v1/models, /v1/chat/completions, /v1/completions, /health."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from infer.serve.answering import answer
from infer.serve.asked import find_writer, model_names
from infer.serve.protocol import PREFIX, ApiError, ChatBody, CompletionBody, parse
from infer.serve.worker import Worker
from switchgen.errors import SwitchgenError


def make_app(worker: Worker, *, api_key: str | None = None) -> FastAPI:
    """The application; it starts and stops the worker.

    Args:
        api_key: what clients must send as bearer token; None lets everybody in.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        worker.start()
        yield
        await asyncio.to_thread(worker.stop)

    # Bodies are checked by hand, so that every error looks as OpenAI's clients expect it: no generated pages.
    app = FastAPI(title="switchgen", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    largest = int(worker.run.recipe.serve.max_body_mb * 2**20)

    def check_key(request: Request) -> None:
        # Headers are read as Latin-1: what the client sent are these bytes.
        kind, _, given = request.headers.get("authorization", "").strip().partition(" ")
        sent = given.strip() if kind.lower() == "bearer" else ""
        if api_key is not None and not secrets.compare_digest(sent.encode("latin-1"), api_key.encode()):
            raise ApiError(401, "the API key is missing or wrong", code="invalid_api_key")

    async def refuse(_: Request, error: Exception) -> JSONResponse:
        if isinstance(error, HTTPException):
            error = ApiError(error.status_code, str(error.detail))
        elif isinstance(error, SwitchgenError):
            error = ApiError(400, str(error))
        assert isinstance(error, ApiError)
        headers = {"Retry-After": "1"} if error.status == 429 else None
        return JSONResponse(error.body(), error.status, headers)

    async def health() -> dict[str, str]:
        return {"status": "ok"}

    async def models(request: Request) -> dict[str, Any]:
        check_key(request)
        names = await asyncio.wrap_future(worker.call(lambda: model_names(worker)))
        return {"object": "list", "data": [_model(name) for name in names]}

    async def model(request: Request, name: str) -> dict[str, Any]:
        check_key(request)
        await asyncio.wrap_future(worker.call(lambda: find_writer(worker, name)))
        return _model(name)

    async def chat(request: Request) -> Response:
        check_key(request)
        return await answer(worker, request, parse(ChatBody, await read_body(request, largest)))

    async def completions(request: Request) -> Response:
        check_key(request)
        return await answer(worker, request, parse(CompletionBody, await read_body(request, largest)))

    app.add_exception_handler(ApiError, refuse)
    app.add_exception_handler(HTTPException, refuse)
    app.add_exception_handler(SwitchgenError, refuse)
    app.add_api_route("/health", health)
    app.add_api_route("/v1/models", models)
    app.add_api_route("/v1/models/{name:path}", model)
    app.add_api_route("/v1/chat/completions", chat, methods=["POST"], response_model=None)
    app.add_api_route("/v1/completions", completions, methods=["POST"], response_model=None)
    return app


async def read_body(request: Request, largest: int) -> Any:
    """A request's JSON.

    Args:
        largest: bytes that are read at most.

    Raises:
        ApiError: 413, too large; 400, no JSON, or a half of a surrogate pair in it, which no tokenizer takes.
    """
    raw = b""
    async for part in request.stream():
        raw += part
        if len(raw) > largest:
            raise ApiError(413, f"the request is larger than {largest} bytes", code="request_too_large")
    try:
        value = json.loads(raw)
        json.dumps(value, ensure_ascii=False).encode()
        return value
    except UnicodeEncodeError:
        raise ApiError(400, "the request holds half a surrogate pair, which is no text", code="invalid_json") from None
    except (ValueError, RecursionError):
        raise ApiError(400, "the request's body is no JSON", code="invalid_json") from None


def _model(name: str) -> dict[str, Any]:
    return {"id": PREFIX + name.removeprefix(PREFIX), "object": "model", "created": 0, "owned_by": "switchgen"}
