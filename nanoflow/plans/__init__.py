"""What `nanoflow plan` shows of a plan file: grids, checks, pictures and traces."""
