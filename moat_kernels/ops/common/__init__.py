"""What all ops use: choice of the backend, registration, autocast, checks."""
