"""How much memory and traffic will a way of training need? Pure arithmetic, before anything is allocated.

`shapes` reads the sizes of a model, `step` counts a training step on one GPU, `fsdp` what FSDP2 adds, `methods` puts
AdamW, its relatives, LoRA, QLoRA and MISA side by side, `cards` knows how much a GPU holds.
"""
