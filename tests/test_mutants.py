"""The bugs that `make mutants` plants can still be planted: what they replace is there, once."""

from __future__ import annotations

from pathlib import Path

import pytest
from mutants import MUTANTS, Mutant, planted

ROOT = Path(__file__).parents[1]


def test_there_are_enough_of_them_and_no_two_alike():
    assert len(MUTANTS) >= 40
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_applies(mutant: Mutant):
    text = planted(mutant, ROOT)
    compile(text, mutant.file, "exec")
    assert text != (ROOT / mutant.file).read_text(encoding="utf-8")
    assert all((ROOT / "tests" / name).is_file() for name in mutant.tests.split())
