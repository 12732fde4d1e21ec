"""What single frameworks need beside the optimizer; a file each, imported only by those who use it."""
