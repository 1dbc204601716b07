"""Faults that take long, root, or much of a machine. `make torture` ends with a table: case, figure, pass."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

FIGURES = "figures"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.torture)


@pytest.fixture
def figure(record_property: Callable) -> Callable[[str], None]:
    """Call it with what a case has measured, for the table."""
    return lambda text: record_property(FIGURES, text)


def pytest_terminal_summary(terminalreporter) -> None:
    rows = []
    for outcome in ("passed", "failed", "error", "skipped"):
        for report in terminalreporter.stats.get(outcome, []):
            if "tests/torture/" not in report.nodeid or (report.when != "call" and outcome == "passed"):
                continue
            said = "; ".join(text for name, text in report.user_properties if name == FIGURES)
            if outcome == "skipped":
                said = str(report.longrepr[2]).removeprefix("Skipped: ")
            rows.append((report.nodeid.partition("::")[2].removeprefix("test_"), said, outcome))
    if rows:
        terminalreporter.write_line("\n| case | figure | result |\n| --- | --- | --- |")
        for name, said, outcome in sorted(rows):
            terminalreporter.write_line(f"| {name} | {said} | {outcome} |")
