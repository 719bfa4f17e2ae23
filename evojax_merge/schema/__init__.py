"""Forms of data that all rooms share: sections of a YAML and arguments, checked as they enter."""
