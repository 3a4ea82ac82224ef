"""For a machine with a GPU: the kit that proves and measures all, its floors and its targets."""
