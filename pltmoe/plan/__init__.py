"""What a run will need, before it takes a machine's time: memory, messages, time. No torch.

machines.py      GPUs, links, and every assumed efficiency, in one table
weights.py       parameters, gradients, optimizer state of a rank
activations.py   what autograd keeps of one micro batch, term by term
in_flight.py     how much of it is alive at a time, from the order of work
messages.py      bytes sent per step, by kind
planner.py       all of it together; ``check_fits``
search.py        layouts that fit, fastest first
report.py        text, JSON and docs/plan.md
"""

from pltmoe.plan.planner import Plan, check_fits, make_plan

__all__ = ["Plan", "check_fits", "make_plan"]
