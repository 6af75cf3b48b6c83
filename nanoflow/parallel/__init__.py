"""One command, many processes: the ranks of a tensor-parallel run, and what starts, watches and ends processes."""
