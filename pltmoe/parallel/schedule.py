"""The order of work of a pipeline. Pure."""


def group_size(stages: int, micro_batches: int) -> int:
    """Return how many micro batches in a row a virtual stage takes."""
    sizes = range(stages, micro_batches + 1)
    return next(n for n in sizes if micro_batches % n == 0 or micro_batches % n >= stages)
