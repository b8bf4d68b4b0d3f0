"""Whether wheels keep what their names promise: `python tests/helpers/wheel_audit.py WHEEL...`.

auditwheel reads which glibc the library inside needs; it compares that with no name, and repairs
wheels of this machine's processor alone.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

_PLATFORM = re.compile(r"manylinux_2_(\d+)_(\w+)")
# The wheel's own name stands before it, without quotes.
_FOUND = re.compile(f'"{_PLATFORM.pattern}"')


def complaint(wheel: Path) -> str | None:
    """What is wrong with a wheel, in one line; None where auditwheel agrees with its name."""
    command = [sys.executable, "-m", "auditwheel", "show", str(wheel)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    promised = _PLATFORM.search(wheel.stem)
    found = _FOUND.search(done.stdout)
    if promised is None:
        return f"{wheel.name}: expected a name with manylinux_2_N"
    if done.returncode or found is None:
        return f"{wheel.name}: auditwheel finds no manylinux in it: {done.stdout}{done.stderr}"
    if int(found[1]) > int(promised[1]) or found[2] != promised[2]:
        return f"{wheel.name}: auditwheel finds {found[0]}"
    return None


if __name__ == "__main__":
    complaints = [text for name in sys.argv[1:] if (text := complaint(Path(name)))]
    sys.exit("\n".join(complaints) or 0)
