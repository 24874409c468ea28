"""pltmoe: pretraining of Parallel Loop Transformers (arXiv 2510.24824) on Megatron-core."""

__version__ = "0.1.0"
