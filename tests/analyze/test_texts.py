"""An analysis of a model that reads texts: both attentions, each by itself."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from torch import Tensor

import varptq
from helpers.infinity_states import PRESET, prompts, sized
from varptq.analyze.analyze import AnalysisConfig, analyze
from varptq.analyze.attention import attention_statistics
from varptq.analyze.bench import FLOAT, Bench, sites
from varptq.analyze.figures import figures
from varptq.evaluate.tokens import token_fidelity
from varptq.models.pipeline import Pipeline
from varptq.models.presets import PRESETS

W6A6 = varptq.QuantConfig.preset("w6a6")
ASKED = prompts(3, 5, 1, 3)


@pytest.fixture(scope="module")
def bare() -> Pipeline:
    """One block: an analysis measures every tensor several times."""
    shallow = dataclasses.replace(PRESET, transformer_arch=sized(depth=1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "tiny", shallow)
        return varptq.build_model("tiny", seed=1)


@pytest.fixture(scope="module")
def pipe(bare: Pipeline) -> Pipeline:
    return bare.drawing_for(ASKED)


@pytest.fixture(scope="module")
def tokens(pipe: Pipeline) -> Tensor:
    return varptq.generate(pipe, ASKED, seed=3, decode=False).tokens


@pytest.mark.slow
def test_the_document_names_both_attentions(bare: Pipeline, pipe: Pipeline) -> None:
    settings = AnalysisConfig(images=2, widths=(4,))
    document = analyze(bare, W6A6, settings=settings, prompts=ASKED).document
    json.dumps(document, allow_nan=False)
    assert len(document["kinds"]) == len(set(document["kinds"]))
    assert {"query", "cross_query", "proj input", "cross_proj input"} <= set(document["kinds"])
    depth, count = pipe.var.arch.depth, pipe.scales.num_scales
    for name in ("product_errors", "text_product_errors"):
        both = document[name]["both"]
        assert len(both) == depth and {len(row) for row in both} == {count}
        assert all(0 < error < 0.1 for row in both for error in row)
    assert "by_key_scale" not in document["text_attention"]
    assert document["attention"]["keys"] == list(pipe.scales.ends)
    rows = {(row["kind"], row["block"], row["type"]) for row in document["tensors"]}
    assert len(rows) == len(document["tensors"])
    drawn = figures(document)
    assert all(picture.width > 100 for picture in drawn.values())
    without = {name: value for name, value in document.items() if not name.startswith("text_")}
    plain = figures(without)
    assert set(drawn) - set(plain) == {"text_attention.png"}
    # A third chart of curves, below the two.
    assert drawn["scales.png"].height > plain["scales.png"].height


def test_statistics_of_texts_are_those_of_each_prompt(pipe: Pipeline, tokens: Tensor) -> None:
    """Rows of different lengths in one batch, against one prompt after another."""
    found = attention_statistics(pipe, ASKED, tokens, text=True).to_dict()
    alone = [
        attention_statistics(pipe, ASKED[i : i + 1], tokens[i : i + 1], text=True).to_dict()
        for i in range(len(ASKED))
    ]
    assert found["keys"] == pytest.approx([3.0] * pipe.scales.num_scales)
    for key in ("effective_keys", "top_key"):
        means = torch.tensor([one[key] for one in alone]).mean(0).tolist()
        assert found[key] == pytest.approx(means, rel=1e-5), key
    # One key takes all the mass there is.
    assert alone[2]["top_key"] == pytest.approx([1.0] * pipe.scales.num_scales)


def test_the_bench_measures_what_token_fidelity_does(pipe: Pipeline, tokens: Tensor) -> None:
    """KL summed over the bits of a token, whatever the batch."""
    bench = Bench(pipe, ASKED, tokens, batch_size=3)
    assert bench.kl(FLOAT).kl == 0
    q = varptq.quantize(
        pipe,
        varptq.QuantConfig.preset("w6a6+paper"),
        method="rtn",
        calibration=varptq.CalibrationConfig(num_samples=2),
    )
    ours = bench.kl(q.config)
    theirs = token_fidelity(pipe, q, ASKED, tokens, batch_size=2)
    assert ours.kl == pytest.approx(theirs.kl, rel=1e-4)
    assert ours.kl_per_scale == pytest.approx(theirs.kl_per_scale, rel=1e-4)
    assert 0 < theirs.kl < pipe.alphabet.draws * math.log(2)


def test_sites_are_all_that_a_config_quantizes(pipe: Pipeline) -> None:
    found = sites(pipe.var)
    assert len(set(found)) == len(found)
    kinds = {site.kind for site in found if site.block is None}
    assert "text_pool.mat_kv weight" in kinds and "text_proj.2 weight" in kinds
