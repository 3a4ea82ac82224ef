"""Which tokens an intervention edits: what users write, and what it means. See docs/positions.md."""

from .positions import LastPosition, Positions
from .terms import ragged_arange

__all__ = ["LastPosition", "Positions", "ragged_arange"]
