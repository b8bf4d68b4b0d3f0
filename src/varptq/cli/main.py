"""The command `varptq`: its verbs, and how it reports failures.

A user's mistake ends with exit code 2 and one line "error: ..." on stderr, whether the argument
parser finds it or a call (`VarptqError`). Ctrl-C ends with 130. Any other exception is a bug of
ours and keeps its traceback. SIGTERM unwinds like Ctrl-C, so that temporary files are removed, and
ends with 143; after the work is done it changes nothing. No verb is implemented here.
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
    push,
    quantize,
    serve,
)

EXIT_READER_LEFT, EXIT_USER_ERROR, EXIT_INTERRUPTED, EXIT_TERMINATED = 1, 2, 130, 143
# Newer versions of typer contain click, older ones depend on it; this base class is the usage error
# of both.
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
        # A terminal that cannot show "×" gets an escape for it, not a traceback.
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        # Signals belong to the main thread; a caller in another thread keeps its own handling.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, _terminate)
            # An interpreter that shuts down restores default signal handling, and a command
            # that has finished would then count as killed.
            atexit.register(signal.signal, signal.SIGTERM, signal.SIG_IGN)
        try:
            with one_line_warnings():
                code = super().main(*args, standalone_mode=False, **extra)
        except (typer.Abort, KeyboardInterrupt):
            fail("interrupted", EXIT_INTERRUPTED)
        except Exception as error:
            if isinstance(error, UsageError):
                fail(usage_message(error), EXIT_USER_ERROR)
            # From a help text; failures of a verb are reported in `invoke`.
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
            # Errors of the parser are reported in `main`.
            if not isinstance(error, UsageError):
                explain(error, ctx.invoked_subcommand)
            raise


def explain(error: BaseException, verb: str | None) -> None:
    """Exit with the line for a failure; returns for a bug of ours."""
    if isinstance(error, OSError) and failures.is_of_printing(error):
        stdout_failed(error)
    if (told := failures.line(error, verb)) is not None:
        fail(told, EXIT_USER_ERROR)


def stdout_failed(error: OSError) -> NoReturn:
    """Exit after stdout could not be written. Files that the verb wrote are complete by then."""
    flushed(sys.stdout)
    if error.errno == errno.EPIPE:
        leave(EXIT_READER_LEFT)
    fail(
        f"stdout: cannot be written ({error.strerror}); the results are complete, only the "
        "printed report is lost",
        EXIT_USER_ERROR,
    )


def flushed(stream: TextIO | None) -> OSError | None:
    """Flush; returns an error, after discarding what the stream still holds: otherwise the
    interpreter would flush it again at its end, with its own message and exit code."""
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
    """Exit with `code`; if it is 0, with the error of stdout, if any: a full disk or a closed pipe
    may only be noticed now."""
    if (error := flushed(sys.stdout)) is not None and code == 0:
        stdout_failed(error)
    flushed(sys.stderr)
    raise SystemExit(code)


@contextmanager
def one_line_warnings() -> Iterator[None]:
    """Print Python's warnings as one line each, without their place in the source."""
    usual = warnings.formatwarning

    def line(message: Warning | str, *_: object, **__: object) -> str:
        return f"warning: {' '.join(str(message).split())}\n"

    warnings.formatwarning = line
    try:
        yield
    finally:
        warnings.formatwarning = usual


def usage_message(error: Any) -> str:
    """The message of the parser, and the command that shows help."""
    command = error.ctx.command_path if error.ctx else "varptq"
    return f"{error.format_message().rstrip('.')}; see {command} --help"


def fail(message: str, code: int) -> NoReturn:
    """Exit with one line on stderr; line breaks and control characters in the message are
    replaced."""
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
        typer.Option(min=1, help="Threads to compute with, at most one per core of this process."),
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
app.command("push")(push.command)
app.command("serve")(serve.command)
