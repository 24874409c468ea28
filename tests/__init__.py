"""Tests. A regular package, so that no installed package of this name can hide it."""
