"""Resampling of calibration tokens: their frequencies move onto the model's mean probabilities.

Per scale with n tokens over all images: p = mean filtered probability of every codebook entry,
target count = floor(p n) with the largest fractional parts rounded up until the sum is n. Entries
drawn more often than their target give up the excess: first the positions with most probability
mass on the entries that are below theirs. Each of these positions draws a new entry from its own
distribution, restricted to the entries still below their target (uniform if that mass is 0).

A token of several draws is resampled draw by draw, each an alphabet of its own: bits are flipped
until every bit of a scale is 1 as often as the model says. Bits of a token are moved independently,
which does not keep what they have to do with each other.

The probabilities are those under the tokens as first drawn; later scales are not generated
again. Source: "Shift-and-Sum Quantization for VAR models" (ICLR 2026), docs/method.md section 4.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from varptq.errors import InputError, NonFiniteError
from varptq.models.sampling import ImageRandom, image_randoms

if TYPE_CHECKING:
    from varptq.calibrate.run import Run


def resample(run: Run) -> None:
    """Step: the calibration set of this run is resampled when it is drawn."""
    run.resample()


@dataclass(frozen=True)
class Move:
    """One token drawn again: `position` inside the scale, `score` the mass that chose it."""

    over_entry: int
    image: int
    position: int
    new_entry: int
    score: float
    uniform: bool


@dataclass(frozen=True)
class ScaleReport:
    """What resampling did to one scale. Counts are (V,) int64; L1 is the sum of |count / n - p|. Of
    several draws counts are summed, and L1 is a mean."""

    target_count: Tensor
    count_before: Tensor
    count_after: Tensor
    l1_before: float
    l1_after: float
    moves: tuple[Move, ...]

    def to_dict(self, details: bool = False) -> dict[str, Any]:
        """Plain JSON values; `details` adds the histograms and every move."""
        values: dict[str, Any] = {
            "tokens": int(self.target_count.sum()),
            "moved": len(self.moves),
            "uniform": sum(move.uniform for move in self.moves),
            "l1_before": self.l1_before,
            "l1_after": self.l1_after,
        }
        if details:
            for name in ("target_count", "count_before", "count_after"):
                values[name] = getattr(self, name).tolist()
            values["moves"] = [asdict(move) for move in self.moves]
        return values


def of_draws(reports: Sequence[ScaleReport]) -> ScaleReport:
    """One report of the draws of a scale's tokens, in order. A move's position is that of a symbol
    then, draws of a token one after another."""
    if len(reports) == 1:
        return reports[0]
    target, before, after = (
        torch.stack([getattr(report, name) for report in reports]).sum(0)
        for name in ("target_count", "count_before", "count_after")
    )
    l1_before = sum(report.l1_before for report in reports) / len(reports)
    l1_after = sum(report.l1_after for report in reports) / len(reports)
    moves = (
        replace(move, position=move.position * len(reports) + draw)
        for draw, report in enumerate(reports)
        for move in report.moves
    )
    return ScaleReport(target, before, after, l1_before, l1_after, tuple(moves))


@dataclass(frozen=True)
class ResampleReport:
    """One `ScaleReport` per scale, coarse to fine."""

    scales: tuple[ScaleReport, ...]

    @property
    def num_moved(self) -> int:
        return sum(len(scale.moves) for scale in self.scales)

    def to_dict(self, details: bool = False) -> dict[str, Any]:
        """Plain JSON values."""
        scales = [{"scale": k, **s.to_dict(details)} for k, s in enumerate(self.scales)]
        return {"moved": self.num_moved, "scales": scales}


def target_counts(mean_V: Tensor, n: int) -> Tensor:
    """Integer counts near `n * mean_V` that sum to n: (V,) -> (V,) int64 on the CPU.

    All are rounded down; the remainder goes to the largest fractional parts, of equal parts to the
    lower entry first.
    """
    exact = mean_V.double().cpu() / mean_V.double().cpu().sum() * n
    counts = exact.floor()
    remainder = n - int(counts.sum())
    first = torch.argsort(exact - counts, descending=True, stable=True)[:remainder]
    counts[first] += 1
    return counts.long()


def resample_scale(
    ids_Nl: Tensor, probs_NlV: Tensor, randoms: Sequence[ImageRandom]
) -> tuple[Tensor, ScaleReport]:
    """Move the token frequencies of one scale onto the mean of `probs_NlV`.

    ids_Nl (N, l) int64; probs_NlV (N, l, V) float, filtered probabilities, on any device; `randoms`
    has one stream per image, advancing by one value per token moved. Over-represented entries are
    taken in ascending order, and which entries are short is settled when an entry is begun; of
    positions with equal mass the earlier (image, then position) goes first. Returns new ids on the
    device of `ids_Nl` and the report. Raises `NonFiniteError` on probabilities that are not finite.
    """
    length, vocabulary = probs_NlV.shape[1:]
    flat = ids_Nl.reshape(-1).to("cpu", torch.int64, copy=True)
    rows = probs_NlV.reshape(-1, vocabulary)
    mean = rows.mean(0, dtype=torch.float64).cpu()
    if not mean.isfinite().all():
        raise NonFiniteError(
            "resampling: probabilities hold NaN or infinity, expected values in 0..1"
        )
    target = target_counts(mean, len(flat))
    before = torch.bincount(flat, minlength=vocabulary)
    short = (target - before).clamp(min=0)
    moves: list[Move] = []
    # No entry crosses its target, so excess and positions can be computed once.
    for entry in (before > target).nonzero().flatten().tolist():
        given_up, score = _given_up(entry, int(before[entry] - target[entry]), flat, rows, short)
        candidates = short.nonzero().flatten()
        weights = rows[given_up.to(rows.device)][:, candidates.to(rows.device)].double().cpu()
        for place, weight, mass in zip(given_up.tolist(), weights, score.tolist(), strict=True):
            image, position = divmod(place, length)
            chosen, uniform = _draw(weight, short[candidates] > 0, float(randoms[image].uniform()))
            new = int(candidates[chosen])
            short[new] -= 1
            flat[place] = new
            moves.append(Move(entry, image, position, new, mass, uniform))
    after = torch.bincount(flat, minlength=vocabulary)
    # Explicitly float32: the quotient of counts would have the default dtype, which the caller
    # sets.
    l1 = [float((count.float() / len(flat) - mean).abs().sum()) for count in (before, after)]
    report = ScaleReport(target, before, after, l1[0], l1[1], tuple(moves))
    return flat.reshape(ids_Nl.shape).to(ids_Nl.device), report


def _given_up(
    entry: int, excess: int, flat: Tensor, rows: Tensor, short: Tensor
) -> tuple[Tensor, Tensor]:
    """The `excess` positions of `entry` with most mass on the short entries, and that mass."""
    places = (flat == entry).nonzero().flatten()
    is_short = (short > 0).to(rows.device, rows.dtype)
    mass = (rows[places.to(rows.device)] @ is_short).float().cpu()
    order = torch.argsort(mass, descending=True, stable=True)[:excess]
    return places[order], mass[order]


def _draw(weight: Tensor, still_short: Tensor, u: float) -> tuple[int, bool]:
    """Inverse CDF at `u` of `weight` where `still_short`; uniform (True) if there is no mass."""
    weight = weight * still_short
    uniform = not bool(weight.any())
    if uniform:
        weight = still_short.double()
    cumulative = weight.cumsum(0)
    chosen = torch.searchsorted(cumulative, u * cumulative[-1:], right=True)
    # Rounding could put the draw at the very end of the mass.
    return min(int(chosen), int(weight.nonzero()[-1])), uniform


def resample_tokens(
    ids_NL: Tensor,
    probs_of_scale: Callable[[int], Tensor],
    lengths: Sequence[int],
    seed: int,
    draws: int = 1,
) -> tuple[Tensor, ResampleReport]:
    """Resample all scales, coarse to fine: (N, L) int64 -> new (N, L) ids and the report.
    `lengths` are those of the scales, in symbols, of which `draws` neighbours make a token.

    `probs_of_scale(k)` gives the filtered probabilities (N, l_k, V) at scale k under the ids as
    first drawn; it is called once per scale, so the caller need not hold all of them. Draws depend
    on (seed, image) only. Raises `InputError` if a shape does not fit.
    """
    if ids_NL.dim() != 2 or ids_NL.shape[1] != sum(lengths):
        raise InputError(
            f"ids have shape {tuple(ids_NL.shape)}: expected (N, {sum(lengths)}), the tokens of "
            f"scales of {', '.join(map(str, lengths))}"
        )
    randoms = image_randoms(seed, range(len(ids_NL)), "resample")
    new_NL = ids_NL.clone()
    reports: list[ScaleReport] = []
    for k, (end, length) in enumerate(zip(accumulate(lengths), lengths, strict=True)):
        part = slice(end - length, end)
        probs_NlV = probs_of_scale(k)
        if probs_NlV.dim() != 3 or probs_NlV.shape[:2] != ids_NL[:, part].shape:
            raise InputError(
                f"probabilities of scale {k} have shape {tuple(probs_NlV.shape)}: "
                f"expected ({len(ids_NL)}, {length}, V)"
            )
        found: list[ScaleReport] = []
        for draw in range(draws):
            own = slice(part.start + draw, part.stop, draws)
            probs = probs_NlV[:, draw::draws]
            new_NL[:, own], report = resample_scale(ids_NL[:, own], probs, randoms)
            found.append(report)
        reports.append(of_draws(found))
    return new_NL, ResampleReport(tuple(reports))
