"""Inference: caches, one-pass decoding, exact suffix prefill, sampling."""
