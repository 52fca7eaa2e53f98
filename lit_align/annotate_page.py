"""The page on which a person says which images are better: `run.py annotate`.

It is served to this machine's own browsers only, as it has no login.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Unpack

from PIL import Image

from lit_align.annotation import AnnotationSession, Question
from lit_align.candidates import Drawing, gather_candidates

_HOSTS = ("127.0.0.1", "localhost")
_SMALL = 256  # pixels: images up to this side are enlarged with crisp pixels

_STYLE = """
body { background: #ececec; color: #1a1a1a; }
.sheet { width: 100%; max-width: 72rem; margin: 0 auto; padding: 1rem 1.5rem; text-align: center; }
.top { display: flex; justify-content: space-between; color: #555; margin-bottom: .4rem; }
.prompt { font-size: 2rem; line-height: 1.25; font-weight: 600; margin: 1.4rem 0 .3rem; }
.asked { font-size: 1.15rem; color: #444; margin-bottom: 1rem; }
.images, .others { display: flex; flex-wrap: wrap; gap: 1.2rem; justify-content: center; }
.images figure { margin: 0; padding: .8rem; background: #fff; border-radius: .6rem;
  box-shadow: 0 1px 4px #0003; flex: 0 1 auto; }
.images img { display: block; cursor: pointer; object-fit: contain; height: 46vh;
  max-width: min(100%, 84vw); margin-bottom: .7rem; }
.images.many img { height: 32vh; }
.images img.small { image-rendering: pixelated; }
.images figure.best { outline: .25rem solid #2e7d32; }
.others { margin-top: 1.4rem; }
kbd { font: inherit; font-weight: 700; border: 1px solid currentColor; border-radius: .3rem;
  padding: 0 .45rem; margin-right: .5rem; }
.figures { margin: 1.5rem auto; border-spacing: 1.5rem .3rem; text-align: left; }
.hidden-status { position: absolute; left: -100vw; }
"""
# A key is sent with the question that it was pressed at, so that a second press that comes before
# the next images are shown does not judge those.
_KEYS = """
document.addEventListener("keydown", (event) => {
  const key = event.key.toLowerCase();
  if (event.repeat || event.ctrlKey || event.metaKey || event.altKey || !/^[1-9tsu]$/.test(key))
    return;
  const shown = document.querySelector("[data-question]");
  if (shown) emitEvent("pressed", { key, state: shown.dataset.question });
});
"""


def annotate(
    annotator: str,
    output: str = "annotations",
    repeat_fraction: float = 0.1,
    seed: int = 42,
    batch_size: int = 64,
    host: str = "127.0.0.1",
    port: int = 8080,
    show: bool = True,
    **drawing: Unpack[Drawing],
) -> None:
    """Draw images of each prompt, and open a page on which a person chooses between them.

    `output` gets `images/`, `candidates.jsonl`, `preferences.jsonl` and, with counts and the
    person's consistency, `summary.json`. The same command goes on where it was closed.

    Args:
        annotator: Name of the person in the records.
        output: Folder.
        repeat_fraction: Share of the prompts that are asked again later, the places swapped.
        seed: Decides the images' noise, their places, and what is asked again.
        batch_size: Images drawn at a time.
        host: The page has no login, so it is shown to this machine only: 127.0.0.1 or localhost.
        port: Of the page.
        show: Open it in a browser.
        drawing: Where the images come from.

    Raises:
        ValueError: If `host` is another machine's, the port is in use, or an argument is out of its
            range.
        ModuleNotFoundError: If the library of the page is not installed.
    """
    if host not in _HOSTS:
        raise ValueError(
            f"`host` must be one of {', '.join(_HOSTS)}, got {host!r}: the page has no login. From "
            f"another machine, reach it by `ssh -L {port}:127.0.0.1:{port}`."
        )
    if find_spec("nicegui") is None:
        raise ModuleNotFoundError(
            'The page needs NiceGUI; install it by `pip install "lit-align[annotate]"`.'
        )
    _check_free(host, port)
    found = gather_candidates(Path(output), seed, batch_size, **drawing)
    session = AnnotationSession(found, output, annotator, repeat_fraction, seed)
    print(f"http://{host}:{port} writes {session.path}; Ctrl-C ends it.", flush=True)
    serve(session, host, port, show)


def _check_free(host: str, port: int) -> None:
    """See that no other program serves the port, before any image is drawn."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ValueError(f"`port` {port} cannot be used ({error}); give another.") from error


def serve(session: AnnotationSession, host: str, port: int, show: bool) -> None:
    """Serve the page of a session until the process is interrupted."""
    from fastapi.responses import FileResponse
    from nicegui import app, ui
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    page = Page(session)

    # Numbers instead of paths: no other file can be asked for.
    @app.get("/image/{number}", response_model=None)
    def image(number: int) -> Any:
        if not 0 <= number < len(page.files):
            return "There is no such image."
        return FileResponse(page.files[number], headers={"Cache-Control": "no-store"})

    # Other sites' names that lead to this machine are refused.
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(_HOSTS))
    ui.run(page.build, host=host, port=port, show=show, reload=False, tailwind=False,
           title="Which is better?", show_welcome_message=False)  # fmt: skip


class Page:
    """What is shown of a session, and what is done with what is pressed.

    Args:
        session: Questions and answers, which all windows share.

    Attributes:
        files: The images' files; the page names them by number.
    """

    def __init__(self, session: AnnotationSession) -> None:
        from nicegui import ui

        self.session, self.ui = session, ui
        entries = {id(q.candidates): q.candidates for q in session.questions}.values()
        names = sorted({item["path"] for entry in entries for item in entry.items})
        self.files = [(session.folder / name).resolve() for name in names]
        self._numbers = {name: number for number, name in enumerate(names)}
        self._refreshable = ui.refreshable(self._content)

    def build(self) -> None:
        """Lay out the page for one window."""
        self.ui.add_css(_STYLE)
        self.ui.add_body_html(f"<script>{_KEYS}</script>")
        self.ui.on("pressed", lambda event: self.press(event.args["key"], event.args["state"]))
        status = self.ui.label().classes("hidden-status").props("role=status")
        status.bind_text_from(
            self.session, "asked"
        )  # for screen readers, which miss replaced elements
        self._refreshable()

    def press(self, key: str, state: str) -> None:
        """Answer by a key, pressed at what was shown in that state; see `AnnotationSession`."""
        self.session.press(key, state)
        self._refreshable.refresh()

    def _content(self) -> None:
        ui, session, question = self.ui, self.session, self.session.question
        behind, total = session.progress
        with ui.element("main").classes("sheet") as sheet:
            sheet.props["data-question"] = session.state
            with ui.element("div").classes("top"):
                ui.label(f"Question {min(behind + 1, total)} of {total}" if question else "Done")
                ui.label(session.annotator)
            share = behind / total if total else 1.0
            ui.linear_progress(share, show_value=False).props('aria-label="Progress"')
            if question is None:
                self._ending()
            else:
                self._ask(question)

    def _ask(self, question: Question) -> None:
        ui, entry = self.ui, question.candidates
        heading = ui.label(entry.prompt).classes("prompt")
        heading.props("role=heading aria-level=1")
        ui.label(self.session.asked).classes("asked")
        many = len(question.shown) > 2
        with ui.element("div").classes("images many" if many else "images"):
            for place, number in enumerate(question.shown):
                self._figure(place, entry.items[number]["path"], many)
        with ui.element("div").classes("others"):
            if self.session.best is None:
                self._button("t", "Tie", "None is better")
            else:
                self._button("t", "Others tie", "None of the others is worse")
            self._button("s", "Skip", "Leave this question out")
            self._button("u", "Undo", "Take back the last answer")

    def _figure(self, place: int, path: str, many: bool) -> None:
        number = self._numbers[path]
        with Image.open(self.files[number]) as image:
            small = max(image.size) <= _SMALL
        name = f"Image {place + 1}" if many else ("Left", "Right")[place]
        with self.ui.element("figure") as figure:
            figure.classes("best" if place == self.session.best else "")
            picture = self.ui.element("img").classes("small" if small else "")
            picture.props["src"], picture.props["alt"] = f"/image/{number}", name
            picture.on("click", self._pressed(str(place + 1)))
            self._button(str(place + 1), name, f"Choose: {name}", "blue-9")

    def _button(self, key: str, text: str, label: str, color: str = "grey-8") -> None:
        button = self.ui.button(on_click=self._pressed(key), color=color)
        button.props["aria-label"], button.props["aria-keyshortcuts"] = label, key
        button.props("no-caps size=lg")
        with button:
            self.ui.html(f"<kbd>{key.upper()}</kbd>{text}", sanitize=False)

    def _pressed(self, key: str) -> Callable[[], None]:
        """Return what a click does: as the key, pressed at what is shown now."""
        state = self.session.state
        return lambda: self.press(key, state)

    def _ending(self) -> None:
        ui, session = self.ui, self.session
        summary = session.summary()
        ui.label(session.asked).classes("prompt").props("role=heading aria-level=1")
        ui.label(f"Thank you. The records are in {session.path}.").classes("asked")
        rows = {
            "Prompts judged": summary["judged"],
            "of them ties": summary["tied"],
            "Questions skipped": summary["skipped"],
            "Judged twice": summary["repeated"],
            "the same both times": _percent(summary["consistency"]),
            "Choices of the first image": _percent(summary["first_place"]),
        }
        with ui.element("table").classes("figures"):
            for name, value in rows.items():
                with ui.element("tr"):
                    with ui.element("th").props("scope=row"):
                        ui.label(name)
                    with ui.element("td"):
                        ui.label(str(value))
        with ui.element("div").classes("others"):
            self._button("u", "Undo", "Take back the last answer")


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.0%}"  # noqa: RUF001
