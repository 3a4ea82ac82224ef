"""What is run: the commands of `reft-bench`, the demo, and what fills the README's tables."""
