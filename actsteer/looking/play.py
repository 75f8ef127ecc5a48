"""play: the live page, served by Python's own server: no package, and nothing that it fetches from elsewhere."""

from __future__ import annotations

import json
import secrets
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import ThreadingTCPServer
from threading import Condition, Thread
from typing import Any, final

from torch import nn

from actsteer.errors import ActsteerError
from actsteer.looking.live import Live
from actsteer.steering.steerer import Steerer
from actsteer.steering.steering import Steerable
from actsteer.steering.strength import Strengths
from actsteer.tokens.positions import from_text

_LONGEST = 1_000_000  # bytes of a request
_LOCAL = ("127.0.0.1", "localhost")
_LEFT = (ConnectionError, TimeoutError)
"""What a write raises where nobody listens any more."""
_FROM_HERE = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; img-src data:"
)
_HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": f"{_FROM_HERE}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
}


def play(
    model: nn.Module,
    steering: Steerable,
    *,
    tokenizer: Any = None,
    c: Strengths | None = None,
    image: Sequence[int] | None = None,
    mean: float = 0.0,
    std: float = 1.0,
    chat: bool = False,
    host: str = "127.0.0.1",
    port: int = 7860,
) -> Page:
    """Serve a page on which a steering is tried: a slider per concept, and the answers without it and with it.

    Every answer is steered in its own thread alone, by a Steerer that is attached while it is made; a slider that moves
    sets its `c`. A tab that is closed ends its answers. Nothing is fetched from the network.

    Args:
        model, steering, tokenizer, c, image, mean, std, chat: as for `Live`.
        host: who may see it: "127.0.0.1" this machine alone, "0.0.0.0" everyone who reaches it.
        port: 0 takes a free one.

    Raises:
        UnsupportedModelError, SiteNotFoundError, ShapeError, StrengthError: see `Live`; before anything is served.
        OSError: the port is taken.

    >>> import torch
    >>> from actsteer import SteeringVector
    >>> v = SteeringVector({"0": torch.tensor([0.0, 9.0])}, concept="right")
    >>> with play(nn.Sequential(nn.Linear(4, 2)).eval(), v, image=(2, 2), port=0) as page:
    ...     page.url.startswith("http://127.0.0.1:")
    True
    """
    live = Live(model, steering, tokenizer=tokenizer, c=c, image=image, mean=mean, std=std, chat=chat)
    return Page(live, host=host, port=port)


@final
class Page:
    """A page that is served until `close`, from a thread of its own.

    Args:
        live: what is tried.
        host, port: where.
    """

    def __init__(self, live: Live, *, host: str, port: int) -> None:
        self.live, self.closing = live, False
        self.setup = live.setup()
        self.running: dict[str, Steerer] = {}
        """Name of an answer that is being made -> what steers it."""
        self._requests, self._ended = 0, Condition()
        try:
            self._server = _Server((host, port), partial(_Request, self))
        except OSError as error:
            raise OSError(f"{host}, port {port}: {error.strerror or error}; give another host or port") from error
        self.host, self.port = host, int(self._server.server_address[1])
        self._thread = Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        """Where a browser finds it."""
        return f"http://{self.host}:{self.port}"

    def wait(self) -> None:
        """Until another thread closes it, or an interrupt comes."""
        self._thread.join()

    def close(self) -> None:
        """End every answer, and the page; the model is what it was."""
        with self._ended:
            self.closing = True
        self._server.shutdown()
        self._server.server_close()
        with self._ended:
            self._ended.wait_for(lambda: not self._requests)

    @contextmanager
    def request(self) -> Iterator[None]:
        """While one is answered.

        Raises:
            ConnectionError: the page is closed.
        """
        with self._ended:
            if self.closing:
                raise ConnectionError("the page is closed")
            self._requests += 1
        try:
            yield
        finally:
            with self._ended:
                self._requests -= 1
                self._ended.notify_all()

    def is_for_us(self, headers: Any) -> bool:
        """Whether a browser means this page: no other site sends it here, by a script or by a name that it has made."""
        host, origin = headers.get("Host", ""), headers.get("Origin", "")
        is_known = host.rpartition(":")[0] in (*_LOCAL, self.host) or self.host not in _LOCAL
        return is_known and (not origin or origin.partition("//")[2] == host)

    def __enter__(self) -> Page:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Server(ThreadingTCPServer):
    allow_reuse_address = daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Nothing where a browser has left, which is no error."""
        if not isinstance(sys.exception(), _LEFT):
            super().handle_error(request, client_address)


class _Request(BaseHTTPRequestHandler):
    """One request, in a thread of its own. What is asked for, and what is said, is JSON, a line at a time."""

    timeout = 30  # seconds after which a connection that says nothing is closed

    def __init__(self, page: Page, *connection: Any) -> None:
        self.page = page
        super().__init__(*connection)

    def do_GET(self) -> None:
        if not self.page.is_for_us(self.headers):
            self.send_error(403)
        elif self.path == "/":
            self._begin("text/html; charset=utf-8")
            self.wfile.write(Path(__file__).with_name("play.html").read_bytes())
        elif self.path == "/setup":
            self._begin("application/json")
            self._say(self.page.setup)
        else:
            self.send_error(404)

    def do_POST(self) -> None:
        reply = {"/answer": self._answer, "/classes": self._classes, "/strengths": self._strengths}.get(self.path)
        length = self.headers.get("Content-Length", "")
        body = self.rfile.read(min(int(length), _LONGEST)) if length.isdecimal() else b""
        is_json = self.headers.get_content_type() == "application/json"  # which no form of another site can send
        if not (self.page.is_for_us(self.headers) and is_json):
            self.send_error(403)
        elif reply is None:
            self.send_error(404)
        else:
            self._begin("application/x-ndjson")
            try:
                with self.page.request():
                    reply(json.loads(body))
            except Exception as error:
                self._say({"error": str(error) if isinstance(error, ActsteerError) else repr(error)})

    def _answer(self, asked: dict[str, Any]) -> None:
        """First the answer's name, then after every token the text so far."""

        def say(text: str) -> bool:
            self._say({"text": text})  # which fails where nobody listens any more
            return not self.page.closing

        name, live = secrets.token_hex(8), self.page.live
        with ExitStack() as stack:
            if asked.get("c") is not None:
                steerer = stack.enter_context(self._steerer(asked))
                stack.callback(self.page.running.pop, name, None)
                self.page.running[name] = steerer
            self._say({"name": name})
            self._say({"text": live.answer(asked["prompt"], length=int(asked["length"]), say=say), "done": True})

    def _classes(self, asked: dict[str, Any]) -> None:
        plain = self.page.live.classes(asked["image"])
        with self._steerer(asked):
            self._say({"plain": plain, "steered": self.page.live.classes(asked["image"])})

    def _strengths(self, asked: dict[str, Any]) -> None:
        """Other strengths for an answer that is being made, from its next token on."""
        steerer = self.page.running.get(asked["name"])
        if steerer is not None:
            self.page.live.change(steerer, asked["c"])
        self._say({"found": steerer is not None})

    def _steerer(self, asked: dict[str, Any]) -> Steerer:
        where = asked.get("positions")
        positions = None if not where else from_text(where)
        return self.page.live.steerer(c=asked["c"], sites=asked.get("sites"), positions=positions)

    def _say(self, part: Mapping[str, Any]) -> None:
        self.wfile.write(json.dumps(part).encode() + b"\n")

    def _begin(self, kind: str) -> None:
        self.send_response(200)
        for header, value in {"Content-Type": kind, **_HEADERS}.items():
            self.send_header(header, value)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  (the server's name)
        """Nothing."""
