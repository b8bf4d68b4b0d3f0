"""The kernels compile for GPUs that are not here, down to integer tensor-core instructions."""

import os
import subprocess
from pathlib import Path

import pytest

PROGRAM = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import triton
from varptq.runtime.cuda import attention, gemm, quantize

INT8 = {"a_ptr", "codes_ptr", "q_ptr", "k_ptr", "v_ptr"}
INT32 = {"mean_row_ptr", "bias_row_ptr", "za_ptr", "a1_ptr", "zw_ptr", "w1_ptr", "qz_ptr",
         "qsum_ptr", "kz_ptr", "ksum_ptr", "vd_ptr", "shift_ptr", "ends_ptr", "zero_ptr", "sum_ptr"}

def ptx(kernel, capability, weight="*i8", **constants):
    signature, values = {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], values[(place,)] = "constexpr", constants[name]
        elif name.endswith("_ptr"):
            kinds = {"w_ptr": weight} | dict.fromkeys(INT8, "*i8") | dict.fromkeys(INT32, "*i32")
            kinds["words_ptr"] = "*i64"
            signature[name] = kinds.get(name, "*fp32")
        else:
            signature[name] = "fp32" if name in ("eps", "root") else "i32"
    source = ASTSource(kernel, signature=signature, constexprs=values)
    target, options = GPUTarget("cuda", capability, 32), dict(enable_fp_fusion=False)
    return triton.compile(source, target=target, options=options).asm["ptx"]

# Lines without a product are the same for every GPU.
ptx(quantize._quantize, 80, WIDTH=512, GROUP=64, SEGMENT=64, BLOCK=128, PROLOGUE=1, CENTRED=True,
    SPLIT=False, TOP=15.0, OFFSET=0, BOOK=0)
ptx(quantize._quantize, 80, WIDTH=512, GROUP=512, SEGMENT=512, BLOCK=0, PROLOGUE=2, CENTRED=True,
    SPLIT=True, TOP=127.0, OFFSET=0, BOOK=0)
for group in (512, 128):
    # A codebook's sums are rounded number by number.
    assert "fma" not in ptx(
        quantize._quantize, 80, WIDTH=512, GROUP=group, SEGMENT=group, BLOCK=128, PROLOGUE=0,
        CENTRED=True, SPLIT=False, TOP=15.0, OFFSET=0, BOOK=8)
value = dict(V_TOP=15.0, V_OFFSET=0, V_COPIES=8.0)
ptx(attention.append, 80, WIDTH=64, UNIT=True, Q_TOP=255.0, K_TOP=255.0, SEGMENT=False, Q_BOOK=0,
    K_BOOK=0, V_BOOK=0, **value)
ptx(attention.append, 80, WIDTH=64, UNIT=True, Q_TOP=15.0, K_TOP=15.0, SEGMENT=False, Q_BOOK=8,
    K_BOOK=8, V_BOOK=8, **value)
ptx(attention.append_segment, 80, WIDTH=64, **value)

for capability, product in ((80, "mma.sync"), (90, "wgmma")):
    tiles = dict(WIDTH=64, BQ=32, BK=64)
    rows = dict(BIAS=True, EXACT=False, BM=64, BN=64)
    nibbles = dict(weight="*u8", NIBBLES=True, **rows)
    for text in (
        ptx(gemm._linear, capability, GROUPED=False, NIBBLES=False, TABLE=False, BK=128, **rows),
        ptx(gemm._linear, capability, GROUPED=True, TABLE=False, BK=64, **nibbles),
        ptx(gemm._linear, capability, GROUPED=False, TABLE=True, BK=128, **nibbles),
    ):
        assert any(product in line and ".s32.s8.s8" in line for line in text.splitlines())
    ptx(attention.stats, capability, **tiles)
    ptx(attention.mass, capability, **tiles)
    assert ".s32.s8.s8" in ptx(attention.mix, capability, P_TOP=255.0, **tiles)
"""


@pytest.mark.slow
def test_kernels_compile_to_integer_products(warm: Path) -> None:
    """In a process of its own: here the kernels may be defined for the interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [str(warm / "python"), "-c", PROGRAM]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
