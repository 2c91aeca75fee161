"""Serves the page to a browser, on this machine alone unless told otherwise, and lets it ask nobody else anything."""

from __future__ import annotations

import ipaddress
import os
import signal
import socket
import tempfile
from pathlib import Path
from typing import Any

from kestrel.chat.streaming import Speaker
from kestrel.config.settings import Generation
from kestrel.errors import Interrupted, KestrelError

# Whatever a library's page would load from elsewhere, a browser that is told this does not.
_POLICY = "default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'; form-action 'self'; frame-ancestors 'none'"


def serve(speaker: Speaker, persona: tuple[str, ...], settings: Generation, host: str, port: int) -> None:
    """Serves until Ctrl-C.

    Raises:
        KestrelError: it cannot listen there.
        Interrupted: Ctrl-C.
    """
    with listen(host, port) as listening, tempfile.TemporaryDirectory(prefix="kestrel-chat-") as folder:
        # Read when Gradio is imported: no telemetry, and nothing of a conversation left in the shared temporary folder.
        os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": str(Path(folder) / "cache")}
        import uvicorn

        server = uvicorn.Server(
            uvicorn.Config(
                application(speaker, persona, settings, host, Path(folder)), log_level="critical",
                timeout_graceful_shutdown=1,
            )
        )  # fmt: skip
        shown = f"[{host}]" if ":" in host else host
        print(f"http://{shown}:{listening.getsockname()[1]} in a browser; Ctrl-C ends it", flush=True)
        if not is_loopback(host):
            print(
                f"--host {host}: everybody who reaches this machine over the network can talk to the model and see "
                "the persona that it begins with. There is no password and no encryption.",
                flush=True,
            )
        try:
            server.run(sockets=[listening])
        except KeyboardInterrupt as error:
            number = error.exit_status - 128 if isinstance(error, Interrupted) else signal.SIGINT
            raise Interrupted(number, "stopped; what was not exported is gone") from None


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there; port 0 takes any that is free.

    Raises:
        KestrelError: no such address, or the port is taken.
    """
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family)
    except OSError as error:
        advice = "give another --port" if isinstance(error, OSError) and error.errno == 98 else "give another --host"
        raise KestrelError(f"cannot listen at {host}, port {port} ({error.strerror or error}); {advice}") from None


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches it."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def application(speaker: Speaker, persona: tuple[str, ...], settings: Generation, host: str, folder: Path) -> Any:
    """The page behind the two rules that a browser and this server keep for it."""
    import gradio as gr
    from fastapi import FastAPI
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    from kestrel.chat.page import CSS, THEME, Page

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    gr.mount_gradio_app(
        app,
        Page(speaker, persona, settings, folder).blocks().queue(api_open=False),
        path="/",
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        theme=THEME,
        css=CSS,
        allowed_paths=[str(folder)],
    )
    if is_loopback(host):
        # A page elsewhere whose name is made to resolve to this machine would otherwise be let in.
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost", host])

    async def with_policy(scope: Any, receive: Any, send: Any) -> None:
        async def add(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", _POLICY.encode())]
            await send(message)

        await app(scope, receive, add)

    return with_policy
