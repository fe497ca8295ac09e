"""Talking to a model: `load` opens a run, adapter or model; `generate` answers a file of prompts; `chat` converses.

It imports what trains and merges, and engine/sampling.py, which turns tokens into answers. Begin at generate.py.
"""
