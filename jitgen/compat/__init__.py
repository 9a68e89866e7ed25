"""Interfaces of other libraries, thin over jitgen's own."""
