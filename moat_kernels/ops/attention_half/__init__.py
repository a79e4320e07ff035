"""The attention half of a MOAT block without gradients, as one operator."""
