"""How does MISA compare at equal state memory? A small model, trained from text files to a table of results."""
