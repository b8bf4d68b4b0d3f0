"""The losses of a calibration, read from its progress.

The stage "reconstruct" counts the steps of all units together and calls a step
"<unit>, loss <value>"; the first of a unit is nearest rounding, the last what is deployed.
"""

from __future__ import annotations

import re

from varptq.web.parts import thinned

STAGE = "reconstruct"
_REMARK = re.compile(r"(?P<unit>.+), loss (?P<loss>[-+.e0-9]+)")


class Losses:
    """(step, loss) per unit, in the order of the units. steps: of one unit."""

    def __init__(self, steps: int) -> None:
        self.steps = max(steps, 1)
        self._of: dict[str, list[tuple[int, float]]] = {}

    def note(self, stage: str, done: int, info: str) -> None:
        """Take one call of a `Progress`; ignore what is not a step of a unit."""
        match = _REMARK.fullmatch(info)
        if stage != STAGE or match is None:
            return
        points = self._of.setdefault(match["unit"], [])
        step = done - (len(self._of) - 1) * self.steps
        # The last step is reported twice, the second time measured on other rows.
        if not points or step > points[-1][0]:
            points.append((step, float(match["loss"])))

    def curves(self) -> dict[str, list[tuple[int, float]]]:
        """A copy thinned for drawing, of the units with two points or more."""
        return {unit: thinned(points) for unit, points in list(self._of.items()) if len(points) > 1}
