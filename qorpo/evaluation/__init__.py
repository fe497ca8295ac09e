"""How good a model is: held-out pairs, instructions followed, the harness' tasks, diversity, and judges' verdicts.

May import training, generation and what stands below them; begin at `evaluate.py`. The libraries of the extra `eval`
are imported where they are used, so that each evaluation needs its own alone.
"""
