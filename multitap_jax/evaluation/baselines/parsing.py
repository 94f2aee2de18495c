"""Reads the score in a written verdict, or says that there is none."""

import math
import re

_OUT_OF = r"(?:\s*(?:/|out of)\s*(?P<of>\d+)(?!\w))"
_NUMBER = r"(?<![\w.-])(?<!out of )(?P<value>\d+(?:\.\d+)?)(?![\w%]|[.,]\d)" + _OUT_OF
# In the order in which they are tried: a number said to be the score, one out of a whole, one that comes first.
_FORMS = (
    re.compile(
        r"\b(?:score|rating|grade)\b(?:\s*\(?out of (?P<whole>\d+)\b)?[^\d.!?\n]{0,24}?" + _NUMBER + "?", re.IGNORECASE
    ),
    re.compile(_NUMBER, re.IGNORECASE),
    re.compile(r"^\W*" + _NUMBER + "?", re.IGNORECASE),
)


def parse_score(text: str, highest: float = 100.0) -> float:
    """The score in a verdict, from 0 to `highest`; NaN where it has none.

    Taken is the first of: a number behind "score", "rating" or "grade", with no sentence's end between; a number "out
    of" or "/" another; a number that the text begins with. A number out of another ("Score out of 5: 4", too) is
    brought to `highest`. One beyond `highest` is no score, nor is a percentage.
    """
    for form in _FORMS:
        if found := form.search(text):
            whole = float(found["of"] or found.groupdict().get("whole") or highest)
            value = float(found["value"])
            return value * highest / whole if whole > 0 and value <= whole else math.nan
    return math.nan
