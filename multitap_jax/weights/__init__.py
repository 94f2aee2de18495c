"""Weights in and out: invertible rule tables, streaming safetensors, errors that list every problem.

`hub.py` loads and saves backbones; `files.py` reads and writes safetensors folders; `mapping.py` is the table engine;
one further file a family holds its table.
"""
