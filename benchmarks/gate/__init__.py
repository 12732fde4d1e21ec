"""Has the code become dearer? Counts that no other work on the machine can touch, beside those committed."""
