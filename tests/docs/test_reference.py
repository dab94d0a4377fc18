"""The reference of the API is complete."""

from __future__ import annotations

import re

import peftstate
from tests.docs._pages import PAGES


def test_every_public_name_is_in_the_reference():
    """The pages of the API name each of `peftstate.__all__`."""
    reference = "".join(text for page, text in PAGES.items() if page.startswith("docs/api/"))
    named = set(re.findall(r"(?:^::: |`)peftstate\.(\w+)\b", reference, re.MULTILINE))
    assert set(peftstate.__all__) <= named
