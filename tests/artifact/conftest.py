"""A model small enough to be saved a hundred times, and a forger of artifacts whose hashes fit."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from varptq.artifact import save
from varptq.artifact.schema import digest
from varptq.calibrate.quantize import quantize
from varptq.models.pipeline import Pipeline
from varptq.models.scales import Scales
from varptq.models.var.transformer import VAR, VARArch, randomize
from varptq.models.var.vqvae import VQVAE, VQVAEArch
from varptq.quant.config import QuantConfig
from varptq.quant.pipeline import QuantizedPipeline

Document = dict[str, Any]
State = dict[str, Tensor]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def tiny_pipeline() -> Pipeline:
    """Odd numbers of classes and codebook entries; width 128, so that groups of 128 apply."""
    scales = Scales((1, 2, 3))
    var = VAR(VARArch(3, 1, 128, 2, scales, 37, 8, l2_norm=True, shared_adaln=False))
    vae_arch = VQVAEArch(
        ch=32,
        ch_mult=(1, 1),
        num_res_blocks=1,
        code_dim=8,
        codebook_size=37,
        num_phi=2,
        attn_levels=(1,),
        mid_attn=True,
    )
    vae = VQVAE(vae_arch, scales)
    randomize(var, torch.Generator().manual_seed(0))
    vae.randomize(torch.Generator().manual_seed(1))
    pipe = Pipeline(var.eval(), vae.eval(), "tiny", ("a", "b", "ç"), {"var": "seed 0"})
    pipe.var.requires_grad_(False)
    pipe.vae.requires_grad_(False)
    return pipe


def tiny_quantized(
    preset: str = "w4a4+paper", dtype: torch.dtype = torch.float32
) -> QuantizedPipeline:
    return quantize(tiny_pipeline().to(dtype=dtype), QuantConfig.preset(preset), method="rtn")


@pytest.fixture(scope="session")
def quantized() -> QuantizedPipeline:
    return tiny_quantized()


@pytest.fixture(scope="session")
def pristine(quantized: QuantizedPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact that tests copy and do not touch."""
    return save(quantized, tmp_path_factory.mktemp("pristine") / "model")


def forged(
    source: Path,
    folder: Path,
    config: Callable[[Document], object] | None = None,
    tensors: Callable[[State], object] | None = None,
) -> Path:
    """A copy of an artifact with altered contents whose sizes and hashes are right again."""
    document = json.loads((source / "config.json").read_text())
    state = load_file(source / "model.safetensors")
    if config:
        config(document)
    if tensors:
        tensors(state)
    folder.mkdir()
    weights = folder / "model.safetensors"
    save_file(state, weights, {"config_sha256": digest(document)})
    content = weights.read_bytes()
    entry = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    document["files"] = {"model.safetensors": entry}
    (folder / "config.json").write_text(json.dumps(document))
    return folder


@pytest.fixture
def forge(pristine: Path, tmp_path: Path) -> Callable[..., Path]:
    """`forged` of the pristine artifact."""
    return lambda config=None, tensors=None: forged(pristine, tmp_path / "forged", config, tensors)
