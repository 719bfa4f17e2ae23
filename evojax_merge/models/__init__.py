"""The decoder and where its weights come from. May import merge_kernels; knows no file, task or search."""
