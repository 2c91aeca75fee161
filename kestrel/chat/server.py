"""Serves the page to browsers, by default on this machine only, and keeps both sides from talking to anybody else."""

from __future__ import annotations

import errno
import ipaddress
import os
import re
import secrets
import signal
import socket
import tempfile
from typing import Any
from urllib.parse import parse_qs, urlsplit

from kestrel.chat.conversation import Conversation
from kestrel.chat.streaming import ChatModel
from kestrel.config.settings import Generation
from kestrel.errors import Interrupted, KestrelError

# The browser loads nothing from other servers, and runs no script that an answer or a persona brings along: inline scripts
# need the nonce of this response. Gradio (6.31) makes functions of the page's own scripts from text, hence unsafe-eval.
_POLICY = (
    "default-src 'none'; script-src 'self' 'nonce-{}' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; connect-src 'self'; "
    "img-src 'self' data: blob:; font-src 'self' data:; manifest-src 'self'; worker-src 'self' blob:; form-action 'self'; "
    "frame-ancestors 'none'; base-uri 'none'"
)
_COOKIE = "kestrel_token"
_LONGEST_BODY = 2**20  # bytes: a persona and a message
# All that the page requests. Gradio (6.31) has more routes, among them uploads and files, which the page does not need.
_ROUTES = re.compile(
    r"/(|config|theme\.css|favicon\.ico|manifest\.json|pwa_icon(/\d+)?|(assets|static|svelte)/.+"
    r"|gradio_api/(info|startup-events|queue/join|queue/data|heartbeat/\w+|reset|cancel))"
)


def serve(model: ChatModel, conversation: Conversation, settings: Generation, host: str, port: int) -> None:
    """Serves until Ctrl-C.

    Raises:
        KestrelError: the address cannot be listened at.
        Interrupted: Ctrl-C.
    """
    with listen(host, port) as listening, tempfile.TemporaryDirectory(prefix="kestrel-chat-") as folder:
        # Gradio reads both when it is imported: no telemetry, and no shared temporary folder.
        os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": folder}
        import uvicorn

        token = None if is_loopback(host) else secrets.token_urlsafe(16)
        application = build_application(model, conversation, settings, host, token)
        server = uvicorn.Server(uvicorn.Config(application, log_level="critical", timeout_graceful_shutdown=1))
        shown = f"[{host}]" if ":" in host else host
        address = f"http://{shown}:{listening.getsockname()[1]}{f'/?token={token}' if token else ''}"
        print(f"Open {address} in a browser; Ctrl-C ends the server.", flush=True)
        if token:
            print(
                f"--host {host}: everybody who knows this address can talk to the model and see the first persona. The "
                "token in it is new each time; nothing is encrypted.",
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
    if not 0 <= port < 2**16:  # the system would take another one
        raise KestrelError(f"cannot listen at {host}, port {port}: ports end at 65535; give another --port")
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family)
    except (OSError, UnicodeError) as error:  # UnicodeError: of a name that no host can have
        advice = "give another --port" if getattr(error, "errno", None) == errno.EADDRINUSE else "give another --host"
        reason = getattr(error, "strerror", None) or error
        raise KestrelError(f"cannot listen at {host}, port {port} ({reason}); {advice}") from None


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def build_application(
    model: ChatModel, conversation: Conversation, settings: Generation, host: str, token: str | None
) -> Any:
    """The page as an ASGI application that refuses what does not come from the page itself, or lacks the token."""
    import gradio as gr
    from fastapi import FastAPI
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    from kestrel.chat.page import CSS, THEME, blocks
    from kestrel.chat.page_events import Events

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    page = blocks(Events(model, conversation, settings, is_loopback(host))).queue(api_open=False)
    gr.mount_gradio_app(app, page, path="/", footer_links=[], run_history=False, ssr_mode=False, theme=THEME, css=CSS)
    if is_loopback(host):
        # Against DNS rebinding: a page elsewhere whose host name is made to resolve to this machine.
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "[::1]", "localhost", host])

    async def guarded(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await app(scope, receive, send)
            return
        if scope["type"] != "http":  # a web socket, which the page does not open
            await send({"type": "websocket.close"})
            return
        given = dict(scope["headers"])
        status = refusal(scope["path"], given)
        headers: list[tuple[bytes, bytes]] = []
        if status is None and token and not _has(given.get(b"cookie", b""), token):
            status = 401
            if parse_qs(scope["query_string"].decode("latin-1")).get("token") == [
                token
            ]:  # once; then the cookie serves
                cookie = f"{_COOKIE}={token}; Path=/; HttpOnly; SameSite=Strict"
                status, headers = 303, [(b"location", b"/"), (b"set-cookie", cookie.encode())]
        if status is None:
            await app(scope, receive, _with_policy(send) if scope["path"] == "/" else send)
        else:
            await send({"type": "http.response.start", "status": status, "headers": headers})
            await send({"type": "http.response.body", "body": _REASONS.get(status, b"")})

    return guarded


_REASONS = {401: b"Open the address that chat.py printed; it holds the token.\n"}


def _has(cookies: bytes, token: str) -> bool:
    """Whether a Cookie header brings the token."""
    given = [cookie.strip() for cookie in cookies.split(b";")]
    return any(secrets.compare_digest(cookie, f"{_COOKIE}={token}".encode()) for cookie in given)


def _with_policy(send: Any) -> Any:
    """Sends the page with a policy and with the policy's nonce in each of its own scripts."""
    nonce, start, body = secrets.token_urlsafe(16), {}, bytearray()

    async def send_page(message: Any) -> None:
        if message["type"] == "http.response.start":
            start.update(message)
            return
        body.extend(message.get("body", b""))
        if message.get("more_body"):
            return
        page = bytes(body).replace(b"<script", f'<script nonce="{nonce}"'.encode())
        kept = [(name, value) for name, value in start["headers"] if name.lower() != b"content-length"]
        policy = (b"content-security-policy", _POLICY.format(nonce).encode())
        await send({**start, "headers": [*kept, policy, (b"content-length", str(len(page)).encode())]})
        await send({"type": "http.response.body", "body": page})

    return send_page


def refusal(path: str, headers: dict[bytes, bytes]) -> int | None:
    """The status that refuses a request for another route, from another site or with a large body; None lets it through."""
    origin = headers.get(b"origin")
    if origin is not None and urlsplit(origin).netloc != headers.get(b"host"):
        return 403
    if not _ROUTES.fullmatch(path):
        return 404
    if b"transfer-encoding" in headers:
        return 411
    return 413 if int(headers.get(b"content-length", b"0")) > _LONGEST_BODY else None
