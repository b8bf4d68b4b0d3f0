"""What is trained and how: architecture, data, schedule of both stages; defaults are the demo's.

One `Recipe` goes through the whole run and is stored with every state, so that a run is never
continued with other settings than it began with. `Recipe.from_file` reads JSON or YAML.
"""

from __future__ import annotations

from pydantic import Field

from varptq.models.scales import Scales
from varptq.models.var.transformer import VARArch
from varptq.models.var.vqvae import VQVAEArch
from varptq.settings import Settings


class Schedule(Settings):
    """One training loop: AdamW, linear warm-up, cosine to `final` of the learning rate.

    ema: decay of the averaged weights, which are what is exported. decay: weight decay of matrices.
    betas: AdamW's two memories. clip: largest gradient norm. save_every: steps between states, the
    most a kill can cost.
    """

    steps: int = Field(ge=1)
    batch: int = Field(default=64, ge=1)
    learning_rate: float = Field(gt=0)
    warmup: int = Field(default=100, ge=0)
    final: float = Field(default=0.02, ge=0, le=1)
    decay: float = Field(default=0.0, ge=0)
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = Field(default=1.0, gt=0)
    ema: float = Field(default=0.999, ge=0, lt=1)
    save_every: int = Field(default=250, ge=1)


class VQVAERecipe(Settings):
    """The first stage. Loss: squared error of the image, `perceptual` times LPIPS (needs its
    weights), and the codebook's with `commitment` of it pulling the encoder. Entries that are not
    used are replaced every `restart_every` steps, until `restart_until` of the run."""

    ch: int = 32
    ch_mult: tuple[int, ...] = (1, 1, 2)
    num_res_blocks: int = 2
    code_dim: int = 16
    codebook_size: int = 512
    num_phi: int = 4
    commitment: float = Field(default=0.25, ge=0)
    perceptual: float = Field(default=0.0, ge=0)
    restart_every: int = Field(default=100, ge=1)
    restart_until: float = Field(default=0.7, ge=0, le=1)
    schedule: Schedule = Schedule(steps=8000, learning_rate=6e-4)

    def arch(self, scales: Scales) -> VQVAEArch:
        return VQVAEArch(
            ch=self.ch,
            ch_mult=self.ch_mult,
            num_res_blocks=self.num_res_blocks,
            code_dim=self.code_dim,
            codebook_size=self.codebook_size,
            num_phi=self.num_phi,
            attn_levels=(len(self.ch_mult) - 1,),
            mid_attn=True,
            hit_scales=scales.num_scales,
        )


class VARRecipe(Settings):
    """The second stage: next-scale prediction on the tokens of the first one's encoder. Labels are
    dropped with probability `drop_label`, which guidance needs."""

    width: int = 256
    depth: int = 6
    num_heads: int = 4
    drop_label: float = Field(default=0.1, ge=0, le=1)
    schedule: Schedule = Schedule(steps=4000, learning_rate=8e-4, decay=0.05)

    def arch(self, scales: Scales, num_classes: int, vqvae: VQVAERecipe) -> VARArch:
        return VARArch(
            num_classes=num_classes,
            depth=self.depth,
            width=self.width,
            num_heads=self.num_heads,
            scales=scales,
            codebook_size=vqvae.codebook_size,
            code_dim=vqvae.code_dim,
            l2_norm=True,
            shared_adaln=False,
        )


class Recipe(Settings):
    """Both stages. bf16: matrix products and convolutions in bfloat16, weights stay float32."""

    sides: tuple[int, ...] = (1, 2, 3, 4, 6, 8)
    seed: int = 0
    bf16: bool = True
    vqvae: VQVAERecipe = VQVAERecipe()
    var: VARRecipe = VARRecipe()

    @property
    def scales(self) -> Scales:
        return Scales(self.sides)


class DecoderRecipe(Settings):
    """The decoder alone, on fixed tokens (decoder_stage.py). widths: of the discriminator's layers;
    adversarial: length of its gradient against that of the distance; matching: weight of the
    distance between features."""

    seed: int = 0
    bf16: bool = True
    widths: tuple[int, ...] = Field(default=(48, 96, 192), min_length=1)
    adversarial: float = Field(default=1.0, ge=0)
    matching: float = Field(default=4.0, ge=0)
    schedule: Schedule = Schedule(steps=6000, learning_rate=4e-4, betas=(0.5, 0.9))
