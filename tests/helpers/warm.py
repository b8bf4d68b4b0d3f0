"""Python processes that begin with torch and the package imported, which takes seconds otherwise.

`serve` imports them once and forks at every call. `call` is what a test starts in place of Python
and stands for the fork: it passes on arguments, folder, environment, streams and signals, and ends
as the fork does. If it is killed, so is the fork. What Python reads as it starts, such as
PYTHONPATH, is the server's.

    python warm.py serve DOOR                                     DOOR: a socket that listens
    python -IS warm.py call SOCKET [-u] (-m MODULE | -c CODE | FILE) ARGUMENT...
"""

from __future__ import annotations

import atexit
import importlib
import json
import os
import runpy
import select
import shlex
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

MODULES = (
    "torch.distributed.run",
    "varptq.cli.main",
    "varptq.calibrate.quantize",
    "varptq.editing",
    "varptq.evaluate",
    "varptq.runtime",
    "conftest",
)
PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@contextmanager
def commands(folder: Path) -> Iterator[Path]:
    """Fills a folder with the commands `python` and `varptq` while a server is there."""
    program, address = str(Path(__file__)), str(folder / "socket")
    with socket.socket(socket.AF_UNIX) as door:
        door.bind(address)
        door.listen()
        server = subprocess.Popen(
            [sys.executable, program, "serve", str(door.fileno())],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
            pass_fds=[door.fileno()],
            stdin=subprocess.PIPE,
        )
    # Without pidfd_open, which is Linux's, they are plain Python.
    stand_in = ["-IS", program, "call", address] if hasattr(os, "pidfd_open") else []
    for name, words in {"python": (), "varptq": ("-m", "varptq")}.items():
        command = shlex.join([sys.executable, *stand_in, *words])
        (folder / name).write_text(f'#!/bin/sh\nexec {command} "$@"\n')
        (folder / name).chmod(0o755)
    try:
        yield folder
    finally:
        server.communicate()  # the end of its stdin is its end


def call(address: str, words: list[str]) -> int:
    """Have the server fork a process for `words`, and stand for it until it ends."""
    request = {"words": words, "folder": os.getcwd(), "environment": dict(os.environ)}
    content = json.dumps(request).encode()
    with socket.socket(socket.AF_UNIX) as line:
        line.connect(address)
        socket.send_fds(line, [len(content).to_bytes(4, "big")], [0, 1, 2])
        line.sendall(content)
        for number in PASSED_ON:
            signal.signal(number, lambda number, _: line.send(bytes([number])))
        answer = line.recv(4, socket.MSG_WAITALL)
    if len(answer) < 4:
        sys.exit("warm.py: the server has gone")
    status = int.from_bytes(answer, "big")
    if os.WIFSIGNALED(status):
        with suppress(OSError):  # SIGKILL has no handler
            signal.signal(os.WTERMSIG(status), signal.SIG_DFL)
        os.kill(os.getpid(), os.WTERMSIG(status))
    return os.WEXITSTATUS(status)


def serve(door: socket.socket) -> list[str]:
    """Answer calls until stdin ends. Returns in the forks alone, each with its words."""
    for module in MODULES:
        importlib.import_module(module)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        if sys.stdin.fileno() in select.select([door, sys.stdin.fileno()], [], [])[0]:
            sys.exit()
        line, _ = door.accept()
        if os.fork() == 0:
            door.close()
            return attend(line)
        line.close()


def attend(line: socket.socket) -> list[str]:
    """Fork once more, and keep `line` and the fork to the same end. Returns in the fork alone."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    size, streams, _, _ = socket.recv_fds(line, 4, 3)
    content = line.recv(int.from_bytes(size, "big"), socket.MSG_WAITALL)
    child = os.fork()
    if child == 0:
        line.close()
        return become(json.loads(content), streams)
    for stream in streams:
        os.close(stream)
    ended = os.pidfd_open(child)
    while ended not in (ready := select.select([line, ended], [], [])[0]):
        assert ready
        for number in line.recv(16) or (signal.SIGKILL,):
            os.kill(child, number)
    with suppress(OSError):
        line.sendall(os.waitpid(child, 0)[1].to_bytes(4, "big"))
    os._exit(0)


def become(request: dict[str, Any], streams: list[int]) -> list[str]:
    """Take over the streams, folder and environment of a call; its words."""
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    sys.stdout = os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    return request["words"]


def run(words: list[str]) -> NoReturn:
    """What Python does with these arguments, and its end without taking every module apart, which
    in a fork takes a second."""
    code: object = 0
    words = words[words[0] == "-u" :]
    sys.argv = words[words[0] in ("-m", "-c") :]
    try:
        if words[0] == "-m":
            # It warns where it finds imported what it runs, which here is always so.
            sys.modules.pop(words[1], None)
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        elif words[0] == "-c":
            exec(words[1], {"__name__": "__main__"})
        else:
            sys.path.insert(0, str(Path(words[0]).parent))
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as left:
        code = left.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    if isinstance(code, str):
        print(code, file=sys.stderr)
        code = 1
    threading._shutdown()  # pyright: ignore[reportAttributeAccessIssue]
    atexit._run_exitfuncs()  # pyright: ignore[reportPrivateUsage]
    sys.stdout.flush()
    os._exit(code)


if __name__ == "__main__":
    if sys.argv[1] == "call":
        sys.exit(call(sys.argv[2], sys.argv[3:]))
    run(serve(socket.socket(fileno=int(sys.argv[2]))))
