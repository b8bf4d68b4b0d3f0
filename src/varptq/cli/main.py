"""The command `varptq`: its verbs, and what a failure looks like.

Whatever the user got wrong ends with exit code 2 and one line "error: ..." on stderr, be it found
by the argument parser or deep in a call (`VarptqError`). Ctrl-C ends with 130. Anything else is a
bug of ours and keeps its traceback. SIGTERM unwinds like Ctrl-C, so that temporaries go, and ends
with 143; one that comes after the work is done changes nothing. No verb is implemented here.
"""

from __future__ import annotations

import atexit
import errno
import io
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Annotated, Any, NoReturn, TextIO, cast

import typer
from typer.core import TyperGroup

from varptq.cli import (
    analyze,
    common,
    demo,
    edit,
    evaluate,
    failures,
    generate,
    info,
    quantize,
    serve,
)

EXIT_READER_LEFT, EXIT_USER_ERROR, EXIT_INTERRUPTED, EXIT_TERMINATED = 1, 2, 130, 143
# click lives inside newer versions of typer and beside older ones; this base class is the usage
# error of either.
UsageError = typer.BadParameter.__mro__[1]


class Terminated(KeyboardInterrupt):
    """SIGTERM, as an exception that unwinds the stack."""


def _terminate(*_: object) -> NoReturn:
    raise Terminated


class OneLineErrors(TyperGroup):
    """A group of commands whose failures are one line."""

    def main(self, *args: Any, standalone_mode: bool = True, **extra: Any) -> Any:
        """Run, and leave the process with an exit code (in standalone mode)."""
        if not standalone_mode:
            return super().main(*args, standalone_mode=False, **extra)
        # A terminal that knows no "×" gets an escape for it, not a traceback.
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        # Signals belong to the main thread; a caller in another one keeps its own ways.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, _terminate)
            # An interpreter that shuts down gives signals their default back, and a command that
            # has finished and written everything would end as killed.
            atexit.register(signal.signal, signal.SIGTERM, signal.SIG_IGN)
        try:
            with one_line_warnings():
                code = super().main(*args, standalone_mode=False, **extra)
        except (typer.Abort, KeyboardInterrupt):
            fail("interrupted", EXIT_INTERRUPTED)
        except Exception as error:
            if isinstance(error, UsageError):
                fail(usage_message(error), EXIT_USER_ERROR)
            # Of a help text; failures of a verb are told in `invoke`.
            explain(error, None)
            raise
        leave(code if isinstance(code, int) else 0)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except Terminated:
            fail("terminated", EXIT_TERMINATED)
        except KeyboardInterrupt:
            fail("interrupted", EXIT_INTERRUPTED)
        except Exception as error:
            # Those of the parser are told where they arrive.
            if not isinstance(error, UsageError):
                explain(error, ctx.invoked_subcommand)
            raise


def explain(error: BaseException, verb: str | None) -> None:
    """Leave with the line for a failure; returns for a bug of ours."""
    if isinstance(error, OSError) and failures.is_of_printing(error):
        stdout_failed(error)
    if (told := failures.line(error, verb)) is not None:
        fail(told, EXIT_USER_ERROR)


def stdout_failed(error: OSError) -> NoReturn:
    """Leave when stdout did not take what was printed. What the verb wrote elsewhere is safe by
    then."""
    flushed(sys.stdout)
    if error.errno == errno.EPIPE:
        leave(EXIT_READER_LEFT)
    fail(
        f"stdout: cannot be written ({error.strerror}); what the command made is where it was to "
        "go, its report is lost",
        EXIT_USER_ERROR,
    )


def flushed(stream: TextIO | None) -> OSError | None:
    """Flush; an error is returned, and what the stream still holds goes nowhere: the interpreter
    would flush it again when it ends, and say so in its own way and exit code."""
    try:
        if stream is not None:
            stream.flush()
    except OSError as error:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        with suppress(OSError, ValueError):
            os.dup2(nowhere, cast(TextIO, stream).fileno())
        os.close(nowhere)
        return error
    return None


def leave(code: int) -> NoReturn:
    """Exit with `code`, or with what stdout says if it is 0: what a full disk or a reader who has
    left did not take may be known by now only."""
    if (error := flushed(sys.stdout)) is not None and code == 0:
        stdout_failed(error)
    flushed(sys.stderr)
    raise SystemExit(code)


@contextmanager
def one_line_warnings() -> Iterator[None]:
    """Python's warnings as a line each, without the place in the source that gave them."""
    usual = warnings.formatwarning

    def line(message: Warning | str, *_: object, **__: object) -> str:
        return f"warning: {' '.join(str(message).split())}\n"

    warnings.formatwarning = line
    try:
        yield
    finally:
        warnings.formatwarning = usual


def usage_message(error: Any) -> str:
    """What the parser says, and the help that answers it."""
    command = error.ctx.command_path if error.ctx else "varptq"
    return f"{error.format_message().rstrip('.')}; see {command} --help"


def fail(message: str, code: int) -> NoReturn:
    """One line on stderr, whatever line breaks and control characters the message holds, and the
    exit code."""
    line = " ".join(message.split())
    shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
    with suppress(OSError):
        typer.echo(f"error: {shown}", err=True)
    leave(code)


app = typer.Typer(
    cls=OneLineErrors,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def varptq(
    ctx: typer.Context,
    threads: Annotated[
        int | None,
        typer.Option(
            min=1, help="Threads to compute with, at most one a core this process may use."
        ),
    ] = None,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Post-training quantization of next-scale visual autoregressive image generators."""
    if version:
        from varptq import __version__

        typer.echo(f"varptq {__version__}")
        raise typer.Exit
    if threads is not None:
        common.use_threads(threads)
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())


app.command("quantize", cls=quantize.Command)(quantize.command)
app.command("generate")(generate.command)
app.command("edit")(edit.command)
app.command("evaluate")(evaluate.command)
app.command("info")(info.command)
app.command("analyze")(analyze.command)
app.command("demo")(demo.command)
app.command("serve")(serve.command)
