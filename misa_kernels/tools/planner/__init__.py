"""How much memory and traffic will a way of training need? Before anything is allocated.

`shapes` reads the sizes of a LLaMA and its relatives, `step` counts a training step of one on a GPU, `fsdp` what FSDP2
adds. `model` builds any other of transformers without bytes, `dry` runs its operators and counts, `trial` a whole step.
`methods` puts AdamW, its relatives, LoRA, QLoRA and MISA side by side, `cards` knows how much a GPU holds.
"""
