"""What do others do to the model and the optimizer meanwhile: flags, copies, state, compilers; and how to say so."""
