"""The `tuneyard` command: exit codes 0 done, 1 the job failed or was cancelled, 2 your input,
3 refused by the server, 4 unreachable, 130 Ctrl-C."""

import io
import os
import re
import sys

import typer

from tuneyard.cli import (
    bundles,
    chat,
    downloading,
    files,
    fixtures,
    health,
    inference,
    jobs,
    keys,
    merging,
    models,
    results,
    services,
)
from tuneyard.cli.output import print_error
from tuneyard.client import Refused, Unreachable
from tuneyard.specs.errors import InputError, TuneyardError, Unavailable

app = typer.Typer(
    help="Tuneyard: a job queue for teams that fine-tune language models on shared GPUs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
GROUPS = (
    services, health, keys, jobs, merging, inference, chat, results, bundles, downloading, files,
    models, fixtures,
)  # fmt: skip
for group in GROUPS:
    group.register(app)


def main() -> None:
    """Run the command and leave with its exit code; no traceback for a person's mistake."""
    _open_what_is_closed()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # what a locale cannot show is no reason to stop
            stream.reconfigure(errors="replace")
    try:
        code = _run(sys.argv[1:])
        sys.stdout.flush()
        sys.exit(code or 0)
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(130)
    except BrokenPipeError:
        _drop_stdout()  # `| head -1` has what it wanted
        sys.exit(0)
    except OSError as error:
        if error.filename is not None:
            raise  # not of a stream: whoever opens a file says what is wrong with it
        _drop_stdout()
        message = f"The output cannot be written: {error.strerror}."
        print_error(InputError(message, code="not_writable"))
        sys.exit(2)
    except typer.Exit as leave:
        sys.exit(leave.exit_code)
    except TuneyardError as error:
        print_error(error)
        sys.exit(exit_code(error))
    except Exception as error:
        # typer's usage errors come from click or from its own copy of it.
        if hasattr(error, "format_message") and hasattr(error, "exit_code"):
            context = getattr(error, "ctx", None)
            sys.stderr.write(f"{error.format_message()}\n")
            if context is not None and (override := _override_among(sys.argv)):
                sys.stderr.write(f"  hint: --set {override}\n")
            elif context is not None:
                sys.stderr.write(f"  hint: `{context.command_path} --help` has an example\n")
            sys.exit(2)
        raise


def _open_what_is_closed() -> None:
    """Python has None for a stream that was closed before its start: give it one that refuses."""
    if sys.stdout is None:
        sys.stdout = os.fdopen(os.open(os.devnull, os.O_RDONLY), "w")
    if sys.stderr is None:
        sys.stderr = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")


def _override_among(arguments: list[str]) -> str | None:
    """What llamafactory-cli takes as it is: `submit FILE learning_rate=1e-5`."""
    if arguments[1:2] != ["submit"]:
        return None
    before = zip(arguments[2:], arguments[1:], strict=False)
    bare = (word for word, last in before if last != "--set" and not word.startswith("-"))
    return next((word for word in bare if re.fullmatch(r"[a-z_0-9]+=.*", word)), None)


def _drop_stdout() -> None:
    """Let what is left go nowhere: the interpreter's own flush at the end must not complain."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _run(arguments: list[str]) -> int | None:
    """What ``app()`` does, but for its handling of errors: a closed pipe is 1 there."""
    command = typer.main.get_command(app)
    with command.make_context("tuneyard", arguments) as context:
        code: int | None = command.invoke(context)
        return code


def exit_code(error: TuneyardError) -> int:
    """The exit code that tells whose turn it is."""
    if isinstance(error, Refused):
        return 3
    if isinstance(error, Unreachable | Unavailable):
        return 4
    return 2


if __name__ == "__main__":
    main()
