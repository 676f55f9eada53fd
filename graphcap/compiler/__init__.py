"""Dynamo graph in, one callable out. ``backend.py`` is where to start reading."""
