"""A tiny base model and its preference pairs, made by scripts/make_tiny_base.py; `model.path: demo` and `data.train: demo`."""
