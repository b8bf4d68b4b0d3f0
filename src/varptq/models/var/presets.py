"""The published VAR models, and the demo model that comes with the package."""

from __future__ import annotations

from varptq.models.class_names import imagenet_classes
from varptq.models.family import ModelPreset
from varptq.models.scales import Scales
from varptq.models.var.transformer import VARArch
from varptq.models.var.vqvae import VQVAEArch

# Of the released weights, and of the demo's.
HUB_REPO, LICENCE = "FoundationVision/var", "MIT"
SCALES_256 = Scales((1, 2, 3, 4, 5, 6, 8, 10, 13, 16))
SCALES_512 = Scales((1, 2, 3, 4, 6, 9, 13, 18, 24, 32))
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
        num_classes=len(imagenet_classes()),
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
        transformer_arch=arch,
        autoencoder_arch=RELEASED_VQVAE,
        repo=HUB_REPO,
        transformer_file=f"var_d{depth}.pth",
        autoencoder_file="vae_ch160v4096z32.pth",
        class_names=imagenet_classes(),
        licence=LICENCE,
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
    return ModelPreset("demo", var, vae, None, *files, class_names=CIFAR_CLASSES, licence=LICENCE)


PRESETS: tuple[ModelPreset, ...] = (
    _demo(),
    *(_released(depth, SCALES_256) for depth in (16, 20, 24, 30)),
    _released(36, SCALES_512, shared_adaln=True),
)
