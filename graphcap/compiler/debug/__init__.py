"""Seeing it: dumps while a region is compiled (``dump.py``), reports afterwards (``explain.py``), runnable repros."""
