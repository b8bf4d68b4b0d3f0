"""Help comes at once: no verb's help imports torch, which takes seconds; no model its compiler."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from helpers.cli_calls import succeed
from varptq.calibrate.methods import METHODS
from varptq.cli import quantize
from varptq.cli.main import app

HELP = """
import contextlib, io, sys
import varptq
from varptq.cli.main import app
for verb in sys.argv[1:]:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        app([*verb.split(), "--help"], prog_name="varptq")
print(*(name for name in ("torch", "numpy", "huggingface_hub") if name in sys.modules))
"""


def test_no_help_imports_torch() -> None:
    verbs = [str(command.name) for command in app.registered_commands]
    done = subprocess.run(
        [sys.executable, "-c", HELP, "", *verbs],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "\n"


LOADING = """
import sys
import varptq.models.families, varptq.models.generate, varptq.runtime.cpu, varptq.runtime.load
print(*(name for name in ("torch._dynamo", "sympy", "triton") if name in sys.modules))
"""


@pytest.mark.slow
def test_loading_a_model_imports_no_compiler() -> None:
    """It would take two seconds and 150 MB."""
    done = subprocess.run(
        [sys.executable, "-c", LOADING],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "\n"


def test_the_help_of_quantize_names_the_methods() -> None:
    assert tuple(METHODS) == quantize.METHODS
    assert ", ".join(METHODS) in " ".join(succeed("quantize", "--help").out.split())
