"""Decoding measured: which models, how long a token takes, what is moved; the paper's ratios."""
