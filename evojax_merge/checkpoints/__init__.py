"""Hugging Face folders in and out: the only room that knows tensor names and files.

May import merge_kernels and models.config; knows no task, space or search.
"""
