"""The op alone: its cases, and the systems that do it side by side."""
