"""How fast a training step is, as ratios between things measured side by side in one run."""
