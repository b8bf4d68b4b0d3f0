"""A calibration of the tiny model in a process of its own, alone or under torchrun.

    python tests/helpers/calibration_process.py OUT SEED [--die]

One line on stdout per piece written. --die: the last rank kills itself after its first unit, in the
first attempt of torchrun alone.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch

from conftest import build_tiny
from varptq.artifact import save
from varptq.calibrate.config import CalibrationConfig
from varptq.calibrate.quantize import quantize
from varptq.distributed import Ranks
from varptq.quant.config import QuantConfig
from varptq.work import Piece, Work

CONFIG = CalibrationConfig(
    num_samples=35, steps=3, theta_samples=2, theta_grid=50, rounding="gptq+adaround"
)
QUANT = QuantConfig.preset("w4a4+paper")


class Noisy(Work):
    """Tells of every piece, and may die."""

    die = False

    def write(self, name: str, piece: Piece) -> None:
        super().write(name, piece)
        print(f"rank {self.ranks.rank} wrote {name}", flush=True)
        first = os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0"
        if self.die and first and name.startswith("unit") and self.ranks.rank:
            os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    torch.set_num_threads(1)
    out = Path(sys.argv[1])
    with Noisy(out.with_name("work"), Ranks.from_environment()) as work:
        work.die = "--die" in sys.argv
        model = quantize(build_tiny(), QUANT, calibration=CONFIG, seed=int(sys.argv[2]), work=work)
        if work.ranks.first:
            save(model, out)
        work.ranks.barrier()


if __name__ == "__main__":
    main()
