"""How does MISA stand in a training loop? One file a framework or habit, each complete."""
