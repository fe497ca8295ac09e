"""Adapters into base weights, a block of a tensor at a time, and the result verified.

May import `engine` and all below, not `training`. Begin with `merge.py`; `outline.py` lays out every tensor before
anything is written, `adapter.py` says what each adapter changes, `verify.py` compares before and after.
"""
