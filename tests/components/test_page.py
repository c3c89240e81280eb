"""What people read on pages."""

import pytest

from components.page import number


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0061094, "0.006109"),
        (1.0, "1"),
        (-87.468, "-87.47"),
        (999.96, "1000"),
        (12345.6, "12,346"),
        (-1e7, "-10,000,000"),
    ],
)
def test_numbers_have_four_digits_and_large_ones_no_exponent(value: float, text: str) -> None:
    assert number(value) == text
