"""The ops as functions: one edit (`loreft`, `scale_shift`, …), or many adapters by a pool and a plan.

`intervene_norm_` edits and returns the norm that follows, in one pass over h. `keep_norm` gives edited rows
their old norm back.

Low level: no Hugging Face, no adapters. Serving stacks call these.
"""

from .norms import keep_norm, restore_norms_, row_norms
from .pooled import intervene, intervene_, intervene_norm_
from .single import interchange, loreft, scale_shift

__all__ = [
    "interchange",
    "intervene",
    "intervene_",
    "intervene_norm_",
    "keep_norm",
    "loreft",
    "restore_norms_",
    "row_norms",
    "scale_shift",
]
