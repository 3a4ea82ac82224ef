"""reft-bench: what representation finetuning costs on a model and a machine, beside merged LoRA."""
