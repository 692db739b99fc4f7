"""The page of traps names tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_trap_has_its_test() -> None:
    page = (ROOT / "docs" / "traps.md").read_text()
    traps = re.split(r"^\d+\. ", page, flags=re.MULTILINE)[1:]
    assert len(traps) == 28
    for trap in traps:
        named = re.findall(r"`(tests/\w+/\w+\.py)(?:::(\w+))?`", trap)
        assert named, f"no test: {trap}"
        for file, test in named:
            assert (ROOT / file).is_file(), file
            assert not test or f"def {test}(" in (ROOT / file).read_text(), f"{file} has no {test}"
