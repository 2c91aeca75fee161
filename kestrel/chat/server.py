"""Serves the page to browsers, by default on this machine only, and keeps both sides from talking to anybody else."""

from __future__ import annotations

import errno
import ipaddress
import os
import re
import signal
import socket
import tempfile
from typing import Any
from urllib.parse import urlsplit

from kestrel.chat.streaming import ChatModel
from kestrel.config.settings import Generation
from kestrel.errors import Interrupted, KestrelError

# The browser then loads nothing from other servers, whatever the page's library would like to load.
_POLICY = "default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'; form-action 'self'; frame-ancestors 'none'"
# All that the page requests. Gradio (6.31) has more routes, among them uploads and files, which the page does not need.
_ROUTES = re.compile(
    r"/(|config|theme\.css|favicon\.ico|manifest\.json|pwa_icon(/\d+)?|(assets|static|svelte)/.+"
    r"|gradio_api/(info|startup-events|queue/join|queue/data|heartbeat/\w+|reset|cancel))"
)


def serve(model: ChatModel, persona: tuple[str, ...], settings: Generation, host: str, port: int) -> None:
    """Serves until Ctrl-C.

    Raises:
        KestrelError: the address cannot be listened at.
        Interrupted: Ctrl-C.
    """
    with listen(host, port) as listening, tempfile.TemporaryDirectory(prefix="kestrel-chat-") as folder:
        # Gradio reads both when it is imported: no telemetry, and no shared temporary folder.
        os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": folder}
        import uvicorn

        application = build_application(model, persona, settings, host)
        server = uvicorn.Server(uvicorn.Config(application, log_level="critical", timeout_graceful_shutdown=1))
        shown = f"[{host}]" if ":" in host else host
        print(f"Open http://{shown}:{listening.getsockname()[1]} in a browser; Ctrl-C ends the server.", flush=True)
        if not is_loopback(host):
            print(
                f"--host {host}: everybody who can reach this machine over the network can talk to the model and see "
                "the first persona. The page has no password and no encryption.",
                flush=True,
            )
        try:
            server.run(sockets=[listening])
        except KeyboardInterrupt as error:
            number = error.exit_status - 128 if isinstance(error, Interrupted) else signal.SIGINT
            raise Interrupted(number, "stopped; conversations that were not exported are lost") from None


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens at the address; port 0 takes any free port.

    Raises:
        KestrelError: the address does not exist, or the port is taken.
    """
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family)
    except OSError as error:
        advice = "give another --port" if error.errno == errno.EADDRINUSE else "give another --host"
        raise KestrelError(f"cannot listen at {host}, port {port} ({error.strerror or error}); {advice}") from None


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def build_application(model: ChatModel, persona: tuple[str, ...], settings: Generation, host: str) -> Any:
    """The page as an ASGI application that refuses what does not come from the page itself."""
    import gradio as gr
    from fastapi import FastAPI
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    from kestrel.chat.page import CSS, THEME, Page

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    blocks = Page(model, persona, settings).blocks().queue(api_open=False)
    gr.mount_gradio_app(app, blocks, path="/", footer_links=[], run_history=False, ssr_mode=False, theme=THEME, css=CSS)
    if is_loopback(host):
        # Against DNS rebinding: a page elsewhere whose host name is made to resolve to this machine.
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost", host])

    async def guarded(scope: Any, receive: Any, send: Any) -> None:
        async def send_with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", _POLICY.encode())]
            await send(message)

        status = refusal(scope["path"], dict(scope["headers"])) if scope["type"] == "http" else None
        if status is None:
            await app(scope, receive, send_with_policy)
        else:
            await send({"type": "http.response.start", "status": status, "headers": []})
            await send({"type": "http.response.body"})

    return guarded


def refusal(path: str, headers: dict[bytes, bytes]) -> int | None:
    """The status that refuses a request for another route or from another site; None lets it through."""
    origin = headers.get(b"origin")
    if origin is not None and urlsplit(origin).netloc != headers.get(b"host"):
        return 403
    return None if _ROUTES.fullmatch(path) else 404
