"""docs/engine.md: its engine loop runs as it stands there, without transformers."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from support.adapters import random_adapter

import reft_kernels as rk

PAGE = Path(__file__).resolve().parents[2] / "docs" / "engine.md"

CHECK = """
import sys
sys.modules["transformers"] = None  # an import of it fails from here on
{page}

# A matrix product of torch's may sum a row in another order when it stands beside others; these don't.
layers[:] = [lambda h, scale=torch.randn(64): h * scale for _ in layers]
table = torch.randn(3, 64, 64)
embed = lambda request, position: table[request, position]
requests = [("math", 9, 3), (None, 5, 4), ("tone", 6, 5)]

def states(requests, rows, chunk):
    found = {{}}
    for tokens, h in serve(requests, lambda r, p: embed(rows[r], p), chunk):
        found |= {{(rows[r], int(p)): h[i].clone() for i, (r, p) in enumerate(tokens)}}
    return found

together = states(requests, [0, 1, 2], 4)
edited = set()
for row, request in enumerate(requests):
    alone = states([request], [row], 100)
    bare = states([(None, *request[1:])], [row], 100)
    for token, h in alone.items():
        assert torch.equal(together[token], h), token
        if not torch.equal(h, bare[token]):
            edited.add(token)
# math edits the first two and the last two tokens of its prompt of nine, tone all of its eleven tokens.
assert edited == {{(0, p) for p in (0, 1, 7, 8)}} | {{(2, p) for p in range(11)}}, sorted(edited)
store.remove("tone")
try:
    states_of = list(serve([("tone", 2, 1)], embed))
except KeyError as error:
    raise SystemExit(f"no clear error: {{error!r}}")
except ValueError as error:
    assert "tone" in str(error), error
assert not any(name.startswith("transformers.") for name in sys.modules)
print("ok")
"""


def test_the_pages_loop_serves_mixed_adapters_in_chunks(tmp_path: Path) -> None:
    for name, positions in (("math", "f2+l2"), ("tone", "all")):
        config = rk.ReftConfig(r=3, layers=[0, 2], positions=positions)
        random_adapter(config, 64, n_layers=4).save_pretrained(tmp_path / "adapters" / name)
    _, code = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    script = CHECK.format(page=code)
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == "ok", done.stderr
