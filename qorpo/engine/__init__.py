"""One optimizer step, on one device or several ranks, apart from any loop.

`step.py` turns a step's pairs into a gradient, `optim.py` makes optimizers and schedules, `distributed.py` shares a
step among ranks. Planning and training stand above and run the same step. Begin with `step.run_step`.
"""
