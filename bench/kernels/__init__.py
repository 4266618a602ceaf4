"""Everything that walks the list of kernels: compilation table, rooflines, and measurements on a GPU."""
