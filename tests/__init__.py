"""Tests. A regular package, so that no installed package of this name can hide it.

Shared: configs.py (small models and runs), repository.py (paths; tools as a user runs them),
launch.py and rank.py (calls on several processes), single_process.py (Megatron in this one),
state_dicts.py (weights by name, and from disk), small_disk.py and ports.py (a machine's limits),
virtual_gpu.py, virtual_te.py and te_*.py (what is for a GPU, without one).
"""
