"""What people train with beside an optimizer: settings around MISA, an example each."""
