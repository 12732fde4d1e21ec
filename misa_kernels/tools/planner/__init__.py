"""How much memory and traffic will a way of training need? Before anything is allocated.

`shapes` reads the sizes of a LLaMA and its relatives, `step` counts a training step of one on a GPU, `fsdp` what FSDP2
adds. `model` builds any other of transformers without bytes, `dry` runs its operators and counts, `trial` a whole step.
`states` knows what AdamW and its relatives keep, `training` how a model is trained, and `draws` what MISA may train of
it; `methods` puts them beside LoRA and QLoRA, `cards` knows what a GPU holds.
"""
