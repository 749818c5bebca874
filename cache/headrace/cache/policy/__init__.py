"""Which chunk comes next, and from where: decisions alone, without I/O and without a clock."""
