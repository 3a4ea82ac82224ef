"""From a batch to what an op takes: which tokens are prompt, what each adapter edits, where it lies.

What every front door stands on: the patch of Hugging Face models, and serving stacks. Knows no model and no
library of models. docs/engine.md shows an engine's loop on it.
"""

from .batch_plan import BatchPlan
from .edit import edit
from .intervals import intervals_of
from .names import BASE
from .planner import Planner
from .prompts import Prompts, read_prompts
from .selection import Selection, select
from .sequence import Sequence
from .stacks import Segment
from .stages import SiteKey
from .steps import StepTables
from .store import AdapterStore
from .tables import Place
from .workspace import DecodeWorkspace, DecodeWorkspaces

__all__ = [
    "BASE",
    "AdapterStore",
    "BatchPlan",
    "DecodeWorkspace",
    "DecodeWorkspaces",
    "Place",
    "Planner",
    "Prompts",
    "Segment",
    "Selection",
    "Sequence",
    "SiteKey",
    "StepTables",
    "edit",
    "intervals_of",
    "read_prompts",
    "select",
]
