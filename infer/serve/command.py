"""`switchgen serve`: load, listen, answer until it is stopped."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable

from switchgen.errors import ConfigError
from switchgen.rundir import Run

logger = logging.getLogger("switchgen")

API_KEY = "SWITCHGEN_API_KEY"
_GRACE = 10
"""Seconds that answers may still take when the server is told to stop."""
_LOCAL = ("127.0.0.1", "localhost", "::1")


def main(run: Run, *, host: str | None = None, port: int | None = None, say: Callable[[str], None]) -> None:
    """Serve a recipe's pool until interrupted.

    Args:
        host, port: defaults are the recipe's (section `serve`).
        say: is told the address once requests are answered.

    Raises:
        ConfigError: the server's libraries are missing, or the address cannot be used.
    """
    try:
        import uvicorn  # noqa: PLC0415

        from infer.serve.app import make_app  # noqa: PLC0415
    except ImportError as error:
        raise ConfigError(f"serve needs {error.name}: pip install 'switchgen[serve]'") from None
    import socket  # noqa: PLC0415

    from infer.serve.worker import Worker  # noqa: PLC0415

    settings = run.recipe.serve
    host, port = host or settings.host, settings.port if port is None else port
    if not 0 <= port <= 65535:
        raise ConfigError(f"serve: port {port}; allowed: 0 (a free one) to 65535")
    api_key = os.environ.get(API_KEY, "").strip() or None
    if api_key is None and host not in _LOCAL:
        logger.warning("serve: listening on %s without an API key: everybody who reaches it may use it; set %s",
                       host, API_KEY)  # fmt: skip
    try:
        # Bound before the models are loaded: an address in use is known at once.
        listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise ConfigError(f"serve: cannot listen on {host}:{port}: {error.strerror or error}") from None
    with listener:
        worker = Worker(run, max_waiting=settings.max_waiting)
        app = make_app(worker, api_key=api_key)
        say(f"serving {', '.join(run.recipe.names)} at http://{host}:{listener.getsockname()[1]}/v1")
        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=_GRACE)
        uvicorn.Server(config).run(sockets=[listener])
