"""Is a number read as what it is, however people and models write it? A table, each value worked out by hand."""

from fractions import Fraction

import pytest

from stages.answers import as_number, final_answer, last_number

NUMBERS = {
    # signs
    "-5": -5, "−5": -5, "－5": -5, "﹣5": -5, "‑5": -5, "–5": -5, "+5": 5, "＋5": 5, "- 5": -5,
    # exponents
    "1e-3": "0.001", "1E+3": 1000, "2.5e2": 250, "−1e−3": "-0.001", "3×10^4": 30000, "3 \\times 10^{4}": 30000,
    "3\\cdot10^{-2}": "0.03", "3*10^2": 300, "6.02×10²": 602, "10^3": 1000, "10³": 1000, "10^{-2}": "0.01", "5×10⁻¹": "0.5",
    # thousands and decimals
    "1,234": 1234, "1,234,567.89": "1234567.89", "12,34,567": 1234567, "1.234.567": 1234567, "1.234,56": "1234.56",
    "1'234": 1234, "1’234’567": 1234567, "1\u202f234": 1234, "1\u00a0234\u00a0567": 1234567, "1 234 567": 1234567,
    "1_000": 1000, "1{,}000": 1000, "3,5": "3.5", "1234,56": "1234.56", "0.50": "0.5", ".5": "0.5", "1.234": "1.234",
    "51.": 51, "51.0": 51, "007": 7,
    # fractions
    "3/4": "3/4", "-3/4": "-3/4", "½": "1/2", "1½": "3/2", "-1½": "-3/2", "1 1/2": "3/2", "3⁄4": "3/4", "\\frac{3}{4}": "3/4",
    "\\dfrac{3}{4}": "3/4", "\\frac34": "3/4", "-\\frac{1}{2}": "-1/2", "2\\frac{1}{2}": "5/2", "0.5/2": "1/4",
    # percent, currency, units, other writing
    "50%": 50, "50\\%": 50, "$5": 5, "\\$5": 5, "€5": 5, "5 €": 5, "£1,000": 1000, "¥100": 100, "₹1,00,000": 100000,
    "USD 5": 5, "5 EUR": 5, "-$5": -5, "$-5": -5, "\\text{5}": 5, "\\mathrm{ 5 }": 5, "$5$": 5, "５１": 51, "٣٤": 34,
    "१२": 12, "٣٫٥": "3.5", "\\,5\\,": 5,
}  # fmt: skip
IN_TEXT = {
    "She has 5 apples": 5, "between 3 and 5-7": 7, "5–7": 7, "x = −5": -5, "5 - 7": -7, "the answer is −5.": -5,
    "it is 1e-3": "0.001",
    "so 1,234 of them, then": 1234, "a, b: 3,5": 5, "it costs $3.50!": "3.5", "half, that is 1/2 of it": "1/2",
    "in 2024, 7%": 7, "x=2, y=\\frac{1}{3}": "1/3",
}  # fmt: skip
NO_NUMBER = ["", "none", "-", ".", "1/0", "e5", "five", "1e999999999", "\\frac{a}{b}"]


@pytest.mark.parametrize("text", NUMBERS)
def test_a_number_is_read_as_what_it_is(text):
    assert as_number(text) == last_number(text) == Fraction(NUMBERS[text])


@pytest.mark.parametrize("text", IN_TEXT)
def test_the_last_number_of_a_text(text):
    assert last_number(text) == Fraction(IN_TEXT[text])


@pytest.mark.parametrize("text", NO_NUMBER)
def test_what_is_none(text):
    assert as_number(text) is None


def test_five_squared_is_not_fifty_two():
    assert as_number("5²") is None


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("\\boxed{\\frac{1}{2}}", "1/2"), ("\\boxed{\\text{ 5 }}", 5), ("\\boxed{\\boxed{7}}", 7), ("so\n#### 1,000\nend", 1000),
        ("\\boxed{-\\dfrac{3}{\\text{4}}}", "-3/4"), ("first \\boxed{1}, then \\boxed{-\\frac12}", "-1/2"),
    ],
)  # fmt: skip
def test_the_final_answer_is_found_inside_what_marks_it(text, number):
    assert as_number(final_answer(text)) == Fraction(number)


def test_a_text_without_end_takes_no_time():
    for text in ("1," * 50_000, "9" * 100_000, "\\text{" * 5_000, "1 " * 50_000, "-" * 100_000, "\\frac{" * 10_000):
        last_number(text)
