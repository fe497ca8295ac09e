"""What a training step will need, before it runs: the real step on fake tensors, with live bytes counted.

May import `engine` and all below it. Begin with `plan.py`; `step_memory.py` runs one step, `settings.py` searches for
the fastest settings that fit, `auto.py` applies them to a loaded model.
"""
