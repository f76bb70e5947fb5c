"""Which answer does a text end in, and which number is it?

A number may be written as people and models write it: any script's digits and minus, thousands marks, a decimal comma,
exponents, fractions (also mixed, as one character or in LaTeX), percent and currency. A percent sign is dropped, so 50% is
50 and not 0.5. What can be read two ways is read as in English: 1,234 is a thousand; 3,5 is three and a half only where it
is all of the answer, since in running text it may be a list.
"""

import re
import unicodedata
from fractions import Fraction

_LARGEST_EXPONENT = 400  # beyond a float's range; without a bound 1e999999999 would fill the memory
_MINUS = dict.fromkeys("\u2010\u2011\u2012\u2013\u2212\ufe63\uff0d", "-") | {
    "\uff0b": "+",
    "\u2044": "/",
    "\u2215": "/",
}
_SUPERSCRIPT = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "0123456789-+")
_SPACES = re.compile(r"\\[,;:! ]|\\quad|[\u00a0\u2007\u2009\u200a\u202f]")
_WRAPPER = re.compile(r"\\(?:text|textbf|mathrm|mathbf|mbox|operatorname)\s*\{([^{}]*)\}")
_FRACTION = re.compile(r"\\[dt]?frac\s*(?:\{\s*([^{}]+?)\s*\}|(\d))\s*(?:\{\s*([^{}]+?)\s*\}|(\d))")
_POWER = re.compile(r"\s*(?:\\times|\\cdot|[×x*·])\s*10\s*\^?\s*(?:\{\s*([-+]?\d+)\s*\}|([-+]?\d+))")
_GROUPED = re.compile(r"(?<=\d)(?:['’_\u0001]|\{,\})(?=\d{3}(?!\d))")
_CURRENCY_CODE = re.compile(r"^(?:USD|EUR|GBP|JPY|CNY|INR|CHF|Rs\.?)\s*|\s*(?:USD|EUR|GBP|JPY|CNY|INR|CHF)$")

_WHOLE = r"\d{1,3}(?:,\d{3})+(?!\d)|\d{1,2}(?:,\d{2})+,\d{3}(?!\d)|\d{1,3}(?:\.\d{3}){2,}(?!\d)|\d+"
_UNSIGNED = rf"(?:\d{{1,3}}(?:\.\d{{3}})+,\d+|(?:{_WHOLE})(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?"
_NUMBER = re.compile(rf"(?:(?<![\d)])[-+]\s?)?(?:\d+ \d+/\d+|{_UNSIGNED}(?:/{_UNSIGNED})?)")


def final_answer(text: str) -> str:
    """What the last \\boxed{…} of a text holds, else the line behind the last "####", else all of it."""
    start = text.rfind("\\boxed{")
    if start >= 0:
        depth = 0
        for end in range(start + len("\\boxed"), len(text)):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            if depth == 0:
                return text[start + len("\\boxed{") : end].strip()
    _, mark, after = text.rpartition("####")
    return after.strip().partition("\n")[0].strip() if mark else after.strip()


def as_number(text: str) -> Fraction | None:
    """The number that a text is, or None where it is anything more or less; a full stop may follow."""
    plain = _CURRENCY_CODE.sub("", _plain(text).strip().rstrip(".,;:!").strip()).strip()
    if re.fullmatch(r"[-+]?\d{1,3}(?: \d{3})+(?:[.,]\d+)?", plain):  # 1 234 567
        plain = plain.replace(" ", "")
    if re.fullmatch(r"[-+]?\d+,(?:\d{1,2}|\d{4,})", plain):  # a decimal comma
        plain = plain.replace(",", ".")
    return _value(plain) if _NUMBER.fullmatch(plain) else None


def last_number(text: str) -> Fraction | None:
    """The number that a text is, or the last one in it, or None."""
    whole = as_number(text)
    if whole is not None:
        return whole
    found = [match.group() for match in _NUMBER.finditer(_plain(text))]
    return _value(found[-1]) if found else None


def _plain(text: str) -> str:
    """The text with every digit, minus, fraction and power in ASCII, without LaTeX, currency signs and percent."""
    text = "".join(map(_ascii, text))
    while (unwrapped := _WRAPPER.sub(r"\1", text)) != text:
        text = unwrapped
    text = _FRACTION.sub(lambda m: f" {m[1] or m[2]}/{m[3] or m[4]}", text)
    text = re.sub(r"([-+])\s+(?=\d+/)", r"\1", text)  # the space that a fraction got behind its sign
    text = re.sub(r"10([⁻⁺]?[⁰¹²³⁴⁵⁶⁷⁸⁹]+)", lambda m: "10^" + m[1].translate(_SUPERSCRIPT), text)
    text = re.sub(r"\\?%|\\left|\\right", "", _SPACES.sub("\u0001", text))
    text = _GROUPED.sub("", text).replace("\u0001", " ")
    text = re.sub(r"(?<=\d)" + _POWER.pattern, lambda m: f"e{m[1] or m[2]}", text)
    text = re.sub(r"(?<![\d.])10\^(?:\{\s*([-+]?\d+)\s*\}|([-+]?\d+))", lambda m: f"1e{m[1] or m[2]}", text)
    return "".join(character for character in text.replace("\\$", "") if unicodedata.category(character) != "Sc")


def _ascii(character: str) -> str:
    if character.isascii():
        return character
    if character in _MINUS:
        return _MINUS[character]
    if unicodedata.category(character) in ("Nd", "No"):
        digit = unicodedata.decimal(character, None)
        if digit is not None:
            return str(digit)
        parts = unicodedata.normalize("NFKC", character).split("\u2044")
        if len(parts) == 2 and all(part.isdigit() for part in parts):
            return f" {parts[0]}/{parts[1]}"  # ½
    return {"\u066b": ".", "\u066c": ",", "\uff0e": ".", "\uff0c": ",", "\uff0f": "/"}.get(character, character)


def _value(number: str) -> Fraction | None:
    """Of a match of _NUMBER."""
    sign = -1 if number.startswith("-") else 1
    number = number.lstrip("-+").strip()
    whole, _, part = number.rpartition(" ")
    numerator, _, denominator = part.partition("/")
    whole_part, top, bottom = (_decimal(one) for one in (whole or "0", numerator, denominator or "1"))
    if whole_part is None or top is None or not bottom:
        return None
    return sign * (whole_part + top / bottom)


def _decimal(text: str) -> Fraction | None:
    mantissa, _, exponent = text.lower().partition("e")
    if mantissa.count(".") > 1 or re.search(r"\..*,", mantissa):  # 1.234.567 or 1.234,5
        mantissa = mantissa.replace(".", "").replace(",", ".")
    if len(text) > _LARGEST_EXPONENT or abs(int(exponent or 0)) > _LARGEST_EXPONENT:
        return None
    return Fraction(mantissa.replace(",", "")) * Fraction(10) ** int(exponent or 0)
