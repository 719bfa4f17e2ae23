"""The kinds of candidates over language models: each loads its models, and evaluates, writes and shows its candidates.
This room holds all code that depends on the kind."""
