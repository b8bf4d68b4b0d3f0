"""Guidance, filters and smoothing against the reference implementation."""

from __future__ import annotations

import pytest
import torch

from varptq.models.sampling import filter_logits, guidance_strength, guided, smooth_embedding
from varptq.models.scales import Scales

GUIDED_TOLERANCE = 3e-4  # float32 logits, amplified by 1 + 2t
PROBABILITY_TOLERANCE = 1e-5
SMOOTH_TOLERANCE = 1e-3  # the last temperatures amplify float32 noise


def test_guidance(golden, a_file):
    data = golden.npz(a_file)
    scales = Scales(data["patch_nums"])
    both_2BLV = torch.from_numpy(data["tf_logits"]), torch.from_numpy(data["tf_logits_uncond"])
    for j, cfg in enumerate(data["cfg_values"].tolist()):
        for k, part in enumerate(scales.slices()):
            t = guidance_strength(cfg, k, scales)
            if f"guidance_t_{j}" in data:
                assert data[f"guidance_t_{j}"][part] == pytest.approx(t, abs=1e-6)
            if f"guided_logits_{j}" in data:
                ours = guided(torch.cat(both_2BLV)[:, part], t)
                expected = torch.from_numpy(data[f"guided_logits_{j}"][:, part])
                torch.testing.assert_close(ours, expected, rtol=0, atol=GUIDED_TOLERANCE)


def test_filtered_probabilities(golden, a_file):
    data = golden.npz(a_file)
    logits_BLV = torch.from_numpy(data["guided_logits_0"])
    for (top_k, top_p), expected in zip(
        data["sample_settings"].tolist(), data["sample_probs"], strict=True
    ):
        probs = filter_logits(logits_BLV, int(top_k), top_p).softmax(-1)
        expected = torch.from_numpy(expected)
        assert torch.equal(probs > 0, expected > 0)
        torch.testing.assert_close(probs, expected, rtol=0, atol=PROBABILITY_TOLERANCE)


def test_smooth_embedding(golden, a_file):
    data = golden.npz(a_file)
    if "smooth_h" not in data:
        pytest.skip(f"{a_file} has no smooth_* arrays")
    codebook = golden.weights(str(data["vae_file"]))["quantize.embedding.weight"]
    scales = Scales(data["patch_nums"])
    logits_BLV, noise_BLV, expected = (
        torch.from_numpy(data[f"smooth_{name}"]) for name in ("logits", "gumbel", "h")
    )
    filtered_BLV = filter_logits(logits_BLV, int(data["smooth_top_k"]), float(data["smooth_top_p"]))
    for k, part in enumerate(scales.slices()):
        ratio = scales.ratio(k)
        ours = smooth_embedding(filtered_BLV[:, part], noise_BLV[:, part], codebook, ratio)
        torch.testing.assert_close(ours, expected[:, part], rtol=0, atol=SMOOTH_TOLERANCE)
