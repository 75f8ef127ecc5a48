"""play: a page, made of Gradio's parts, on which a steering is tried."""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from queue import SimpleQueue
from threading import Event
from typing import Any, final

from torch import nn

from actsteer.errors import ActsteerError
from actsteer.looking.live import PROMPT, Live, Slider
from actsteer.sites.wrappers import class_name
from actsteer.steering.steerer import Steerer
from actsteer.steering.steering import Steerable
from actsteer.steering.strength import Strengths
from actsteer.tokens.positions import from_text

_ANSWERS = 32
"""How many are written at once; whoever asks for more waits."""
_PATIENCE = 1.0  # seconds in which tabs are told that their answers are over
_CANVAS = 280  # pixels of a drawing's longer side
_POSITIONS = [("as in the steering", ""), *((name, name) for name in ("all", "prompt", "generated", "last"))]


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
    port: int | None = None,
) -> "Page":
    """Serve a page on which a steering is tried: a slider per concept, and the answers without it and with it.

    Every answer is steered in its own thread alone, by a Steerer that is attached while it is made; a slider that moves
    sets its `c`. A tab that is closed ends its answers. Nothing is fetched from the network.

    Args:
        model, steering, tokenizer, c, image, mean, std, chat: as for `Live`.
        host: who may see it: "127.0.0.1" this machine alone, "0.0.0.0" everyone who reaches it.
        port: None takes the first free one from 7860 on.

    Raises:
        UnsupportedModelError, SiteNotFoundError, ShapeError, StrengthError: see `Live`; before anything is served.
        ImportError: Gradio is not installed.
        OSError: the port is taken, or the host is not this machine's.

    >>> import torch
    >>> from actsteer import SteeringVector
    >>> v = SteeringVector({"0": torch.tensor([0.0, 9.0])}, concept="right")
    >>> with play(nn.Sequential(nn.Linear(4, 2)).eval(), v, image=(2, 2)) as page:
    ...     page.url.startswith("http://127.0.0.1:")
    True
    """
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise ImportError("a live page needs gradio; pip install 'actsteer[play]'") from error
    live = Live(model, steering, tokenizer=tokenizer, c=c, image=image, mean=mean, std=std, chat=chat)
    return Page(live, host=host, port=port)


@final
class Page:
    """A page that is served until `close`.

    Args:
        live: what is tried.
        host, port: where.
    """

    def __init__(self, live: Live, *, host: str, port: int | None) -> None:
        import gradio as gr

        self.live, self._closed = live, Event()
        self._threads = ThreadPoolExecutor(_ANSWERS)
        self._drawing = ThreadPoolExecutor(1)  # the one thread that is steered for all drawings
        self._drawn: Steerer | None = None  # what is attached in it
        self._writing: dict[str | None, Steerer] = {}  # a tab's name -> what steers its answer
        with gr.Blocks(title="actsteer", analytics_enabled=False) as self._blocks:
            gr.Markdown(f"### {class_name(live.model)}, steered: φ(x) + c · v")
            with gr.Row():
                with gr.Column(scale=2, min_width=340):
                    drawing = None if live.size is None else _canvas(*live.size)
                    sliders = [_drawn(slider) for slider in live.sliders()]
                    zero = gr.Button("c = 0", size="sm")
                    sites = gr.CheckboxGroup(list(live.sites), value=list(live.sites), label="sites")
                with gr.Column(scale=5, min_width=340):
                    if drawing is None:
                        self._text(sliders, sites)
                    else:
                        self._image(sliders, sites, drawing)
            zero.click(lambda: [0.0] * len(sliders), None, sliders, queue=False, api_visibility="private")
        try:
            _, self.url, _ = self._blocks.launch(
                server_name=host,
                server_port=port,
                prevent_thread_lock=True,
                inline=False,
                inbrowser=False,
                share=False,
                quiet=True,
                footer_links=[],
                run_history=False,
                pwa=False,
                ssr_mode=False,
                mcp_server=False,
                max_threads=2 * _ANSWERS,  # for sliders move while all are written
            )
        except OSError as error:
            raise OSError(f"{host}, port {port}: it cannot be served there; give another host or port") from error

    def wait(self) -> None:
        """Until another thread closes it, or an interrupt comes."""
        self._closed.wait()

    def close(self) -> None:
        """End every answer, and the page; the model is what it was."""
        self._closed.set()
        self._threads.shutdown()
        if self._drawn is not None:
            self._drawing.submit(self._drawn.detach).result()
        self._drawing.shutdown()
        end = time.monotonic() + _PATIENCE
        while self._blocks.is_running and self._blocks.server.server_state.tasks and time.monotonic() < end:
            time.sleep(0.05)  # an answer's last words are on their way
        self._blocks.close(verbose=False)

    def __enter__(self) -> "Page":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _text(self, sliders: list[Any], sites: Any) -> None:
        """A prompt, and how a language model goes on with it: two columns, each an event of its own."""
        import gradio as gr

        prompt = gr.Textbox(PROMPT, lines=3, label="prompt")
        with gr.Row():
            length = gr.Number(64, precision=0, minimum=1, label="new tokens", info="at most", min_width=150)
            where = gr.Dropdown(
                _POSITIONS, value="", allow_custom_value=True, label="positions", info="or an index, or start:stop"
            )
        with gr.Row():
            answer, stop = gr.Button("Answer", variant="primary", min_width=100), gr.Button("Stop", min_width=100)
        with gr.Row():
            columns = [gr.Textbox(label=name, lines=12, max_lines=30) for name in ("without the steering", "steered")]

        def plain(prompt: str, length: int) -> Iterator[str]:
            with _told():
                yield from self._written(prompt, length, None)

        def steered(
            request: gr.Request, prompt: str, length: int, sites: list[str], positions: str, *c: float
        ) -> Iterator[str]:
            name = request.session_hash
            with _told():
                steerer = self._writing[name] = self._steerer(c, sites, positions)
                try:
                    yield from self._written(prompt, length, steerer)
                finally:
                    if self._writing.get(name) is steerer:
                        del self._writing[name]

        def strengths(request: gr.Request, *c: float) -> None:
            if (steerer := self._writing.get(request.session_hash)) is not None:
                self.live.change(steerer, dict(zip(self.live.concepts, c, strict=True)))

        asked = [prompt, length]
        together: Any = {"concurrency_limit": _ANSWERS, "concurrency_id": "answers", "show_progress": "minimal"}
        events: list[Any] = [
            answer.click(plain, asked, columns[0], **together),
            answer.click(steered, [*asked, sites, where, *sliders], columns[1], **together),
        ]
        stop.click(None, cancels=events)
        _on_change(sliders, strengths, sliders, None)

    def _image(self, sliders: list[Any], sites: Any, drawing: Any) -> None:
        """What a classifier says of what is drawn: ink is 1, and paper 0."""
        import gradio as gr

        assert self.live.size is not None
        height, width = self.live.size
        with gr.Row():
            columns = [gr.Label(label=name, min_width=160) for name in ("without the steering", "steered")]

        def classes(drawn: dict[str, Any] | None, sites: list[str], *c: float) -> tuple[dict[str, float], ...]:
            ink = drawn and drawn["composite"]
            pixels = [1 - own / 255 for own in ink.resize((width, height)).tobytes()] if ink else [0.0] * height * width
            with _told():
                both = self._drawing.submit(self._both, pixels, tuple(sites), c).result()
            return tuple({str(place): share for place, share in enumerate(found)} for found in both)

        asked = [drawing, sites, *sliders]
        _on_change([drawing, sites, *sliders], classes, asked, columns)
        self._blocks.load(classes, asked, columns, queue=False, api_visibility="private")

    def _steerer(self, c: Sequence[float], sites: Sequence[str], positions: str) -> Steerer:
        where = from_text(positions) if positions else None
        return self.live.steerer(c=dict(zip(self.live.concepts, c, strict=True)), sites=sites, positions=where)

    def _both(self, pixels: Sequence[float], sites: tuple[str, ...], c: Sequence[float]) -> list[list[float]]:
        """The classes of a drawing at strength 0 and at c; nothing is attached anew unless other sites are steered."""
        if self._drawn is None or set(self._drawn.sites) != set(sites):
            other = self.live.steerer(c=0.0, sites=sites)
            if self._drawn is not None:
                self._drawn.detach()
            self._drawn = other.attach()
        found = []
        for strengths in ([0.0] * len(c), c):
            self._drawn.c = dict(zip(self.live.concepts, strengths, strict=True))
            found.append(self.live.classes(pixels))
        return found

    def _written(self, prompt: str, length: int, steerer: Steerer | None) -> Iterator[str]:
        """The text, while a thread writes it, which ends once it is not iterated any more.

        Gradio takes each text in another thread, and a steering is of one thread alone.
        """
        texts: SimpleQueue[str | None] = SimpleQueue()
        left = Event()

        def say(text: str) -> bool:
            texts.put(text)
            return not (left.is_set() or self._closed.is_set())

        def write() -> str:
            with steerer or nullcontext():
                return self.live.answer(prompt, length=length, say=say)

        written = self._threads.submit(write)
        written.add_done_callback(lambda _: texts.put(None))
        try:
            for text in iter(texts.get, None):
                if texts.empty():  # else there is a longer one already
                    yield text
            yield written.result()
        finally:
            left.set()


def _canvas(height: int, width: int) -> Any:
    import gradio as gr

    scale = max(1, _CANVAS // max(height, width))
    brush = gr.Brush(default_size=max(1, height * scale // 20), colors=["#000"], color_mode="fixed")
    size = (width * scale, height * scale)
    how: Any = {"layers": False, "transforms": (), "buttons": [], "label": "draw"}
    return gr.Sketchpad(type="pil", image_mode="L", canvas_size=size, fixed_canvas=True, brush=brush, **how)


def _drawn(slider: Slider) -> Any:
    import gradio as gr

    share = max(slider.shares.values(), default=0.0)
    note = f"at 1, {share:.2g} of the typical ‖h‖" if share else None
    reach, step = slider.reach, slider.reach / 500
    return gr.Slider(-reach, reach, value=slider.c, step=step, label=slider.concept, info=note)


def _on_change(parts: Sequence[Any], do: Callable[..., Any], inputs: Sequence[Any], outputs: Any) -> None:
    """Whenever one of them changes, and once more if it did so meanwhile."""
    import gradio as gr

    how: Any = {"trigger_mode": "always_last", "queue": False, "show_progress": "hidden"}
    gr.on([part.change for part in parts], do, inputs, outputs, **how)


@contextmanager
def _told() -> Iterator[None]:
    """What is wrong is said on the page."""
    import gradio as gr

    try:
        yield
    except (ActsteerError, ValueError) as error:
        raise gr.Error(str(error), print_exception=False) from error
