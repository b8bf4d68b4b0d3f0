"""What is trained for the text-to-image demo and how; defaults are the demo's (train_text.py)."""

from __future__ import annotations

from pydantic import Field
from recipe import Schedule

from varptq.models.infinity.bsqvae import BSQVAEArch
from varptq.models.infinity.transformer import InfinityArch
from varptq.models.scales import Scales
from varptq.settings import Settings

# Rows of the level embedding, as all published models have: a checkpoint is read at their schedule
# before it is put over its own.
LEVELS = 15


class BitsRecipe(Settings):
    """The first stage (bits_stage.py). commitment: weight of the distance between features and
    their bits; entropy: of the entropies of the bits; perceptual: of LPIPS, which needs its
    weights."""

    ch: int = 32
    ch_mult: tuple[int, ...] = (1, 1, 2)
    num_res_blocks: int = 2
    code_dim: int = Field(default=12, ge=1)
    commitment: float = Field(default=0.25, ge=0)
    entropy: float = Field(default=0.02, ge=0)
    perceptual: float = Field(default=0.0, ge=0)
    schedule: Schedule = Schedule(steps=6000, batch=32, learning_rate=1e-3)

    def arch(self) -> BSQVAEArch:
        return BSQVAEArch(
            ch=self.ch,
            ch_mult=self.ch_mult,
            num_res_blocks=self.num_res_blocks,
            code_dim=self.code_dim,
        )


class InfinityRecipe(Settings):
    """The second stage (text_stage.py). drop_text: share of prompts that are left out, which
    guidance needs. flips: bits of a scale are flipped with a probability drawn up to this one.
    by_side: a token weighs 1 / side of its map, else all weigh the same."""

    width: int = 192
    depth: int = 6
    num_heads: int = 3
    ffn_width: int = 768
    text_channels: int = 64
    text_maxlen: int = 32
    pool_heads: int = 3
    drop_text: float = Field(default=0.1, ge=0, le=1)
    flips: float = Field(default=0.2, ge=0, le=0.5)
    by_side: bool = True
    schedule: Schedule = Schedule(
        steps=12000, batch=16, learning_rate=8e-4, warmup=200, decay=0.05, ema=0.998
    )

    def arch(self, scales: Scales, token_bits: int) -> InfinityArch:
        return InfinityArch(
            depth=self.depth,
            width=self.width,
            num_heads=self.num_heads,
            ffn_width=self.ffn_width,
            token_bits=token_bits,
            text_channels=self.text_channels,
            text_maxlen=self.text_maxlen,
            pool_heads=self.pool_heads,
            levels=LEVELS,
            scales=scales,
        )


class TextRecipe(Settings):
    """Both stages. bf16: matrix products and convolutions in bfloat16, weights stay float32."""

    sides: tuple[int, ...] = (1, 2, 3, 4, 6, 8)
    seed: int = 0
    bf16: bool = True
    bits: BitsRecipe = BitsRecipe()
    infinity: InfinityRecipe = InfinityRecipe()

    @property
    def scales(self) -> Scales:
        return Scales(self.sides)
