"""The commands: a file each, from parsed arguments to printed tables."""
