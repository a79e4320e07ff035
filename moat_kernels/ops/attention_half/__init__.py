"""The attention half of a MOAT block as one operator: in inference (CPU), in training (GPU)."""
