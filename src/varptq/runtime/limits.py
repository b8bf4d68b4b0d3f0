"""What the integers of runtime "cpu" hold, with the native core and without it: the configurations
that it refuses, by name.

Codes are bytes, zero points are codes, sums are int32. A refusal is the end of a sentence about a
layer, or None where all can be executed.
"""

from __future__ import annotations

from varptq.quant.config import MAX_STORED, largest_stored
from varptq.runtime.kernels import AttentionRule, InputRule

# Sums of more products of two 8-bit codes might leave int32.
MAX_SEGMENT = 2**14
# The attention kernels keep sums of this many codes in pairs of int16.
MAX_HEAD_WIDTH = 128


def refuse_linear(rule: InputRule) -> str | None:
    """What of a Linear the kernels of this runtime lack."""
    if rule.range_rule != "with_zero" and not rule.sign_split:
        return f"input range rule {rule.range_rule!r}, whose zero points need not be codes"
    if not rule.weight_zero_is_code:
        return "weight range rule 'min_max', whose zero points need not be codes"
    group, other = rule.group, rule.weight_group
    if group and other and max(group, other) % min(group, other):
        return f"input groups of {group} and weight groups of {other}, which do not nest"
    if min(group or rule.inputs, other or rule.inputs) > MAX_SEGMENT:
        return f"{rule.inputs} inputs that share a scale, at most {MAX_SEGMENT}"
    return None


def refuse_attention(rule: AttentionRule) -> str | None:
    """What of an attention the kernels of this runtime lack."""
    spec = rule.spec
    if spec.policy == "release":
        return "attention policy 'release', whose codes change when the cache grows"
    for name in ("query", "key", "probability", "value"):
        operand = getattr(spec, name)
        if operand is None:
            return f"{name} in float"
        if operand.range_rule != "with_zero" and name != "probability":
            return f"{name} range rule {operand.range_rule!r}, whose zero points need not be codes"
    assert spec.key and spec.value
    if spec.key.strategy == "channel":
        return "key strategy 'channel', a scale along the axis that is summed"
    if spec.renormalize:
        return "renormalized probabilities"
    if rule.head_width > MAX_HEAD_WIDTH:
        return f"head width {rule.head_width}, at most {MAX_HEAD_WIDTH}"
    bits, order = spec.value.num_bits, spec.max_order
    if rule.theta is not None and largest_stored(bits, order) > MAX_STORED:
        return (
            f"shift-and-sum of order {order} with {bits}-bit values: integers up to "
            f"{largest_stored(bits, order)}, at most {MAX_STORED}"
        )
    return None
