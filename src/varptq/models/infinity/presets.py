"""The published Infinity models (Han et al., CVPR 2025), which read flan-t5-xl, and the demo that
comes with the package, which reads hashed words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from varptq.models.family import ModelPreset
from varptq.models.infinity.bsqvae import BSQVAEArch
from varptq.models.infinity.schedules import SIZES, schedule
from varptq.models.infinity.transformer import InfinityArch
from varptq.models.infinity.words import HashedWords
from varptq.models.scales import Scales
from varptq.models.text_encoder import T5Encoder

# Of the released weights, and of the demo's.
HUB_REPO, LICENCE = "FoundationVision/Infinity", "MIT"
TEXT_CHANNELS, TEXT_MAXLEN, POOL_HEADS, LEVELS = 2048, 512, 16, 15
MLP_RATIO = 4
ASSETS, DEMO_FOLDER = Path(__file__).resolve().parents[2] / "assets", "demo_text"
DEMO_CHANNELS, DEMO_MAXLEN = 64, 32
BASE_CHANNELS, BLOCKS_PER_LEVEL = 128, 2
# Sixteen pixels a position, or eight and patches of two.
F16, F8 = (1, 2, 4, 4, 4), (1, 2, 4, 4)


def flan_t5_xl(download: bool) -> T5Encoder:
    """What the published models were trained with."""
    return T5Encoder(download=download)


def hashed_words(download: bool) -> HashedWords:
    """What the demo was trained with; there is nothing to download."""
    return HashedWords(DEMO_CHANNELS, DEMO_MAXLEN)


def _vae(bits: int, ch_mult: tuple[int, ...], patchify: bool = False) -> BSQVAEArch:
    return BSQVAEArch(
        ch=BASE_CHANNELS,
        ch_mult=ch_mult,
        num_res_blocks=BLOCKS_PER_LEVEL,
        code_dim=bits,
        patchify=patchify,
    )


def _preset(
    name: str,
    size: str,
    shape: tuple[int, int, int],
    vae: BSQVAEArch,
    transformer_file: str,
    autoencoder_file: str,
) -> ModelPreset:
    """`shape`: depth, width, heads."""
    depth, width, heads = shape
    arch = InfinityArch(
        depth=depth,
        width=width,
        num_heads=heads,
        ffn_width=MLP_RATIO * width,
        token_bits=vae.token_bits,
        text_channels=TEXT_CHANNELS,
        text_maxlen=TEXT_MAXLEN,
        pool_heads=POOL_HEADS,
        levels=LEVELS,
        scales=schedule(SIZES[size]),
    )
    files = (transformer_file, f"{autoencoder_file}.pth")
    about: dict[str, Any] = {"family": "infinity", "size": size, "encoder": flan_t5_xl}
    return ModelPreset(name, arch, vae, HUB_REPO, *files, licence=LICENCE, **about)


def _demo() -> ModelPreset:
    """The small CIFAR-10 model that comes with the package: 32 x 32 pixels, 10 MB."""
    vae = BSQVAEArch(ch=32, ch_mult=(1, 1, 2), num_res_blocks=2, code_dim=12)
    scales = Scales((1, 2, 3, 4, 6, 8))
    arch = InfinityArch(
        depth=6,
        width=192,
        num_heads=3,
        ffn_width=768,
        token_bits=vae.token_bits,
        text_channels=DEMO_CHANNELS,
        text_maxlen=DEMO_MAXLEN,
        pool_heads=3,
        levels=LEVELS,
        scales=scales,
    )
    parts = ("infinity_demo_text.safetensors", "vae_demo_text.safetensors")
    files = (f"{DEMO_FOLDER}/{part}" for part in parts)
    about: dict[str, Any] = {"family": "infinity", "size": scales, "encoder": hashed_words}
    names = _demo_prompts()
    return ModelPreset(
        "demo-text", arch, vae, None, *files, class_names=names, licence=LICENCE, **about
    )


def _demo_prompts() -> tuple[str, ...]:
    """Captions of the kind that the demo was trained on."""
    text = (ASSETS / DEMO_FOLDER / "prompts.txt").read_text(encoding="utf-8")
    return tuple(text.splitlines())


LARGE = (40, 3584, 28)
INDEX = "model.safetensors.index.json"
D56 = _vae(14, F8, patchify=True)
D56_FILE = "infinity_vae_d56_f8_14_patchify"

PRESETS: tuple[ModelPreset, ...] = (
    _demo(),
    # Which autoencoder the smallest was trained with is nowhere said: this one is a guess, and the
    # reader refuses it if the bits are others.
    _preset(
        "infinity-125m",
        "0.06M",
        (12, 768, 8),
        _vae(16, F16),
        "infinity_125M_256x256.pth",
        "infinity_vae_d16",
    ),
    _preset(
        "infinity-2b",
        "1M",
        (32, 2048, 16),
        _vae(32, F16),
        "infinity_2b_reg.pth",
        "infinity_vae_d32reg",
    ),
    _preset("infinity-8b", "1M", LARGE, D56, f"infinity_8b_weights/{INDEX}", D56_FILE),
    _preset(
        "infinity-8b-512", "0.25M", LARGE, D56, f"infinity_8b_512x512_weights/{INDEX}", D56_FILE
    ),
)
