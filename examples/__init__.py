"""Examples: the demo, loops of frameworks, and a comparison on pretrained weights."""
