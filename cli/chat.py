"""`tuneyard chat`: several turns with a model that a serve job keeps loaded."""

from contextlib import closing
from typing import Annotated, Any

import typer

from tuneyard.cli.jobs import Set
from tuneyard.cli.output import print_error, say
from tuneyard.cli.profile import Json, connect, home_folder
from tuneyard.cli.serving import JobOver, ServedModel
from tuneyard.cli.turns import Pipes, Screen, screen
from tuneyard.client import Refused
from tuneyard.specs.documents import apply_overrides
from tuneyard.specs.jobs import read_spec

HELP = """/exit         leave; so does Ctrl-D
/clear        forget the conversation
/history      show the conversation
/system TEXT  set the system text, and forget the conversation; without TEXT: none
//…           a question that begins with a slash
Ctrl-C        stop the answer"""


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(chat)


def chat(
    model: Annotated[str, typer.Argument(help="A base or a tuned model: name or id.")],
    system: Annotated[str | None, typer.Option(help="System text.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="An answer's length.")] = None,
    temperature: Annotated[
        float | None, typer.Option(min=0.0, max=100.0, help="0: the likeliest.")
    ] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Leave the model loaded.")] = False,
    set_: Set = None,
    json: Json = False,
) -> int:
    """Chat with a model over several turns; lines of stdin are turns where it is no terminal.

    A job that serves the model already is joined, else one is begun, and ended on leaving.

    Example: tuneyard chat tuny --system "Answer in one sentence."
    """
    document: dict[str, Any] = {"kind": "serve", "model": model, "name": f"chat-{model}"[:200]}
    document = apply_overrides(document, set_ or [])
    spec, _ = read_spec(document)
    settings = {"max_new_tokens": max_new_tokens, "temperature": temperature}
    settings = {name: value for name, value in settings.items() if value is not None}
    shown = screen(home_folder() / "chat_history", as_json=json)
    with connect() as client:
        served = ServedModel(client, spec.document(), tell=shown.tell)
        try:
            return Chat(served, shown, settings, system).run()
        except JobOver:
            return 1
        finally:
            if not keep:
                served.end()


class Chat:
    """A conversation; it is kept here, and sent as a whole with each question."""

    def __init__(
        self, served: ServedModel, shown: Screen, settings: dict[str, Any], system: str | None
    ) -> None:
        self._served, self._screen, self._settings = served, shown, settings
        self._system = system
        self._messages: list[dict[str, str]] = []

    def run(self) -> int:
        """Turn by turn until it is left."""
        self._served.wait()
        piped = isinstance(self._screen, Pipes)
        if not piped:
            say("/help lists the commands, Ctrl-D leaves")
        for turn in self._screen.turns():
            text = turn.strip()
            if text in ("/exit", "/quit"):
                break
            if text.startswith("/") and not text.startswith("//"):
                self._command(text)
            elif text:
                try:
                    self._answer(turn[1:] if text.startswith("//") else turn)
                except Refused as error:
                    self._messages.pop()
                    if piped:
                        raise
                    print_error(error)
        return 0

    def _answer(self, turn: str) -> None:
        """Ask, and show the answer as it comes; Ctrl-C on a terminal stops it and nothing else."""
        self._messages.append({"role": "user", "content": turn})
        led = [{"role": "system", "content": self._system}] if self._system else []
        text, done = "", {}
        with closing(self._served.ask([*led, *self._messages], self._settings)) as pieces:
            try:
                for kind, data in pieces:
                    if kind == "delta":
                        text += data["delta"]
                        self._screen.piece(data["delta"])
                    elif kind == "again":
                        text = ""
                        self._screen.again(data["reason"])
                    elif kind == "waiting":
                        self._screen.tell(f"waits for {data['waiting']} other answers")
                    elif kind == "done":
                        done = dict(data) | {"job": self._served.job}
            except KeyboardInterrupt:
                if isinstance(self._screen, Pipes):
                    raise
        self._screen.end(turn, text, done)
        if text:
            self._messages.append({"role": "assistant", "content": text})
        else:
            self._messages.pop()

    def _command(self, text: str) -> None:
        name, _, rest = text.partition(" ")
        if name == "/clear":
            self._messages.clear()
        elif name == "/system":
            self._system = rest.strip() or None
            self._messages.clear()
        elif name == "/history":
            for message in self._messages:
                say(f"{message['role']}: {message['content']}")
        else:
            if name != "/help":
                say(f"There is no command {name}.")
            say(HELP)
