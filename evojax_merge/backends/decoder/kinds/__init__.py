"""The kinds of candidates over language models, a module each: it holds all code that depends on the kind. Beside its
class of `kind.Candidates` a module has `methods_of(where, config)`, the merge methods that it needs (none: it takes
layers as they are, of models of any depth), and `open_candidates(opened)`; both raise InputError for a config that
cannot be searched. `TAKES_BASE`: its candidates have weights of the base though it needs no method, and all models
have one depth. `Config.kinds` says by which key a config asks for it.
"""
