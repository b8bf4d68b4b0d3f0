"""Attention statistics against a second transformer, and on maps whose answer is known."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.var_oracle import both_rows, trace
from varptq.analyze.attention import NUM_BINS, AttentionStatistics, attention_statistics
from varptq.models.pipeline import Pipeline
from varptq.models.scales import Scales

LABELS = torch.tensor([0, 3, 4])


def brute_force(pipe: Pipeline, ids: Tensor) -> dict[str, Any]:
    """Row by row in plain Python floats."""
    maps = trace(pipe.var, *both_rows(pipe, LABELS, ids)).probabilities
    found: dict[str, list[Any]] = {"histogram": [], "mass": [], "top_key": [], "top_tenth": []}
    found |= {"effective_keys": [], "by_key_scale": []}
    for part in pipe.scales.slices():
        rows = [row for p in maps for row in p[:, :, part, : part.stop].reshape(-1, part.stop)]
        count, mass = [0] * NUM_BINS, [0.0] * NUM_BINS
        top = tenth = effective = 0.0
        by_key = [0.0] * pipe.scales.num_scales
        for row in (row.tolist() for row in rows):
            for key, p in enumerate(row):
                place = min(max(math.floor(-math.log2(p)), 0), NUM_BINS - 1)
                count[place] += 1
                mass[place] += p
                by_key[next(k for k, end in enumerate(pipe.scales.ends) if key < end)] += p
            order = sorted(row, reverse=True)
            top += order[0]
            tenth += sum(order[: math.ceil(len(row) / 10)])
            effective += math.exp(-sum(p * math.log(p) for p in row))
        found["histogram"].append([c / sum(count) for c in count])
        found["mass"].append([m / len(rows) for m in mass])
        found["by_key_scale"].append([m / len(rows) for m in by_key])
        for name, value in (("top_key", top), ("top_tenth", tenth), ("effective_keys", effective)):
            found[name].append(value / len(rows))
    return found


def test_statistics_equal_brute_force(any_tiny: Pipeline, ids: Tensor) -> None:
    found = attention_statistics(any_tiny, LABELS, ids, batch_size=2).to_dict()
    for name, expected in brute_force(any_tiny, ids).items():
        # float32 attention against float64; an entry at the edge of a bin may fall on either side.
        places = 2e-3 if name in ("histogram", "mass") else 1e-5
        torch.testing.assert_close(
            torch.tensor(found[name]), torch.tensor(expected), rtol=1e-4, atol=places, msg=name
        )
    assert not any(module._forward_pre_hooks for module in any_tiny.var.modules())


@pytest.mark.parametrize(
    ("row", "bin_", "top", "tenth", "effective"),
    [
        ([1 / 14] * 14, 3, 1 / 14, 2 / 14, 14),
        ([1.0, *[0.0] * 13], 0, 1.0, 1.0, 1),
        ([0.0, *[0.25] * 4, *[0.0] * 9], 2, 0.25, 0.5, 4),
    ],
)
def test_known_rows(
    row: list[float], bin_: int, top: float, tenth: float, effective: float
) -> None:
    statistics = AttentionStatistics(Scales((1, 2, 3)), blocks=2)
    for block in (0, 1):
        for scale, keys in enumerate((1, 5)):
            statistics.add(block, scale, torch.full((1, 1, 1, keys), 1 / keys))
        statistics.add(block, 2, torch.tensor(row).expand(3, 2, 9, 14))
    found = statistics.to_dict()
    assert found["mass"][2][bin_] == pytest.approx(1)
    assert found["top_key"][2] == pytest.approx(top)
    assert found["top_tenth"][2] == pytest.approx(tenth)
    assert found["effective_keys"][2] == pytest.approx(effective)
    assert found["effective_share"][2] == pytest.approx(effective / 14)
    assert found["by_key_scale"][2] == pytest.approx([row[0], sum(row[1:5]), sum(row[5:])])
    assert found["by_key_scale"][0] == [1, 0, 0]
    zeros = row.count(0.0) / 14
    assert found["histogram"][2][NUM_BINS - 1] == pytest.approx(zeros)
