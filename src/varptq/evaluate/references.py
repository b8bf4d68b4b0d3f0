"""What metrics on real images are taken against: the images of a file, or its statistics.

A distance goes by the statistics that were made with as many features as the network gives, whoever
made them; all else goes by images. Every document says which it was.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from varptq.errors import InputError
from varptq.evaluate import statistics
from varptq.evaluate.catalogue import METRICS
from varptq.evaluate.image_files import ImageFiles

# The metrics of one set of samples, by what else they compare.
AGAINST_REAL = ("fid", "sfid", "precision", "recall")
PLAIN_RESIZE, SUITE_RESIZE = "inception", "inception-adm"

Widths = Mapping[str, int | None]


def of_statistics(
    reference: ImageFiles | None, metrics: Collection[str], widths: Widths
) -> dict[str, str]:
    """The distances in `metrics` that go by statistics of the file, and the part of the features
    each compares. widths: of the parts that the network gives."""
    moments = reference.moments if reference else {}
    return {
        name: part
        for name, part in statistics.DISTANCES.items()
        if name in metrics and part in moments and moments[part] == widths.get(part)
    }


def check_statistics(
    reference: ImageFiles, network: str, metrics: Collection[str], widths: Widths
) -> None:
    """Raise `InputError` for statistics that the distances in `metrics` cannot go by: of another
    network where there are no images instead, not finite, or no covariance."""
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
    """What a user should know of a set of real images that `metrics` are taken against."""
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
    """For each metric on features of one set of samples: of what it was taken, in words."""
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
