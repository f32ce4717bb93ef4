"""Words: what the index is made of, in languages with and without spaces between them."""

from __future__ import annotations

import re
from typing import Final

#: Chinese, Japanese and Korean are written without spaces: each character is a word of the index.
CJK: Final = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af"
WORD: Final = re.compile(f"[{CJK}]|[^\\W{CJK}]+")


def spaced(text: str) -> str:
    """``text`` with spaces between all its words, as the index needs it."""
    return re.sub(f"(?<=[{CJK}])(?=[{CJK}])", " ", text)


def unspaced(text: str) -> str:
    """``text`` as it was before ``spaced``."""
    return re.sub(f"(?<=[{CJK}]) (?=[{CJK}])", "", text)
