"""Who the page of chat.py serves, and what it sends and runs."""

from __future__ import annotations

import http.client
import socket
import time
import urllib.error
import urllib.request
from urllib.parse import urlsplit

import pytest
from browsers import requested
from chat_page import AS_PERSONA, LONG, Page, Served

import chat
from kestrel.chat.server import is_loopback, listen
from kestrel.errors import KestrelError


@pytest.mark.parametrize(
    ("host", "alone"), [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("box", False)]
)
def test_which_hosts_are_loopback(host, alone):
    assert is_loopback(host) is alone


@pytest.mark.parametrize(("host", "port", "advice"), [("a..b\udc9b", 0, "--host"), ("127.0.0.1", 70000, "--port")])
def test_an_address_that_is_none_is_refused(host, port, advice):
    with pytest.raises(KestrelError, match=f"give another {advice}"):
        listen(host, port)


def test_no_request_leaves_this_machine(browser, served):
    """The page asks nobody else, and a script in it could not."""
    requested(browser)  # forget those of other tests
    page = Page(browser, served.url)
    page.say("hi !")
    asked = {urlsplit(url) for url in requested(page.browser)}
    assert {url.netloc for url in asked if url.scheme not in ("data", "blob")} == {f"127.0.0.1:{served.port}"}
    blocked = "fetch('http://example.org/').then(() => arguments[0]('fetched'), () => arguments[0]('refused'))"
    assert page.browser.execute_async_script(blocked) == "refused"
    assert any("Content Security Policy" in entry["message"] for entry in page.browser.get_log("browser"))


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        ("", {"Host": "elsewhere.example"}, 400),
        ("", {"Origin": "http://elsewhere.example"}, 403),
        ("gradio_api/queue/join", {"Origin": "null"}, 403),
        ("gradio_api/upload", {}, 404),
        ("gradio_api/file=/etc/passwd", {}, 404),
        ("gradio_api/proxy=http://example.org", {}, 404),
        ("monitoring", {}, 404),
    ],
)
def test_requests_from_elsewhere_and_other_routes_are_refused(served, path, headers, status):
    with pytest.raises(urllib.error.HTTPError, match=str(status)):
        urllib.request.urlopen(urllib.request.Request(f"{served.url}{path}", headers=headers))


def test_a_large_body_is_refused_before_it_is_read_and_so_is_a_web_socket(served):
    def status(*headers: tuple[str, str], path: str = "/gradio_api/queue/join", method: str = "POST") -> int:
        connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=30)
        connection.putrequest(method, path)
        for name, value in headers:
            connection.putheader(name, value)
        connection.endheaders()
        return connection.getresponse().status

    assert status(("Content-Length", str(10**8))) == 413
    assert status(("Transfer-Encoding", "chunked")) == 411
    upgrade = (("Connection", "Upgrade"), ("Upgrade", "websocket"), ("Sec-WebSocket-Version", "13"))
    key = ("Sec-WebSocket-Key", "AAAAAAAAAAAAAAAAAAAAAA==")
    assert status(*upgrade, key, ("Origin", "http://elsewhere.example"), path="/", method="GET") == 403


def test_only_this_machine_is_served(served, trained, capsys):
    assert "everybody" not in served.printed
    with socket.socket() as outside:
        assert outside.connect_ex(("127.0.0.2", served.port)) != 0  # it listens at one address, not at all
    taken = trained.arguments(*AS_PERSONA, "--web", "--port", str(served.port))
    assert chat.main(taken) == 1
    assert f"cannot listen at 127.0.0.1, port {served.port}" in capsys.readouterr().err


def test_an_open_host_wants_the_token_that_was_printed_and_keeps_it_out_of_the_address(trained, browser, tmp_path):
    def status(path: str, **headers: str) -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
        connection.request("GET", path, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.getheader("Set-Cookie") or answer.read().decode(errors="replace")

    (tmp_path / "kestrel" / "personas").mkdir(parents=True)
    (tmp_path / "kestrel" / "personas" / "hidden-one.txt").write_text("i am saved .")
    with Served(trained.arguments(*LONG), "--host", "0.0.0.0", XDG_CONFIG_HOME=str(tmp_path)) as server:
        assert server.process.stdout and len(server.token) > 20
        assert "nothing is encrypted" in server.process.stdout.readline()
        wrong = f"{server.token[:-1]}_"
        for path in ("/", "/config", "/?token=", f"/?token={wrong}", "/gradio_api/info"):
            assert status(path)[0] == 401
            assert status(path, Cookie=f"kestrel_token={wrong}")[0] == 401
        assert "holds the token" in status("/")[1]
        given, cookie = status(f"/?token={server.token}")
        assert given == 303 and "HttpOnly" in cookie and "SameSite=Strict" in cookie
        assert status("/", Cookie=cookie.partition(";")[0])[0] == 200
        assert status("/", Cookie=cookie.partition(";")[0], Origin="http://elsewhere.example")[0] == 403
        shown = status("/config", Cookie=cookie.partition(";")[0])[1]
        assert "elem_id" in shown and "hidden-one" not in shown
        page = Page(browser, f"{server.url}?token={server.token}")
        assert not page.find("#adapter-name") and not page.find("#saved")
        page.say("hi !")
        assert len(page.answers()) == 1 and "token" not in browser.current_url


def test_scripts_need_the_nonce_of_the_page(page, served):
    """Markup that gets into the page, by whatever mistake, runs nothing."""
    page.browser.execute_script(
        "document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"document.title=1\">');"
        "const s = document.createElement('script'); s.textContent = 'document.title = 2'; document.body.append(s);"
    )
    time.sleep(0.5)
    assert page.browser.title == "Kestrel"
    with urllib.request.urlopen(served.url) as one, urllib.request.urlopen(served.url) as other:
        policies = {answer.headers["Content-Security-Policy"] for answer in (one, other)}
    assert len(policies) == 2, "a nonce serves once"
    scripts = [part for policy in policies for part in policy.split("; ") if part.startswith("script-src")]
    assert not any("unsafe-inline" in part for part in scripts)
