"""jitgen: attention variants in Python, compiled just in time."""
