"""A step of the GPU kit: a command with a time limit, what it said, and whether it did its work."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence

ROOT = pathlib.Path(__file__).resolve().parents[2]

#: Seconds between SIGINT, at which tests and benchmarks write what they have, and SIGKILL.
GRACE = 10

#: Where CUDA's tools are looked for after PATH: beside Python, and where NVIDIA's packages put them.
TOOLS = (pathlib.Path(sys.executable).parent, pathlib.Path("/usr/local/cuda/bin"))

#: Of a step's lines, how many are shown as they come.
MOST_SHOWN = 60


def heed_interrupts() -> None:
    """SIGINT ends what is started from here, also where the kit runs in a shell's background."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def environment() -> dict[str, str]:
    """What every command gets. Side by side, twelve test workers must not compile in sixteen threads each."""
    known = os.environ.get("PATH", os.defpath).split(os.pathsep)
    path = [*known, *(str(place) for place in TOOLS if str(place) not in known)]
    return {
        **os.environ,
        "PATH": os.pathsep.join(path),
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": "1",
        "TORCHINDUCTOR_COMPILE_THREADS": "2",
    }


@dataclasses.dataclass
class Step:
    """A command, how long it may take, and what became of it.

    Attributes:
        check: says why a command that ended with 0 did not do its work, or "": a tool may never have run its
            program, and a test run may have skipped every test.
        shown: a pattern of lines that are shown as they come.
        writes: files of its own in the folder of results; an earlier run's are removed.
        status: exit status; None before the end, and where it ran out of time.
        verdict: "waiting", "running", "passed", "FAILED", "out of time" or "not begun".
        why: the reason where it has not passed.
    """

    name: str
    command: list[str]
    limit: float
    environment: dict[str, str] = dataclasses.field(default_factory=dict)
    check: Callable[[Step], str] = lambda step: ""
    shown: str = "^(! |WRONG )"
    writes: tuple[pathlib.Path, ...] = ()
    status: int | None = None
    seconds: float = 0.0
    verdict: str = "waiting"
    why: str = ""
    lines: list[str] = dataclasses.field(default_factory=list)

    @property
    def passed(self) -> bool:
        return self.verdict == "passed"

    @property
    def output(self) -> str:
        return "".join(list(self.lines))

    def run(self, deadline: float, stopping: threading.Event) -> None:
        """Runs the command until it ends, its limit or the deadline (of time.monotonic), or `stopping`."""
        begun = time.monotonic()
        end = min(begun + self.limit, deadline)
        if end - begun < 5 or stopping.is_set():
            self.verdict, self.why = "not begun", "the time was up"
            return
        self.verdict = "running"
        _say(f"{self.name} …")
        try:
            self._run(end, stopping)
            if self.status is not None:
                self.why = f"exit status {self.status}" if self.status else self.check(self)
                self.verdict = "FAILED" if self.why else "passed"
        except Exception as error:  # a tool that is missing, a report that can't be read
            self.verdict, self.why = "FAILED", f"{type(error).__name__}: {error}"
        self.seconds = time.monotonic() - begun
        _say(f"{self.name}: {self.verdict} in {self.seconds:.0f} s {self.why}")

    def _run(self, end: float, stopping: threading.Event) -> None:
        process = subprocess.Popen(
            self.command,
            cwd=ROOT,
            env=environment() | self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        reader = threading.Thread(target=self._read, args=(process,), daemon=True)
        reader.start()
        try:
            while process.poll() is None and time.monotonic() < end and not stopping.wait(0.1):
                pass
            self.status = process.poll()
            if self.status is None:
                self.verdict = "out of time"
                self.why = "the kit was ended" if stopping.is_set() else "its limit, or the kit's"
                _signal(process, signal.SIGINT)
                process.wait(GRACE)
        except subprocess.TimeoutExpired:
            self.why += "; it took no SIGINT"
        finally:
            _signal(process, signal.SIGKILL)  # and the workers that it leaves behind
            process.wait()
            reader.join(5)

    def _read(self, process: subprocess.Popen) -> None:
        assert process.stdout is not None
        left, pattern = MOST_SHOWN, re.compile(self.shown)
        for line in process.stdout:
            self.lines.append(line)
            if left and pattern.search(line):
                left -= 1
                _say(f"{self.name}: {line.rstrip()}" if left else f"{self.name}: and more")


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")  # in one piece, as steps run side by side
    sys.stdout.flush()


def _signal(process: subprocess.Popen, number: int) -> None:
    """To all of its session: workers, and the program under a tool."""
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        pass


def together(steps: Sequence[Step], deadline: float, keep: Callable[[], None], every: float = 5) -> None:
    """Runs steps side by side. `keep` is called every few seconds and whenever one has ended.

    Whatever ends the wait (a signal's exception) ends the steps too, which get their time to write.
    """
    stopping = threading.Event()
    threads = [threading.Thread(target=step.run, args=(deadline, stopping)) for step in steps]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            while thread.is_alive():
                thread.join(every)
                keep()
    finally:
        stopping.set()
        try:
            keep()  # what is there already, should the rest of the time not be given
        finally:
            for thread in threads:
                thread.join()
            keep()
