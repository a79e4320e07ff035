"""What the Triton backends of all ops share. Imports triton only where a kernel is at hand."""
