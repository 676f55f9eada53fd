"""The ways in: what a user calls, and what lies between the caller and Dynamo. ``target.py`` is the place to start."""
