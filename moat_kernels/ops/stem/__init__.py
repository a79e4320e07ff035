"""The stem of a MOAT: two 3x3 convolutions with batch norm and GELU between."""
