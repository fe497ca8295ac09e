"""The training loop and the folder it leaves: from a recipe to an adapter, killed and resumed at any moment.

May import `planning`, `engine` and all below. Begin with `run.py` (a recipe to a run folder), then
`loop.py`, and `session.py` for what any loop trains with.
"""
