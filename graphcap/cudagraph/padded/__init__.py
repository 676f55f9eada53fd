"""Calls that are padded to a captured size: what may be, the proof that it changes nothing, and the replay."""
