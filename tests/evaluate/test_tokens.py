"""Token fidelity against sums written out in numpy, and its invariants on small random models."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from varptq.errors import ConfigError, InputError
from varptq.evaluate.paired import psnr, token_agreement
from varptq.evaluate.tokens import filtered_kl_divergence, kl_divergence, token_fidelity
from varptq.models.generate import generate
from varptq.models.pipeline import Pipeline
from varptq.models.reading import guided_logits
from varptq.models.scales import Scales
from varptq.models.var.transformer import VAR, VARArch, randomize
from varptq.models.var.vqvae import VQVAE, VQVAEArch

SCALES = Scales((1, 2, 3))
CLASSES, VOCABULARY = 5, 37


def small_pipeline(seed: int, classes: int = CLASSES) -> Pipeline:
    """A random model of 14 tokens and 37 codebook entries."""
    arch = VARArch(classes, 1, 32, 2, SCALES, VOCABULARY, 8, l2_norm=True, shared_adaln=False)
    vae_arch = VQVAEArch(
        ch=32, ch_mult=(1, 1), num_res_blocks=1, code_dim=8, codebook_size=VOCABULARY, num_phi=4
    )
    pipe = Pipeline(VAR(arch), VQVAE(vae_arch, SCALES), f"small-{seed}")
    generator = torch.Generator().manual_seed(seed)
    randomize(pipe.var, generator)
    pipe.vae.randomize(generator)
    return pipe


@pytest.fixture(scope="module")
def pair() -> tuple[Pipeline, Pipeline]:
    """Two models that share the VQVAE, as a float and a quantized one do."""
    first, second = small_pipeline(0), small_pipeline(1)
    second.vae = first.vae
    return first, second


@pytest.fixture(scope="module")
def samples(pair: tuple[Pipeline, Pipeline]) -> tuple[list[int], Tensor]:
    labels = [0, 4, 2, 2, 1]
    return labels, generate(pair[0], labels, seed=3, decode=False).tokens


def brute_kl(p_logits: np.ndarray, q_logits: np.ndarray) -> float:
    p, q = (np.exp(x - x.max()) / np.exp(x - x.max()).sum() for x in (p_logits, q_logits))
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def brute_kept(logits: np.ndarray, top_k: int, top_p: float) -> list[int]:
    """Entries in descending order while the mass before them is below top_p, of the top_k."""
    order = sorted(range(len(logits)), key=lambda v: -logits[v])[: top_k or None]
    mass = np.exp(logits[order] - logits.max())
    mass /= mass.sum()
    before = np.concatenate(([0.0], np.cumsum(mass)[:-1]))
    return [entry for entry, share in zip(order, before, strict=True) if share < top_p]


def random_logits(seed: int, size: int, spread: float) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    p, q = torch.randn(2, size, generator=generator) * spread
    return p, q


@given(seed=st.integers(0, 999), size=st.integers(1, 130), spread=st.floats(0.1, 5))
def test_kl_is_the_sum_written_out_and_not_negative(seed: int, size: int, spread: float) -> None:
    p, q = random_logits(seed, size, spread)
    found = float(kl_divergence(p, q))
    assert found == pytest.approx(brute_kl(p.double().numpy(), q.double().numpy()), abs=1e-12)
    assert found >= -1e-15


@pytest.mark.slow
@given(
    seed=st.integers(0, 999),
    size=st.integers(1, 130),
    top_k=st.sampled_from([0, 1, 3, 37, 900]),
    top_p=st.sampled_from([0.1, 0.5, 0.96, 1.0]),
)
def test_filtered_kl_is_that_of_the_kept_entries(
    seed: int, size: int, top_k: int, top_p: float
) -> None:
    p, q = random_logits(seed, size, 2.0)
    kept = brute_kept(p.double().numpy(), top_k, top_p)
    expected = brute_kl(p.double().numpy()[kept], q.double().numpy()[kept])
    found = float(filtered_kl_divergence(p, q, top_k, top_p))
    assert found == pytest.approx(expected, abs=1e-12)


def test_filtered_kl_stays_finite_where_the_models_keep_different_entries() -> None:
    p = torch.tensor([100.0, 99.0, -100.0, -100.0])
    assert torch.isfinite(filtered_kl_divergence(p, -p, 2, 0.96))
    # The only entry that p keeps has all the mass of both.
    assert float(filtered_kl_divergence(p, -p, 1, 0.96)) == 0.0


def test_a_model_equals_itself(
    pair: tuple[Pipeline, Pipeline], samples: tuple[list[int], Tensor]
) -> None:
    found = token_fidelity(pair[0], pair[0], *samples)
    assert (found.kl, found.kl_filtered, found.top1) == (0.0, 0.0, 1.0)
    assert found.kl_per_scale == (0.0, 0.0, 0.0)
    assert (found.num_images, found.num_tokens) == (5, 5 * SCALES.num_tokens)


def test_means_over_scales_and_tokens(
    pair: tuple[Pipeline, Pipeline], samples: tuple[list[int], Tensor]
) -> None:
    """Every number again from the logits of both models, token by token."""
    labels, ids_BL = samples
    cfg, top_k, top_p = 2.0, 9, 0.8
    found = token_fidelity(*pair, labels, ids_BL, cfg, top_k, top_p)
    with torch.no_grad():
        streams = [list(guided_logits(pipe, torch.tensor(labels), ids_BL, cfg)) for pipe in pair]
    kl, filtered, same = [], [], []
    for (_, p_BlV), (_, q_BlV) in zip(*streams, strict=True):
        p, q = (x.flatten(0, 1).double().numpy() for x in (p_BlV, q_BlV))
        kept = [brute_kept(row, top_k, top_p) for row in p]
        kl.append([brute_kl(a, b) for a, b in zip(p, q, strict=True)])
        filtered.append([brute_kl(a[k], b[k]) for a, b, k in zip(p, q, kept, strict=True)])
        same.append([int(a.argmax() == b.argmax()) for a, b in zip(p, q, strict=True)])
    for name, values in (("kl", kl), ("kl_filtered", filtered), ("top1", same)):
        per_scale = [float(np.mean(scale)) for scale in values]
        assert getattr(found, f"{name}_per_scale") == pytest.approx(per_scale, abs=1e-9)
        assert getattr(found, name) == pytest.approx(np.concatenate(values).mean(), abs=1e-9)
    assert found.kl > 0


@pytest.mark.parametrize("batch_size", [1, 2, 5, 64])
def test_batches_do_not_matter(
    pair: tuple[Pipeline, Pipeline], samples: tuple[list[int], Tensor], batch_size: int
) -> None:
    whole = token_fidelity(*pair, *samples)
    cut = token_fidelity(*pair, *samples, batch_size=batch_size)
    assert cut.kl_per_scale == pytest.approx(whole.kl_per_scale, rel=1e-4)
    assert cut.top1 == whole.top1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda a, ids: {"tokens": ids[:, :-1]}, "shape"),
        (lambda a, ids: {"tokens": ids + VOCABULARY}, "ids"),
        (lambda a, ids: {"tokens": ids - VOCABULARY}, "ids"),
        (lambda a, ids: {"prompts": [0, 1]}, "shape"),
        (lambda a, ids: {"prompts": [0, 1, 2, 3, CLASSES]}, "class 5"),
        (lambda a, ids: {"batch_size": 0}, "batch_size"),
        (lambda a, ids: {"top_p": 2.0}, "top_p"),
        (
            lambda a, ids: {"quant_pipe": small_pipeline(0, classes=3)},
            "numbers of prompts are 5 and 3",
        ),
    ],
)
def test_bad_arguments_are_named(
    pair: tuple[Pipeline, Pipeline],
    samples: tuple[list[int], Tensor],
    change: Callable[[Pipeline, Tensor], dict[str, object]],
    words: str,
) -> None:
    labels, ids_BL = samples
    arguments = {"float_pipe": pair[0], "quant_pipe": pair[1], "prompts": labels, "tokens": ids_BL}
    with pytest.raises((InputError, ConfigError), match=words):
        token_fidelity(**(arguments | change(pair[0], ids_BL)))


def test_agreement_counts_equal_tokens() -> None:
    first = torch.tensor([[1, 2, 3], [4, 5, 6]])
    assert token_agreement(first, first) == 1.0
    assert token_agreement(first, first.clone().fill_(4)) == pytest.approx(1 / 6)
    with pytest.raises(InputError, match="shapes"):
        token_agreement(first, first[:1])


def test_psnr_of_a_known_error() -> None:
    black = np.zeros((2, 3, 3, 3), np.uint8)
    assert psnr(black, black) == math.inf
    # Error 255 everywhere is 0 dB; differences of uint8 must not wrap around.
    assert psnr(black, black + 255) == pytest.approx(0.0)
    assert psnr(black + 255, black) == pytest.approx(0.0)
    with pytest.raises(InputError, match="shapes"):
        psnr(black, black[:1])
