"""A plugin of pytest for the GPU kit: a failure is printed when it comes, not when all tests have ended.

    python -m pytest -p bench.gpu.pytest_plugin …

Each line of it begins with "! ", which is what the kit shows at once.
"""

from __future__ import annotations

import pytest

#: Of a failure's text, the last lines: what was compared, and where.
LINES = 25


class _AsTheyCome:
    def __init__(self, terminal: pytest.TerminalReporter) -> None:
        self.terminal = terminal

    def _print(self, what: str, report: pytest.TestReport | pytest.CollectReport) -> None:
        self.terminal.ensure_newline()
        for line in [f"{what} {report.nodeid}", *report.longreprtext.splitlines()[-LINES:]]:
            self.terminal.write_line(f"! {line}")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self._print(f"FAILED ({report.when})", report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._print("NOT COLLECTED", report)


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    terminal = config.pluginmanager.get_plugin("terminalreporter")
    # The workers' reports all reach the first process.
    if terminal is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(_AsTheyCome(terminal), "failures-as-they-come")
