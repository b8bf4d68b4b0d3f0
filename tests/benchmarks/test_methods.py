"""The script of the methods table: its rows, and the errors it states."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import varptq
from benchmarks.common.caption_classes import classes_named
from benchmarks.common.compiled import compiled
from benchmarks.common.methods_rows import ABLATION, BARE, METHODS, STUDIES, WIDTHS, standard_error
from benchmarks.quality import methods
from varptq.evaluate.frechet import Gaussian, frechet_distance
from varptq.quant import affine, log2, sign_split


def test_every_row_is_a_preset_and_a_method() -> None:
    asked = (*METHODS, *ABLATION)
    rows = list(methods.rows(STUDIES["demo"], WIDTHS, asked, (0, 1)))
    # Five widths of five methods, and two parts of the ablation at two widths; nearest rounding
    # knows no seed.
    assert len(rows) == len(set(rows)) == 1 + 3 + 29 + 24
    assert [row.seed for row in rows[4:]] == [0] * 29 + [1] * 24
    for row in rows[4:]:
        config = varptq.QuantConfig.preset(row.preset)
        fc2 = config.linear_for("blocks.0.ffn.fc2")
        assert (fc2.weight is None) == ("litevar" in row.method)
        assert config.attention is not None and config.attention.policy == "release"
        assert "litevar" not in row.calibration_method


def test_rows_of_the_text_demo() -> None:
    study = STUDIES["demo-text"]
    rows = list(methods.rows(study, ("w4a4", "w6a6"), (*study.methods, *ABLATION), (0,)))
    assert len(rows) == len(set(rows)) == 1 + 3 + 6 + 2 + 6
    bare = next(row for row in rows if row.method == BARE)
    assert (bare.preset, bare.calibration_method) == ("w4a4+groups+vae32", "gptq")


def test_a_caption_names_one_class() -> None:
    pipe = varptq.load_model("demo-text")
    texts = ["a dark photo of a lorry", "a jet on a blue background"]
    assert classes_named(texts).tolist() == [9, 0]
    # All captions of the demo name a class, and all classes are named.
    assert set(classes_named(pipe.pool().titles()).tolist()) == set(range(10))


def test_tenths_hold_every_image_and_every_class() -> None:
    """Labels repeat every ten images; no tenth may be short of a class."""
    features = torch.randn(230, 3, generator=torch.Generator().manual_seed(0))
    features[:, 0] = torch.arange(230) % 10
    groups = [Gaussian() for _ in range(10)]
    for first in range(0, 230, 37):
        methods.divide(groups, features[first : first + 37], first)
    assert sum(group.count for group in groups) == 230
    for group in groups:
        assert float(group.mean[0]) == pytest.approx(4.5)
    assert frechet_distance(methods.merged(groups), Gaussian.of(features)) < 1e-9


@pytest.mark.slow
def test_the_error_is_that_of_repeated_draws() -> None:
    """The jackknife beside the spread of the distance over 300 fresh sets."""
    generator = torch.Generator().manual_seed(1)

    class Bench(methods.Bench):
        def __init__(self) -> None:
            self.real = self.rebuilt = self.of_float = Gaussian.from_moments(
                torch.full((4,), 0.5), torch.eye(4), 10**6
            )

    bench = Bench()
    found, errors = [], []
    for _ in range(300):
        groups = [Gaussian() for _ in range(10)]
        methods.divide(groups, torch.randn(200, 4, generator=generator), 0)
        found.append(bench.distances(methods.merged(groups))["fd"])
        errors.append(standard_error(bench.without(groups)["fd"]))
    spread = float(torch.tensor(found).std())
    # Ten groups know a deviation to about a quarter; their mean over sets to a few percent.
    assert sum(errors) / 300 == pytest.approx(spread, rel=0.15)


@pytest.mark.slow
def test_compiled_quantizers_give_the_same_bits() -> None:
    """All in one function, as the compiler takes seconds for each that it is given."""

    def all_of(x: Tensor, p: Tensor) -> tuple[Tensor, ...]:
        return (
            affine.affine_fake(x, 4, -1, "min_max"),
            sign_split.sign_split_fake(x, 4),
            log2.log2_fake(p, 4),
        )

    fast = compiled(all_of)
    for size in (33, 40):
        x = torch.randn(3, size, 48, generator=torch.Generator().manual_seed(size))
        p = x.mul(3).softmax(-1)
        for found, expected in zip(fast(x, p), all_of(x, p), strict=True):
            assert torch.equal(found, expected)
