"""Peak memory of a process that loads a d16 artifact and makes one image.

    python -m benchmarks.speed.runtime_memory [--quick] [--json FILE]

Saves VAR-d16 with random weights at W8A8 and W4A4, and loads each in a fresh process on the runtime
cpu, with the image decoder in float32 and in bfloat16. The peak is the kernel's high-water mark of
resident memory, mapped pages of the file and of the libraries included. --quick: W8A8, float32.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

NAME = "benchmarks.speed.runtime_memory"
GB = 1e9
# At most this many bytes, with weights in 8 and in 4 bits.
MUST = {"w8a8": 1.1 * GB, "w4a4": 0.95 * GB}


def peak() -> int:
    """Bytes. Not getrusage's, which a process inherits from the one that started it."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("this system does not say a process's peak memory")


def child(folder: str, dtype: str) -> None:
    import torch

    import varptq

    torch.set_num_threads(1)
    peaks = {"imports": peak()}
    pipe = varptq.load(folder, runtime="cpu", dtype=getattr(torch, dtype))
    peaks["loaded"] = peak()
    varptq.generate(pipe, [207], seed=0)
    peaks["one image"] = peak()
    print(json.dumps(peaks))


def measure(presets: tuple[str, ...], dtypes: tuple[str, ...]) -> list[dict[str, Any]]:
    from benchmarks.common.runtime_variants import simulated
    from varptq.artifact import save
    from varptq.models.pipeline import build_model

    pipe, found = build_model("var-d16"), []
    for preset in presets:
        with tempfile.TemporaryDirectory() as folder:
            save(simulated(pipe, preset), folder, force=True)
            for dtype in dtypes:
                command = [
                    sys.executable,
                    "-m",
                    "benchmarks.speed.runtime_memory",
                    "--child",
                    folder,
                    dtype,
                ]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                case: dict[str, Any] = {"preset": preset, "decoder": dtype, "must": MUST[preset]}
                found.append(case | {"peaks": json.loads(done.stdout)})
                show(found[-1])
    return found


def show(case: dict[str, Any]) -> None:
    peaks = ", ".join(f"{name} {value / GB:.2f}" for name, value in case["peaks"].items())
    held = case["peaks"]["one image"] <= case["must"]
    print(
        f"{case['preset']}, decoder {case['decoder']}: peak GB {peaks}; must {case['must'] / GB} "
        f"{'held' if held else 'MISSED'}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one artifact, the decoder in float32")
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    parser.add_argument("--child", nargs=2, metavar=("FOLDER", "DTYPE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(*options.child)
        return
    presets = ("w8a8",) if options.quick else tuple(MUST)
    found = measure(presets, ("float32",) if options.quick else ("float32", "bfloat16"))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
