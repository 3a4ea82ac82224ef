"""What nvcc makes of the CUDA kernels, without a GPU: no spills, wide loads, tensor cores, no atomics."""

from __future__ import annotations

import hashlib
import importlib.util
import pathlib
import re
import shutil
import subprocess

import pytest

from reft_kernels import build

ROOT = pathlib.Path(__file__).parents[1]
FOLDER = ROOT / "csrc" / "cuda"
SOURCES = ("forward", "forward_norm", "forward_ways", "backward")

#: Most registers of a thread, by kernel: so many that the blocks fit on a multiprocessor (65536 registers)
#: as often as its launch bounds ask for. Of the tiles with 8 rows at once, on Hopper.
REGISTERS = {"forward_tiles": 128, "forward_rows": 255, "backward_rows": 255, "backward_pool": 255}
OF_EIGHT_ROWS = {False: 64, True: 80}  # without the norm, with it

#: The kernels of the ways beside the usual one; from sm_90 on.
WAYS = [
    *(f"forward_push<8, {one}, {norm}>" for one, norm in ((1, 0), (1, 1), (0, 1))),
    *(f"forward_ring<{slots}>" for slots in (8, 16)),
]

#: Bytes that sm_90 and later keep for the system in each block; the kernels' own memory is dynamic.
RESERVED = 1024


def _tool(name: str) -> str | None:
    found = shutil.which(name)
    triton = importlib.util.find_spec("triton")
    if found is None and triton is not None and triton.origin is not None:
        beside = pathlib.Path(triton.origin).parent / "backends" / "nvidia" / "bin" / name
        found = str(beside) if beside.exists() else None
    return found


NVCC, CUOBJDUMP = shutil.which("nvcc"), _tool("cuobjdump")

pytestmark = [
    pytest.mark.skipif(NVCC is None, reason="no nvcc"),
    pytest.mark.skipif(CUOBJDUMP is None, reason="no cuobjdump"),
]


def _cubin(source: str, arch: str) -> pathlib.Path:
    """Compiled as setup.py does it, and kept under build/ until a source changes."""
    texts = [
        path.read_bytes()
        for path in sorted(FOLDER.iterdir())
        + [ROOT / "csrc/cpu" / name for name in ("intervene.h", "scale_shift.h")]
    ]
    version = subprocess.run([NVCC, "--version"], capture_output=True).stdout
    digest = hashlib.sha256(b"".join([version, *texts])).hexdigest()[:16]
    path = ROOT / "build" / "cuda-static" / f"{source}-{arch}-{digest}.cubin"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        command = [NVCC, "-O3", "-std=c++17", "--fmad=false", "-cubin", "-o", str(path.with_suffix(".new"))]
        command += ["-gencode", f"arch=compute_{arch},code=sm_{arch}", str(FOLDER / f"{source}.cu")]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        path.with_suffix(".new").replace(path)
    return path


def _kernel(symbol: str) -> str:
    """_ZN4reft4cuda12forward_rowsINS_4HalfEfLb1ELb1ELb0EEEv… → forward_rows<Half, float, 1, 1, 0>"""
    name = re.search(r"(?:forward|backward)_(?:tiles|rows|pool|push|ring)(?=I)", symbol)[0]
    arguments = re.search(name + r"I(.*?)EEv", symbol)[1].replace("NS_4HalfE", "h").replace("NS_4Bf16E", "b")
    arguments = re.sub(r"S\d?_", "", arguments)  # a repeated type
    found = re.findall(r"L[bi](\d+)|(h|b|f)", arguments)
    names = {"h": "Half", "b": "Bf16", "f": "float"}
    return f"{name}<{', '.join(flag or names[letter] for flag, letter in found)}>"


def _inspect(arch: str) -> dict[str, dict]:
    """Resources and instructions of every kernel."""
    kernels = {}
    for source in SOURCES:
        cubin = _cubin(source, arch)

        def dump(what: str, cubin=cubin) -> str:
            return subprocess.run([CUOBJDUMP, what, cubin], check=True, capture_output=True, text=True).stdout

        usage = re.findall(r"Function (\S+):\s+(.*)", dump("--dump-resource-usage"))
        resources = {
            symbol: {key: int(value) for key, value in re.findall(r"([A-Z]+):(\d+)", line)}
            for symbol, line in usage
        }
        for part in dump("--dump-sass").split("Function : ")[1:]:
            symbol = part.split()[0]
            code = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?\S+ )?\s*([A-Z][\w.]*)", part)
            predicated = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(@!?\S+ +[A-Z][\w.]*)", part)
            lines = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?) ;", part)]
            found = {"code": code, "predicated": predicated, "lines": lines}
            kernels[_kernel(symbol)] = {**resources[symbol], **found}
    return kernels


def _flags(name: str) -> tuple[str, list[str]]:
    """The kernel's own name, and its numbers: tiles <rows at once, one unit, aligned, norm>, rows <one unit,
    aligned, norm>, backward_rows <aligned>. The ways beside the usual one are tiles, too."""
    form, flags = name.split("<")[0], re.findall(r"\b\d+", name.split("<")[1])
    if form == "forward_push":  # <rows at once, one unit, norm>
        flags = [*flags[:2], "1", flags[2]]
    if form == "forward_ring":  # <rows at once>
        flags = [*flags, "0", "1", "0"]
    return form.replace("push", "tiles").replace("ring", "tiles"), flags


def _check(name: str, kernel: dict, arch: str) -> None:
    code = kernel["code"]
    form, flags = _flags(name)
    assert len(code) > 100
    assert kernel["STACK"] == kernel["LOCAL"] == 0, kernel["STACK"]
    assert not [op for op in code if re.match(r"(LDL|STL)\b", op)]
    assert not [op for op in code if re.match(r"(ATOM|ATOMG|RED|REDG)\b", op)]
    most = OF_EIGHT_ROWS[flags[3] == "1"] if flags[:1] == ["8"] and arch == "90a" else REGISTERS[form]
    assert kernel["REG"] <= most
    assert kernel["SHARED"] <= RESERVED
    wide = [op for op in code if op.startswith("LDG.E") and ".128" in op]
    aligned = flags[-2:][0] == "1" if form != "backward_pool" else False
    assert bool(wide) == aligned
    assert bool([op for op in code if op.startswith("STG.E") and ".128" in op]) == aligned
    assert bool([op for op in code if op.startswith("HMMA")]) == (form == "forward_tiles")


#: The tiles (8 and 16 rows) and the rows in 3 forms, all with and without the norm; aligned and not of the
#: backward; the pool's gradient; by dtypes.
COUNT = 2 * (2 * 3 * 2 + 3 * 3) + 5 * 2 + 5 + len(WAYS)


def _check_all(arch: str) -> dict[str, dict]:
    kernels = _inspect(arch)
    assert len(kernels) == COUNT
    for name, kernel in kernels.items():
        if name in WAYS and arch == "80":
            assert len(kernel["code"]) < 20, name  # nothing, as nobody launches it there
            continue
        try:
            _check(name, kernel, arch)
        except AssertionError as error:
            raise AssertionError(f"{name} for sm_{arch}: {error}") from error
    return kernels


@pytest.fixture(scope="module")
def hopper() -> dict[str, dict]:
    return _check_all("90a")


def test_kernels_for_hopper(hopper: dict[str, dict]) -> None:
    """The cluster's barrier is in every kernel: they share d over blocks, and the last the rows."""
    for name, kernel in hopper.items():
        assert any(op.startswith("UCGABAR") for op in kernel["code"]), name
        if name.startswith("backward_pool"):
            assert 3 * 128 * kernel["REG"] <= 65536, name  # three blocks a multiprocessor


@pytest.mark.parametrize("norm", [0, 1])
@pytest.mark.parametrize("dtype", ["Bf16", "Half"])
def test_all_loads_of_a_step_are_under_way_before_the_first_product(
    hopper: dict[str, dict], dtype: str, norm: int
) -> None:
    """Of D, of U and of h (8 or 16 rows), two times 16 bytes each or four."""
    for slots, wanted in ((8, 2 + 2 + 2), (16, 2 + 2 + 4)):
        code = hopper[f"forward_tiles<{dtype}, {slots}, 1, 1, {norm}>"]["code"]
        first = next(i for i, op in enumerate(code) if op.startswith("HMMA"))
        loads = [op for op in code[:first] if op.startswith("LDG.E") and ".128" in op]
        assert len(loads) == wanted


def _way(lines: list[tuple[int, str]], to: str) -> list[str]:
    """The instructions of the shortest way from a kernel's beginning to the first one that has `to` in it."""
    places = {at: i for i, (at, _) in enumerate(lines)}
    before: dict[int, int | None] = {0: None}
    queue = [0]
    for i in queue:
        text = lines[i][1]
        if to in text:
            way: list[str] = []
            while i is not None:
                way.append(lines[i][1])
                i = before[i]
            return way[::-1]
        branch = re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", text)
        ends = re.match(r"(BRA|EXIT)", text)  # without a predicate
        nexts = ([] if ends else [i + 1]) + ([places[int(branch[1], 16)]] if branch else [])
        for other in nexts:
            if other not in before:
                before[other] = i
                queue.append(other)
    raise AssertionError(f"no way to {to}")


def _loads(way: list[str]) -> list[tuple[int, str]]:
    """The loads from global memory on a way, each with how many times loads were waited for before it.

    A multiprocessor issues a warp's instructions in order: one that uses a register which a load has yet to
    fill waits for that load, and for all that were asked for before.
    """
    waits, pending, loads = 0, {}, []
    for text in way:
        text = re.sub(r"^@!?\S+ ", "", text)
        used = set()
        for register, size in re.findall(r"\bR(\d+)(?:\.reuse)?(\.64)?", text):
            used |= {int(register), int(register) + 1} if size else {int(register)}
        if text.startswith("LDG"):
            first = int(re.search(r"R(\d+)", text)[1])
            used -= {first} if first not in pending else set()
        for register in used & set(pending):
            waits = max(waits, pending.pop(register))
        if text.startswith("LDG"):
            words = 4 if ".128" in text else 2 if re.match(r"LDG\.E\.64", text) else 1
            pending |= {first + word: waits + 1 for word in range(words)}
            loads.append((waits, text))
    return loads


def test_a_steps_data_is_asked_for_after_two_waits(hopper: dict[str, dict]) -> None:
    """One for the tile, one for its range and its rows of h together; then D, U and h.

    With pools in float32 there is a third: the assembler moves the rows behind the exit of an idle block.
    """
    for name, kernel in hopper.items():
        form, flags = _flags(name)
        if not form.startswith("forward") or flags[-2:][0] == "0":
            continue
        tiles = form == "forward_tiles"
        loads = _loads(_way(kernel["lines"], "HMMA.16816" if tiles else "LDG.E.128"))
        waits = [wait for wait, _ in loads]
        assert waits.count(0) == 3, (name, loads)  # the words of the tile
        assert waits.count(1) >= (3 if tiles else 1), (name, loads)  # of the range, and rows
        # In a ring, h of the second unit is asked for when that of the first has come.
        assert max(waits) <= (2 if tiles and "ring" not in name else 3), (name, loads)


def test_products_of_tensor_cores_stay_where_all_lanes_are(hopper: dict[str, dict]) -> None:
    """The compiler may move an asm statement that is not volatile into a branch that only some lanes take."""
    statements = re.findall(r"asm( volatile)?\(\s*\"mma", (FOLDER / "device.cuh").read_text())
    assert statements == [" volatile"] * 3
    for name, kernel in hopper.items():
        assert not [line for line in kernel["predicated"] if "MMA" in line], name


def test_no_block_waits_for_its_stores_before_it_ends(hopper: dict[str, dict]) -> None:
    """A fence of the whole GPU stands at each meeting of the cluster, none at its end."""
    for name, kernel in hopper.items():
        code = kernel["code"]
        last = max((i for i, op in enumerate(code) if op.startswith("UCGABAR_ARV")), default=0)
        stores = [i for i, op in enumerate(code[:last]) if op.startswith("STG")]
        if stores:  # what is pushed has no meeting at the end
            assert not [op for op in code[stores[-1] : last] if op.startswith("MEMBAR")], name


def _count(code: list[str], *names: str) -> int:
    return sum(op.startswith(names) for op in code)


def test_what_is_pushed_needs_no_barrier_of_the_cluster(hopper: dict[str, dict]) -> None:
    """Sums go by asynchronous stores, a thread waits in its own shared memory, and nobody reads another's.

    One barrier of the cluster is left, at the beginning, and no fence of the GPU.
    """
    for name, kernel in hopper.items():
        code, pushed = kernel["code"], name.startswith("forward_push")
        assert bool(_count(code, "STAS")) == pushed, name
        if pushed:
            assert _count(code, "SYNCS.PHASECHK") and not _count(code, "MEMBAR", "LD.E"), name
            assert _count(code, "UCGABAR_ARV") == _count(code, "UCGABAR_WAIT") == 1, name
            waits = code.index("UCGABAR_WAIT")
            assert "STAS" in next(op for op in code[waits:] if op.startswith(("STAS", "HMMA"))), name
            # 16 bytes at once where there is one unit; the usual way reads eight words of other blocks.
            one = _flags(name)[1][1] == "1"
            assert all((op == "STAS.128") == one for op in code if op.startswith("STAS")), name
        elif name.startswith("forward_tiles"):
            assert _count(code, "LD.E") >= 8 and _count(code, "MEMBAR.ALL.GPU"), name


def test_pool_rows_of_a_ring_come_by_bulk_copies(hopper: dict[str, dict]) -> None:
    """And are read from shared memory by 16 bytes; of the loads from global memory h's alone are left."""
    for name, kernel in hopper.items():
        code, ring = kernel["code"], name.startswith("forward_ring")
        assert bool(_count(code, "UBLKCP.S.G")) == ring, name
        if ring:
            slots = int(_flags(name)[1][0])
            wide = [op for op in code if op.startswith("LDG.E.128")]
            # Of the first unit, of the next one, and where the result will lie: two rows or four each.
            assert len(wide) == 3 * slots // 4, name
            assert _count(code, "LDS.128") >= 4, name  # two of D, two of U
            usual = hopper[f"forward_tiles<Bf16, {slots}, 0, 1, 0>"]
            blocks = 65536 // (256 * max(kernel["REG"], usual["REG"]))
            assert blocks == (4 if slots == 8 else 2), name  # as many a multiprocessor as in the usual way


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["80", "100"])
def test_kernels_for_other_architectures(arch: str) -> None:
    _check_all(arch)


def test_machine_code_for_the_architectures_that_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    variable = "REFT_KERNELS_CUDA_ARCHS"
    monkeypatch.delenv(variable, raising=False)
    assert build.gencodes(NVCC).count("code=sm_") >= 2
    assert "code=compute_" in build.gencodes(NVCC)
    monkeypatch.setenv(variable, "80,90a")
    codes = [f"-gencode arch=compute_{arch},code=sm_{arch}" for arch in ("80", "90a")]
    assert build.gencodes(NVCC) == " ".join(codes)
    for bad in ("75", "hopper", "90a,", "9.0", "805"):
        monkeypatch.setenv(variable, bad)
        with pytest.raises(SystemExit, match=f"{variable}: must be .*, was '{bad}'"):
            build.gencodes(NVCC)


@pytest.mark.parametrize(("source", "count"), [("scale_shift", 9), ("sum", 6)])
@pytest.mark.parametrize("arch", ["80", "90a"])
def test_small_kernels(arch: str, source: str, count: int) -> None:
    """The elementwise edit's three (rows forward and of the gradient, and sums) in three dtypes, and the sum
    of two tensors, aligned and not: few registers, no spills, no atomics."""
    cubin = _cubin(source, arch)

    def dump(what: str) -> str:
        return subprocess.run([CUOBJDUMP, what, cubin], check=True, capture_output=True, text=True).stdout

    usage = re.findall(r"Function (\S+):\s+(.*)", dump("--dump-resource-usage"))
    assert len(usage) == count
    for symbol, line in usage:
        found = {key: int(value) for key, value in re.findall(r"([A-Z]+):(\d+)", line)}
        assert found["STACK"] == found["LOCAL"] == 0, symbol
        assert found["REG"] <= 64, symbol
    code = dump("--dump-sass")
    assert "LDG.E" in code and not re.search(r"\b(?:LDL|STL|ATOM|ATOMG|RED|REDG)\b", code)
    if source == "sum":
        assert code.count("STG.E.128") >= 2 * 3
