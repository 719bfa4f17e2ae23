"""Below the program: files, processes, signals, other libraries."""
