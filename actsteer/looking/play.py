"""play: the live page, served by Python's own server: no package, and nothing that it fetches from elsewhere."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
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
_ONLY_THIS = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; "
_ONLY_THIS += "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"


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
        self.closing = True
        self._server.shutdown()
        self._server.server_close()
        with self._ended:
            self._ended.wait_for(lambda: not self._requests)

    @contextmanager
    def request(self) -> Iterator[None]:
        """While one is answered."""
        with self._ended:
            self._requests += 1
        try:
            yield
        finally:
            with self._ended:
                self._requests -= 1
                self._ended.notify_all()

    def is_for_us(self, headers: Any) -> bool:
        """Whether a browser means this page: no other site sends it here, by a form or by a name that it has made."""
        host, origin = headers.get("Host", ""), headers.get("Origin")
        names = {f"{name}:{self.port}" for name in (self.host, "127.0.0.1", "localhost")}
        is_local = self.host in ("127.0.0.1", "localhost")
        return (host in names or not is_local) and origin in (None, f"http://{host}")

    def __enter__(self) -> Page:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Server(ThreadingTCPServer):
    allow_reuse_address = daemon_threads = True


class _Request(BaseHTTPRequestHandler):
    """One request, in a thread of its own."""

    timeout = 30  # seconds after which a connection that says nothing is closed

    def __init__(self, page: Page, *connection: Any) -> None:
        self.page = page
        super().__init__(*connection)

    def do_GET(self) -> None:
        with self.page.request():
            if not self.page.is_for_us(self.headers):
                self.send_error(403)
            elif self.path == "/":
                page = Path(__file__).with_name("play.html").read_bytes()
                self._reply("text/html; charset=utf-8", page, **{"Content-Security-Policy": _ONLY_THIS})
            elif self.path == "/setup":
                self._reply_json(self.page.setup)
            else:
                self.send_error(404)

    def do_POST(self) -> None:
        with self.page.request():
            replies: Mapping[str, Callable[[dict[str, Any]], None]]
            replies = {"/answer": self._answer, "/classes": self._classes, "/strengths": self._strengths}
            length = int(self.headers.get("Content-Length") or 0)
            is_json = self.headers.get_content_type() == "application/json"  # which no form of another site can send
            if not (self.page.is_for_us(self.headers) and is_json and length <= _LONGEST):
                self.send_error(403)
            elif self.path not in replies:
                self.send_error(404)
            else:
                replies[self.path](json.loads(self.rfile.read(length)))

    def _answer(self, asked: dict[str, Any]) -> None:
        """An answer, a line of JSON after every token with the text so far; the first line has its name."""
        self._reply("application/x-ndjson", b"")
        name = secrets.token_hex(8)

        def say(text: str) -> bool:
            self._line({"text": text})  # which fails where nobody listens any more
            return not self.page.closing

        try:
            with ExitStack() as stack:
                if asked.get("c") is not None:
                    steerer = stack.enter_context(self._steerer(asked))
                    stack.callback(self.page.running.pop, name)
                    self.page.running[name] = steerer
                self._line({"name": name})
                text = self.page.live.answer(asked["prompt"], length=int(asked["length"]), say=say)
            self._line({"text": text, "done": True})
        except ConnectionError:
            pass
        except Exception as error:
            self._line({"error": _described(error)})

    def _classes(self, asked: dict[str, Any]) -> None:
        try:
            plain = self.page.live.classes(asked["image"])
            with self._steerer(asked):
                self._reply_json({"plain": plain, "steered": self.page.live.classes(asked["image"])})
        except Exception as error:
            self._reply_json({"error": _described(error)})

    def _strengths(self, asked: dict[str, Any]) -> None:
        """Other strengths for an answer that is being made, from its next token on."""
        steerer = self.page.running.get(asked["name"])
        try:
            if steerer is not None:
                self.page.live.change(steerer, asked["c"])
            self._reply_json({"found": steerer is not None})
        except ActsteerError as error:
            self._reply_json({"error": str(error)})

    def _steerer(self, asked: dict[str, Any]) -> Steerer:
        where = asked.get("positions")
        positions = None if not where else from_text(where)
        return self.page.live.steerer(c=asked["c"], sites=asked.get("sites"), positions=positions)

    def _line(self, part: dict[str, Any]) -> None:
        self.wfile.write(json.dumps(part).encode() + b"\n")

    def _reply_json(self, part: dict[str, Any]) -> None:
        self._reply("application/json", json.dumps(part).encode())

    def _reply(self, kind: str, body: bytes, **headers: str) -> None:
        self.send_response(200)
        named = {"Content-Type": kind, "Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"} | headers
        for header, value in named.items():
            self.send_header(header, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  (the server's name)
        """Nothing."""


def _described(error: Exception) -> str:
    return str(error) if isinstance(error, ActsteerError) else f"{type(error).__name__}: {error}"
