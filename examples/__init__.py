"""Examples: how a model is trained with MISA, from text files to the table of results."""
