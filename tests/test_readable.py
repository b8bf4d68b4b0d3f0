"""Sizes, durations, shares and counts as the command line, the studio and the report write them."""

from __future__ import annotations

from varptq import readable


def test_numbers_have_the_digits_people_read() -> None:
    written = [
        *(readable.significant(v) for v in (0, 0.09134, 1.4249, 16.04, 1234)),
        *(readable.percent(v) for v in (0, 0.0012, 0.5, 1)),
        *(readable.megabytes(v) for v in (3216, 1_332_848)),
        *(readable.seconds(v) for v in (0.04, 59.4, 59.6, 145)),
        *(readable.count(v) for v in (12, 8454144, 10891378688)),
    ]
    assert written == [
        *("0", "0.0913", "1.42", "16.0", "1234"),
        *("0.0%", "0.12%", "50.0%", "100.0%"),
        *("3.2 kB", "1.33 MB"),
        *("0.0 s", "59.4 s", "1 min 0 s", "2 min 25 s"),
        *("12", "8.45 M", "10.9 G"),
    ]
