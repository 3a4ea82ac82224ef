"""The GPU kit's steps by part, each with its limit; what is most wanted comes first."""

from __future__ import annotations

import importlib.util
import pathlib
import shutil
import sys

from .checks import built, measured, says, tests_ran
from .step import GRACE, ROOT, Step, environment

PYTHON = sys.executable
USUAL_PARTS = ("build", "test", "sanitize", "bench")
PARTS = ("build", "first", "test", "sanitize", "bench", "models", "sweeps", "presets")

#: Seconds of a whole run, and of one whose parts are build and first.
WHOLE, FIRST = 535, 238

#: Of these at the end: for what must be interrupted, and for the report.
REPORT = 25

#: Seconds that the first import of torch takes on a machine whose disk is cold, at most and usually. What it
#: takes beyond the usual is cut from the last steps.
IMPORT, USUAL_IMPORT = 240, 30


def working_time(parts: list[str]) -> float:
    """Seconds from the start after which nothing more is begun or waited for."""
    return FIRST - GRACE - 3 if {*parts} <= {"build", "first"} else WHOLE - GRACE - REPORT


#: What to build for, by the major number of a GPU's capability; of others all that setup.py knows.
ARCHITECTURES = {"8": "80", "9": "90a", "10": "100"}
LIBRARY = ROOT / "reft_kernels" / "lib" / "reft_kernels_cuda.so"


def build_steps(capability: str) -> list[Step]:
    # With the lines of the sources, which the sanitizer names.
    variables = {"REFT_KERNELS_BUILD_CUDA": "1", "NVCCFLAGS": "-lineinfo"}
    if capability.split(".")[0] in ARCHITECTURES:
        variables["REFT_KERNELS_CUDA_ARCHS"] = ARCHITECTURES[capability.split(".")[0]]
    command = [PYTHON, "setup.py", "build_ext", "--inplace"]
    return [Step("build", command, 80, variables, built(LIBRARY))]


def occupancy_steps() -> list[Step]:
    """How many blocks and clusters of each kernel a multiprocessor holds: seconds, and needs no quiet GPU."""
    return [Step("occupancy", [PYTHON, "-m", "bench.gpu.occupancy"], 40, shown=".")]


def _has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _pytest(name: str, words: list[str], workers: int, limit: float, folder: pathlib.Path) -> Step:
    report = folder / f"junit-{name.replace(' ', '-')}.xml"
    command = [PYTHON, "-m", "pytest", "-v", "-p", "no:cacheprovider", "-p", "bench.gpu.pytest_plugin"]
    command += ["-m", "gpu"]
    spread = _has("xdist")
    if spread:
        command += ["--numprocesses", str(workers)]
    if _has("pytest_timeout"):
        # A call of CUDA's heeds no signal: a worker that hangs is ended as a whole, and another takes over.
        command += ["--timeout", "90", "--timeout-method", "thread" if spread else "signal"]
    command += ["--junitxml", str(report), *words]
    return Step(f"tests {name}", command, limit, check=tests_ran(report), writes=(report,))


def first_steps(folder: pathlib.Path) -> list[Step]:
    """Whether the kernels are right: the sizes and batches of models, graphs, the ways, values, and memcheck.

    Models, but for requests in continuous batches, take longer than there is time.
    """
    names = ("launches", "graphs", "elementwise_and_sums", "serving_steps")
    ours = [f"tests/gpu/test_{name}.py" for name in names]
    ours.append("tests/gpu/test_models.py::test_continuous_batches_are_each_request_alone")
    native = ("forward", "norm", "invariance", "backward", "sum", "scale_shift")
    ops = ["tests/gpu/test_ways.py", *(f"tests/ops/test_{name}.py" for name in native)]
    few = "triton and not 3584 and not 8192 and not 20480"
    return [
        _pytest("first native", ["-k", "native", *ours, *ops], 7, 110, folder),
        _pytest("first triton", ["-k", few, *ours], 5, 110, folder),
        *sanitize_steps(("memcheck",), 80, 110),
        *occupancy_steps(),
    ]


def test_steps(folder: pathlib.Path) -> list[Step]:
    """The native kernels by themselves: Triton compiles for minutes, and must not cost their result."""
    where = ["tests/gpu", "tests/ops", "tests/test_functional.py", "tests/test_functional_errors.py"]
    return [
        _pytest("native", ["-k", "native", *where], 6, 180, folder),
        _pytest("others", ["-k", "not native", *where], 6, 180, folder),
        *occupancy_steps(),
    ]


CHECKS = ("memcheck", "racecheck", "initcheck", "synccheck")
CASES = 29  # of bench/gpu/sanitize_cases.py


def sanitize_steps(checks: tuple[str, ...] = CHECKS, seconds: float = 120, limit: float = 160) -> list[Step]:
    """compute-sanitizer's tools on a small set of calls, in which no case begins after `seconds`."""
    name = "compute-sanitizer"
    tool = shutil.which(name, path=environment()["PATH"]) or f"/usr/local/cuda/bin/{name}"
    # Each tensor an allocation of its own, so that a step beyond its end is seen.
    variables = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    script = [PYTHON, str(ROOT / "bench" / "gpu" / "sanitize_cases.py"), "--seconds", f"{seconds:.0f}"]
    # Our kernels alone (a part of their mangled names): torch's would take most of the time.
    options = "--error-exitcode 9 --target-processes application-only --launch-timeout 0 --print-limit 20 "
    options += "--kernel-name kns=4reft4cuda"
    steps = []
    for check in checks:
        # Side by side, they would meet at one port.
        port = 49152 + 100 * CHECKS.index(check)
        command = [tool, "--tool", check, *options.split(), "--port", str(port)]
        if check == "memcheck":
            command += ["--report-api-errors", "no"]  # torch asks for what may fail; our launches are checked
        done = says(f"{CASES} of {CASES} cases, 0 wrong results")
        shown = "^(WRONG |========= (Invalid|Error|ERROR|Race|Uninit|Barrier|.*hazard))"
        steps.append(Step(f"sanitizer {check}", [*command, *script], limit, variables, done, shown))
    return steps


_NATIVE, _FUSED, _TRITON = "reft_kernels native", "reft_kernels native fused", "reft_kernels triton"
_EVERYWHERE = "--positions all --layers all --rank 8"
_OP = "kernels --no-call-cost --rounds 15"
_BF16 = "--dtype bfloat16"
_PAIR = ["native", "triton"]
# The CUDA kernels in other ways than their usual one, each where it has a kernel (docs/kernels.md).
_PUSH, _RING = "native push", "native ring"


def _compiled(
    words: str, model: str = "8b-quarter", phases: str = "step,host", positions: str = "all"
) -> str:
    """Decode with a static cache and a compiled step, at a context of 512 tokens."""
    return (
        f"overhead --model {model} --compiled --phases {phases} --positions {positions} --layers all "
        f"--rank 8 --prompt 512 --new-tokens 16 --rounds 7 {words}"
    )


#: Benchmarks by part: (name, arguments of `reft-bench`, systems, seconds at most). Runs whose names begin
#: alike become one file.
BENCHMARKS: dict[str, list[tuple[str, str, list[str], float]]] = {
    "bench": [
        ("kernels-1", f"{_OP} {_BF16} --rows 1 --adapters 1", [*_PAIR, _PUSH, "shrink+expand"], 25),
        (
            "kernels-64",
            f"{_OP} {_BF16} --rows 64 --adapters 64 --direction forward,norm",
            [*_PAIR, _PUSH, "shrink+expand"],
            30,
        ),
        ("kernels-256", f"{_OP} {_BF16} --rows 256 --adapters 256", [*_PAIR, _RING], 20),
        ("kernels-pool", f"{_OP} {_BF16} --rows 64 --adapters 64 --pool-rows 16384", _PAIR, 20),
        (
            "kernels-4096",
            f"{_OP} {_BF16} --rows 4096 --adapters 1,64 --direction forward,norm,backward",
            [*_PAIR, _RING],
            60,
        ),
        (
            "overhead-1b",
            "overhead --model 1b --phases decode --batch 64 --adapters 1,64 --prompt 32 --new-tokens 16 "
            f"--rounds 5 {_EVERYWHERE}",
            [_NATIVE, _FUSED, "eager hooks"],
            55,
        ),
    ],
    "models": [
        ("models-64", _compiled("--batch 64 --adapters 1,64"), [_NATIVE, _FUSED], 130),
        ("models-256", _compiled("--batch 256 --adapters 256"), [_NATIVE, _FUSED], 75),
        (
            "models-eager",
            "overhead --model 8b-quarter --phases decode,host --batch 64 --adapters 64 --prompt 512 "
            f"--new-tokens 16 --rounds 7 {_EVERYWHERE}",
            [_NATIVE, _FUSED],
            40,
        ),
        ("train", "train --preset full --rounds 11", [], 90),
        ("models-prompt", _compiled("--batch 64 --adapters 64", positions="f3+l3"), [_NATIVE], 55),
    ],
    "sweeps": [
        (
            "sweeps-eager",
            "overhead --model 1b --phases prefill,decode --batch 8 --adapters 8 --prompt 128 "
            f"--new-tokens 16 --rounds 7 {_EVERYWHERE}",
            [_NATIVE, _FUSED, _TRITON, "reft_kernels triton fused"],
            70,
        ),
        ("sweeps-8b", _compiled("--batch 64 --adapters 64", "8b", "decode,step,host"), [_NATIVE], 140),
        ("sweeps-triton", _compiled("--batch 64 --adapters 64"), [_TRITON], 75),
        (
            "kernels-peers",
            f"{_OP} {_BF16} --rows 64,4096 --adapters 64",
            ["native", "rk.functional", "compiled", "gather+bmm", "vllm"],
            60,
        ),
        ("kernels-float32", f"{_OP} --dtype float32 --rows 64 --adapters 64", _PAIR, 20),
        ("kernels-rank", f"{_OP} {_BF16} --rows 64 --adapters 64 --rank 64", _PAIR, 20),
    ],
    "presets": [
        (
            "sweeps-serving",
            "overhead --preset serving --rounds 3 --new-tokens 8 --phases decode",
            [_NATIVE, _FUSED],
            190,
        ),
        (
            "sweeps-paper",
            "overhead --preset paper --model 1b --rounds 5 --new-tokens 12",
            [_NATIVE, "eager hooks", "PEFT LoRA unmerged"],
            190,
        ),
    ],
}


def bench_steps(part: str, folder: pathlib.Path, scratch: pathlib.Path) -> list[Step]:
    steps = []
    for name, text, systems, limit in BENCHMARKS.get(part, ()):
        out = scratch / name
        command = [PYTHON, "-m", "bench", *text.split(), "--device", "cuda", "--out", str(out)]
        if systems:
            command += ["--systems", ",".join(systems)]
        writes = (folder / f"{name.split('-')[0]}.json",)
        shown = "note: .*(wrong|failed)"
        steps.append(Step(name, command, limit, check=measured(out), shown=shown, writes=writes))
    return steps
