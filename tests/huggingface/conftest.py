"""What most tests of the patch begin with. A file that needs another model defines its own."""

from __future__ import annotations

import pytest
from support.adapters import patched
from support.models import batch_of


@pytest.fixture
def model():
    """A tiny Llama with the mixed adapters."""
    return patched()


@pytest.fixture
def batch():
    """Two prompts, the second one padded on the left."""
    return batch_of([6, 4])
