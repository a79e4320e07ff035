"""What setup.py needs to know of the machine that it builds on."""
