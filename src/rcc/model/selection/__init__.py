"""Contexts of a language model that nobody trained for rcc: a choice of its own KV pairs (Part 11).

`selection.py` is the compressor, `reading.py` its passes through the model, `rules.py` what is kept, a function a rule.
"""
