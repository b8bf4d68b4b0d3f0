"""Whether an installed varptq is whole: `python tests/helpers/installed.py`, from any folder.

The native core loads and computes on every instruction set that the processor has, and the command
line answers. Needs nothing but the package: wheels are tested by it where there is no pytest.
"""

from __future__ import annotations

import contextlib
import io
import sys
import tempfile
from pathlib import Path

import varptq
from varptq.__main__ import main as command
from varptq.native import binding


def main() -> None:
    here = Path(varptq.__file__).parent
    assert binding.core() is not None, binding.reason()
    config = varptq.QuantConfig.preset("w8a8")
    calibration = varptq.CalibrationConfig(num_samples=2)
    pipe = varptq.load_model("demo")
    quantized = varptq.quantize(pipe, config, method="rtn", calibration=calibration, seed=0)
    images = {}
    with tempfile.TemporaryDirectory() as folder:
        artifact = Path(folder) / "artifact"
        varptq.save(quantized, artifact)
        for isa in binding.features():
            assert binding.select_isa(isa), isa
            loaded = varptq.load(artifact, runtime="cpu")
            images[isa] = varptq.generate(loaded, ["ship"], seed=0).images
        # In this process: an emulator cannot start another.
        sys.argv = ["varptq", "info", str(artifact)]
        with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.suppress(SystemExit):
            command()
    assert "w8a8" in said.getvalue(), said.getvalue()
    portable = images["portable"]
    assert all(portable.equal(other) for other in images.values())
    print(f"varptq {varptq.__version__} in {here} is whole; images equal on {', '.join(images)}")


if __name__ == "__main__":
    main()
