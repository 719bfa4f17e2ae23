"""The architectures that come with the program, a file each; the registry (models.architecture) imports every file."""
