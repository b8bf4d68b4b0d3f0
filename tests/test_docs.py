"""Every example of README.md, CONTRIBUTING.md and docs/*.md runs.

The ```python, ```bash and ```console blocks of one file run in order, python in one namespace, all
in one temporary folder, as a reader would paste them. A block behind the comment
`<!-- not run: reason -->` is skipped with that reason. Shell blocks run under `bash -e`, with
`varptq` being the package under test; a command that may reach outside (make, pip, git) has to be
marked as not run. Output shown in a console block is not compared. The effort "fast" takes few
images.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from helpers import few_images
from varptq.calibrate.config import PRESETS

ROOT = Path(__file__).parents[1]
SHELLS = {"bash", "console"}
RUN = {"python", *SHELLS}
# Other names of the same languages would slip through unrun.
ALIASES = {"py", "python3", "pycon", "sh", "shell", "shell-session", "zsh"}
COMMANDS = {"varptq", "cat", "cd", "cp", "echo", "export", "head", "ls", "mkdir", "tail"}
SECONDS = 600

FENCE = re.compile(r"^(?P<indent> *)(?P<ticks>```+)(?P<language>[\w+-]*)")
NOT_RUN = re.compile(r"^<!-- not run: (?P<reason>.+) -->$")


@dataclass(frozen=True)
class Block:
    """A fenced block; `line` is the number of its first line of code."""

    language: str
    code: str
    line: int
    not_run: str | None


def blocks_of(text: str) -> Iterator[Block]:
    lines = text.splitlines()
    number = 0
    while number < len(lines):
        opening = FENCE.match(lines[number])
        number += 1
        if not opening:
            continue
        first = number
        while number < len(lines) and lines[number].strip() != opening["ticks"]:
            number += 1
        before = next((line.strip() for line in reversed(lines[: first - 1]) if line.strip()), "")
        marker = NOT_RUN.match(before)
        code = textwrap.dedent("\n".join(lines[first:number])) + "\n"
        yield Block(opening["language"], code, first + 1, marker["reason"] if marker else None)
        number += 1


def shell_script(block: Block) -> str:
    """The commands of a block: all of bash; of console what follows "$ ", with continued lines."""
    if block.language == "bash":
        return block.code
    commands, continued = [], False
    for line in block.code.splitlines():
        if line.startswith("$ ") or continued:
            commands.append(line if continued else line[2:])
            continued = line.endswith("\\")
    return "\n".join(commands) + "\n"


def foreign_commands(script: str) -> list[str]:
    """Commands outside COMMANDS, looking at the first word of every line and behind | ; and &&."""
    joined = re.sub(r"\\\n", " ", script)
    pieces = [piece.strip() for piece in re.split(r"\n|\||;|&&", joined)]
    # NAME=value before a command is no command.
    words = [re.sub(r"^(\w+=\S*\s+)+", "", piece).split(" ")[0] for piece in pieces]
    return sorted({w for w in words if w and not w.startswith("#")} - COMMANDS)


@dataclass
class Reader:
    """Someone who pastes the blocks of one file, from the top, into one folder."""

    name: str
    blocks: list[Block]
    folder: Path
    python: Path
    namespace: dict[str, Any] = field(default_factory=lambda: {"__name__": "__main__"})
    done: int = 0
    stuck_at: int | None = None

    def read_to(self, index: int) -> None:
        """Run what stands before block `index` and has not run yet, then the block itself."""
        while self.done <= index:
            block = self.blocks[self.done]
            if self.stuck_at is not None:
                pytest.skip(f"the block at {self.name}:{self.stuck_at} failed")
            self.done += 1
            if block.not_run is not None:
                continue
            self.stuck_at = block.line
            self.run(block)
            self.stuck_at = None

    def run(self, block: Block) -> None:
        if block.language == "python":
            # Empty lines in front, so that a traceback shows the line of the document.
            source = "\n" * (block.line - 1) + block.code
            exec(compile(source, self.name, "exec"), self.namespace)
            return
        script = shell_script(block)
        if foreign := foreign_commands(script):
            pytest.fail(
                f"{self.name}:{block.line}: {', '.join(foreign)} cannot run in a test; put "
                f"<!-- not run: reason --> before the block, or use {', '.join(sorted(COMMANDS))}"
            )
        varptq = f'varptq() {{ "{self.python}" "{few_images.__file__}" "$@"; }}\n'
        path = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
        result = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", varptq + script],
            cwd=self.folder,
            env={**os.environ, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
        if result.returncode:
            shown = f"{result.stdout[-2000:]}{result.stderr[-2000:]}"
            pytest.fail(f"{self.name}:{block.line}: exit code {result.returncode}\n{shown}")


PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
FILES = [path for path in PAGES if path.is_file()]
BLOCKS = {str(p.relative_to(ROOT)): list(blocks_of(p.read_text())) for p in FILES}
CASES = [
    # One worker runs a whole file: its blocks share a folder and a namespace.
    pytest.param(
        name, index, id=f"{name}:{block.line}-{block.language}", marks=pytest.mark.xdist_group(name)
    )
    for name, blocks in BLOCKS.items()
    for index, block in enumerate(blocks)
    if block.language in RUN
]


@pytest.fixture(scope="session")
def readers(tmp_path_factory: pytest.TempPathFactory, warm: Path) -> dict[str, Reader]:
    return {
        name: Reader(name, blocks, tmp_path_factory.mktemp("reader"), warm / "python")
        for name, blocks in BLOCKS.items()
    }


if CASES:

    @pytest.mark.slow  # minutes in all
    @pytest.mark.parametrize(("name", "index"), CASES)
    def test_the_example_runs(
        readers: dict[str, Reader], name: str, index: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        reader = readers[name]
        if reason := reader.blocks[index].not_run:
            pytest.skip(f"not run: {reason}")
        monkeypatch.chdir(reader.folder)
        # What an example adds to a table is gone after it.
        tables = ("calibrate.methods.METHODS", "quant.quantizers.QUANTIZERS")
        with (
            patch.dict(f"varptq.{tables[0]}"),
            patch.dict(f"varptq.{tables[1]}"),
            patch.dict(PRESETS, fast=few_images.FAST),
        ):
            reader.read_to(index)


def test_languages_have_the_names_that_run() -> None:
    hidden = [
        f"{name}:{block.line} {block.language}"
        for name, blocks in BLOCKS.items()
        for block in blocks
        if block.language in ALIASES
    ]
    assert not hidden, f"use {', '.join(sorted(RUN))}: {hidden}"


SAMPLE = """\
# Title

```python
x = 1
```

<!-- not run: downloads 1 GB -->
```bash
varptq fetch
```

1. A list:

   ```console
   $ echo a \\
   b > made
   shown output
   $ ls
   made
   ```

````text
```python
raise SystemExit
```
````

```python
assert x == 1
y = open("made").read()
```

```bash
ls missing
```
"""


@pytest.fixture
def sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Reader:
    monkeypatch.chdir(tmp_path)
    blocks = [block for block in blocks_of(SAMPLE) if block.language in RUN]
    return Reader("sample.md", blocks, tmp_path, Path(sys.executable))


def test_blocks_are_found_with_their_line_and_reason(sample: Reader) -> None:
    found = [(block.language, block.line, block.not_run) for block in sample.blocks]
    assert found == [
        ("python", 4, None),
        ("bash", 9, "downloads 1 GB"),
        ("console", 15, None),
        ("python", 29, None),
        ("bash", 34, None),
    ]


def test_a_block_runs_behind_the_ones_before_it(sample: Reader) -> None:
    sample.read_to(3)
    assert sample.namespace["y"] == "a b\n"


def test_a_failing_command_fails_and_stops_the_reader(sample: Reader) -> None:
    with pytest.raises(pytest.fail.Exception, match=r"sample\.md:34: exit code"):
        sample.read_to(4)
    sample.blocks.append(Block("python", "pass", 40, None))
    with pytest.raises(pytest.skip.Exception, match=r"sample\.md:34 failed"):
        sample.read_to(5)


def test_a_failing_python_block_shows_the_line_of_the_document(tmp_path: Path) -> None:
    blocks = [Block("python", "x = 1\nx.missing\n", 70, None)]
    reader = Reader("sample.md", blocks, tmp_path, Path(sys.executable))
    with pytest.raises(AttributeError) as error:
        reader.read_to(0)
    last = error.traceback[-1]
    assert (str(last.path).endswith("sample.md"), last.lineno + 1) == (True, 71)


@pytest.mark.parametrize(
    ("script", "foreign"),
    [
        ("varptq info a.safetensors\n# a comment\nVARPTQ_RUNTIME=cpu varptq demo | head -3", []),
        ("varptq quantize \\\n  make\n", []),
        ("make install && varptq demo\n", ["make"]),
        ("varptq demo; pip install x\n", ["pip"]),
    ],
)
def test_foreign_commands_are_named(script: str, foreign: list[str]) -> None:
    assert foreign_commands(script) == foreign
