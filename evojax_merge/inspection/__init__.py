"""Measures of several models before a merge of them."""
