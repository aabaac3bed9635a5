"""How a request stands, to look at, and a tab's hold on the one that it has running. Knows no request's meaning."""

import threading
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any, Protocol

from playground.connection import Connection, Run

BEGUN = {
    "waiting": "The server is busy with another request: waiting for it",
    "starting": "Starting",
    "processing": "Preparing",
}


class Server(Protocol):
    """What takes requests."""

    connection: Connection

    def schemas(self) -> tuple[Mapping[str, Any], str]: ...

    def run(self, inputs: Mapping[str, Any], stop: threading.Event) -> Iterator[Run]: ...


class Ticket:
    """A tab's hold on its last request. stop: set to cancel it.  replaced: whether that was for the next one.

    sliders: where they stood when it was made.
    """

    def __init__(self, sliders: Sequence[Any] = ()) -> None:
        self.stop, self.replaced, self.sliders = threading.Event(), False, sliders

    def replace(self, sliders: Sequence[Any] = ()) -> "Ticket":
        """Cancel this request and say no more of it; the hold on the next one."""
        self.replaced = True
        self.stop.set()
        return Ticket(sliders)


def cancel(ticket: Ticket | None) -> None:
    """Cancel a tab's request, if one is running."""
    if ticket:
        ticket.stop.set()


def bar(run: Run) -> str:
    """A bar and a line: step i of n."""
    if not run.step:
        return _standing("", f"{BEGUN.get(run.status, run.status)} …")
    step, steps, said = run.step
    text = f"Step {step} of {steps}" + (f", {escape(said)}" if said else "")
    return _standing(f' value="{step}" max="{steps}"', text)


def _standing(place: str, text: str) -> str:
    """Not read out by itself: it changes several times a second."""
    return (
        f'<div class="standing" aria-live="off"><progress aria-label="Progress"{place}></progress>'
        f"<span>{text}</span></div>"
    )


def problem(sentence: str) -> str:
    """What went wrong."""
    return f'<div class="problem" role="alert">{escape(sentence)}</div>'


def note(sentence: str) -> str:
    """What there is to say beside it."""
    return f'<div class="note">{escape(sentence)}</div>'


def followed(server: Server, inputs: Mapping[str, Any], ticket: Ticket) -> Iterator[tuple[str, Run | None]]:
    """(what to show, None) again and again, then (what to show, the request's end) where it succeeded.

    Says nothing more once the ticket is replaced.  Raises PlaygroundError.
    """
    for run in server.run(inputs, ticket.stop):
        if ticket.replaced:
            continue
        if run.status == "succeeded":
            yield "", run
        else:
            yield _ending(run) if run.ended else bar(run), None


def _ending(run: Run) -> str:
    return note("Cancelled.") if run.status == "canceled" else problem(run.error or "The request failed.")
