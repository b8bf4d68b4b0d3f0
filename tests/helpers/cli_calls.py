"""Call the command line in this process, as the tests of the verbs do."""

from __future__ import annotations

import contextlib
import io
import json
from dataclasses import dataclass
from typing import Any

import pytest

from varptq.cli.main import app


@dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str

    @property
    def document(self) -> dict[str, Any]:
        return json.loads(self.out)


def run(*words: object) -> Ran:
    """`varptq <words>`: exit code and what it printed."""
    out, err = io.StringIO(), io.StringIO()
    redirected = contextlib.redirect_stdout(out), contextlib.redirect_stderr(err)
    with redirected[0], redirected[1], pytest.raises(SystemExit) as left:
        app([str(word) for word in words], prog_name="varptq")
    assert isinstance(left.value.code, int)
    return Ran(left.value.code, out.getvalue(), err.getvalue())


def succeed(*words: object) -> Ran:
    ran = run(*words)
    assert ran.code == 0, ran.err
    return ran
