"""A section of `make gpu` that cannot even be imported."""

raise ImportError("a library is missing")
