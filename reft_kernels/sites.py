"""Where in a decoder layer hidden states may be edited."""

from __future__ import annotations

#: The site whose hidden state is one head's slice of the attention's value output.
HEAD_SITE = "head_attention_value_output"

#: All sites, by pyvene's component names.
SITES = ("block_output", "block_input", "mlp_output", "attention_output", HEAD_SITE)
