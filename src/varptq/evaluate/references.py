"""What metrics on real images compare with: the images of a file, or its statistics.

A distance uses statistics if their number of features is that of the network, whoever computed
them; all other metrics use images. Every document says which was used.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from varptq.errors import InputError
from varptq.evaluate import statistics
from varptq.evaluate.catalogue import METRICS
from varptq.evaluate.image_files import ImageFiles

# Metrics of one set of samples that compare it with real images.
AGAINST_REAL = ("fid", "sfid", "precision", "recall")
PLAIN_RESIZE, SUITE_RESIZE = "inception", "inception-adm"

Widths = Mapping[str, int | None]


def of_statistics(
    reference: ImageFiles | None, metrics: Collection[str], widths: Widths
) -> dict[str, str]:
    """The distances in `metrics` that use statistics of the file, and the part of the features that
    each compares. widths: how many features of each part the network gives."""
    moments = reference.moments if reference else {}
    return {
        name: part
        for name, part in statistics.DISTANCES.items()
        if name in metrics and part in moments and moments[part] == widths.get(part)
    }


def check_statistics(
    reference: ImageFiles, network: str, metrics: Collection[str], widths: Widths
) -> None:
    """Raise `InputError` for statistics that the distances in `metrics` cannot use: those of
    another network if there are no images either, values that are not finite, or a matrix that is
    not a covariance."""
    found = of_statistics(reference, metrics, widths)
    asked = [part for name, part in statistics.DISTANCES.items() if name in metrics]
    if not reference.count and not found and asked:
        part = next((part for part in asked if part in reference.moments), None)
        if part is not None:
            raise InputError(
                f"images {reference.path}: {_misfit(reference, part, network, widths)}; take "
                "statistics of this network, or images"
            )
    for part in found.values():
        statistics.load(reference.path, part)


def about_reference(
    reference: ImageFiles, network: str, metrics: Collection[str], widths: Widths
) -> list[str]:
    """Warnings about the real images with which `metrics` compare."""
    warnings = [reference.warning] if reference.warning else []
    found = of_statistics(reference, metrics, widths)
    for name, part in statistics.DISTANCES.items():
        if name in metrics and name not in found and part in reference.moments:
            warnings.append(
                f"images {reference.path}: {_misfit(reference, part, network, widths)}, so "
                f"{METRICS[name].title} is taken against the {reference.count} images"
            )
    if found and "spatial" in reference.moments and network == PLAIN_RESIZE:
        warnings.append(
            f"images {reference.path}: statistics of the ADM suite, which resizes as "
            f"{SUITE_RESIZE} does; with {PLAIN_RESIZE} the distances are other ones"
        )
    return warnings


def sources_of(
    metrics: Collection[str], samples: int, reference: ImageFiles | None, widths: Widths
) -> dict[str, str]:
    """For each metric on features of one set of samples: what it was computed from, in words."""
    found = of_statistics(reference, metrics, widths)
    sources = {"is": f"{samples} samples"} if "is" in metrics else {}
    for name in AGAINST_REAL:
        if reference is not None and name in metrics:
            against = f"{reference.count} images"
            if name in found:
                against = " and ".join(statistics.NAMES[found[name]])
            sources[name] = f"{samples} samples against {against} of {reference.path.name}"
    return sources


def _misfit(reference: ImageFiles, part: str, network: str, widths: Widths) -> str:
    name, width = statistics.NAMES[part][0], widths.get(part)
    gives = f"gives {width}" if width else f"gives no {part} ones"
    return f"{name} is of {reference.moments[part]} features, network {network!r} {gives}"
