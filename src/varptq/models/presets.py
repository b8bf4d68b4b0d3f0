"""Published models by name: what they are and where their files lie.

`resolve` turns a name into two files: the demo model comes with the package, the VAR models from
the Hugging Face cache and, only when asked to, over the network into that cache. No tensor is read
here; `checkpoint.py` does that and checks what it finds.
"""

from __future__ import annotations

import difflib
import os
import re
from dataclasses import dataclass
from pathlib import Path

from varptq.errors import CheckpointError, InputError
from varptq.models.scales import Scales
from varptq.models.state_file import file_sha256
from varptq.models.var.transformer import VARArch
from varptq.models.var.vqvae import VQVAEArch

HUB_REPO = "FoundationVision/var"
ASSETS = Path(__file__).resolve().parents[1] / "assets"
SCALES_256 = Scales((1, 2, 3, 4, 5, 6, 8, 10, 13, 16))
SCALES_512 = Scales((1, 2, 3, 4, 6, 9, 13, 18, 24, 32))
IMAGENET_CLASSES = 1000
CIFAR_CLASSES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)


@dataclass(frozen=True)
class ModelPreset:
    """One published pair of transformer and VQVAE. `repo` None: the files are in the package."""

    name: str
    var_arch: VARArch
    vae_arch: VQVAEArch
    repo: str | None
    var_file: str
    vae_file: str
    class_names: tuple[str, ...] | None = None


RELEASED_VQVAE = VQVAEArch(
    ch=160,
    ch_mult=(1, 1, 2, 2, 4),
    num_res_blocks=2,
    code_dim=32,
    codebook_size=4096,
    num_phi=4,
    attn_levels=(4,),
    mid_attn=True,
    hit_scales=10,
)


def _released(depth: int, scales: Scales, shared_adaln: bool = False) -> ModelPreset:
    """A model of the VAR paper: width 64 per layer, one head per 64 channels."""
    arch = VARArch(
        num_classes=IMAGENET_CLASSES,
        depth=depth,
        width=64 * depth,
        num_heads=depth,
        scales=scales,
        codebook_size=RELEASED_VQVAE.codebook_size,
        code_dim=RELEASED_VQVAE.code_dim,
        l2_norm=True,
        shared_adaln=shared_adaln,
    )
    return ModelPreset(
        name=f"var-d{depth}",
        var_arch=arch,
        vae_arch=RELEASED_VQVAE,
        repo=HUB_REPO,
        var_file=f"var_d{depth}.pth",
        vae_file="vae_ch160v4096z32.pth",
    )


def _demo() -> ModelPreset:
    """The small CIFAR-10 model that comes with the package: 32 x 32 pixels, 17 MB."""
    vae = VQVAEArch(
        ch=32,
        ch_mult=(1, 1, 2),
        num_res_blocks=2,
        code_dim=16,
        codebook_size=512,
        num_phi=4,
        attn_levels=(2,),
        mid_attn=True,
        hit_scales=6,
    )
    var = VARArch(
        num_classes=len(CIFAR_CLASSES),
        depth=6,
        width=256,
        num_heads=4,
        scales=Scales((1, 2, 3, 4, 6, 8)),
        codebook_size=vae.codebook_size,
        code_dim=vae.code_dim,
        l2_norm=True,
        shared_adaln=False,
    )
    files = ("demo/var_demo.safetensors", "demo/vae_demo.safetensors")
    return ModelPreset("demo", var, vae, None, *files, class_names=CIFAR_CLASSES)


PRESETS: dict[str, ModelPreset] = {
    entry.name: entry
    for entry in (
        _demo(),
        *(_released(depth, SCALES_256) for depth in (16, 20, 24, 30)),
        _released(36, SCALES_512, shared_adaln=True),
    )
}


def preset(name: str) -> ModelPreset:
    """The preset of that name. Raises `InputError` listing the known names and the nearest."""
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f", did you mean {near[0]!r}?" if near else ""
        raise InputError(f"unknown model {name!r}: expected one of {', '.join(PRESETS)}{hint}")
    return PRESETS[name]


def resolve(
    name: str, download: bool = False, cache_dir: str | Path | None = None
) -> tuple[Path, Path]:
    """Files (transformer, VQVAE) of a preset.

    Files of the VAR repository are looked up in the Hugging Face cache (`cache_dir`, else the one
    of `HF_HOME`); a missing one is fetched into it if `download`, and its SHA-256 is compared with
    the hub's. Raises `InputError` for an unknown name, `CheckpointError` if a file cannot be had.
    """
    chosen = preset(name)
    return (
        _locate(chosen, chosen.var_file, download, cache_dir),
        _locate(chosen, chosen.vae_file, download, cache_dir),
    )


def _locate(chosen: ModelPreset, file: str, download: bool, cache_dir: str | Path | None) -> Path:
    if chosen.repo is None:
        return ASSETS / file
    # Slow to import, and only these presets need it.
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(chosen.repo, file, cache_dir=cache_dir)
    if isinstance(cached, str):
        return Path(cached)
    if not download:
        raise CheckpointError(
            f"{chosen.name}: {file} of {chosen.repo} is not in the Hugging Face cache, "
            "run again with download=True (--download)"
        )
    path = _download(chosen.repo, file, cache_dir)
    _verify(path, chosen.repo, file)
    return path


def _download(repo: str, file: str, cache_dir: str | Path | None) -> Path:
    from huggingface_hub import constants, hf_hub_download

    if constants.HF_HUB_OFFLINE:
        raise CheckpointError(
            f"{file} of {repo} cannot be downloaded: HF_HUB_OFFLINE is set, unset it"
        )
    try:
        return Path(hf_hub_download(repo, file, cache_dir=cache_dir))
    except Exception as error:
        # The library's errors come from several HTTP clients and differ between its versions.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"{file} of {repo} cannot be downloaded ({reason}): check the network, or give files"
        ) from None


def _verify(path: Path, repo: str, file: str) -> None:
    """Compare a fresh download with the hub's SHA-256; a file that differs leaves the cache."""
    expected = _hub_sha256(path, repo, file)
    if expected is None or file_sha256(path) == expected:
        return
    blob = path.resolve()
    path.unlink(missing_ok=True)
    blob.unlink(missing_ok=True)
    raise CheckpointError(
        f"{file} of {repo} arrived damaged (SHA-256 is not {expected}) and was removed: run again"
    )


def _hub_sha256(path: Path, repo: str, file: str) -> str | None:
    """SHA-256 in the hub's large-file metadata, None where it is not known."""
    if path.is_symlink():
        # The cache names a blob by its etag; one step only, a blob may itself be a link elsewhere.
        etag = Path(os.readlink(path)).name
    else:
        from huggingface_hub import get_hf_file_metadata, hf_hub_url

        try:
            etag = get_hf_file_metadata(hf_hub_url(repo, file)).etag or ""
        except Exception:
            # As in `_download`; the file is here, and strict loading still checks what it holds.
            return None
    return etag if re.fullmatch(r"[0-9a-f]{64}", etag) else None
