"""What the optimizer itself needs of several processes: which part of a tensor is here, and whether all agree."""
