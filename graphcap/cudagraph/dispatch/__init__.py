"""Where a call goes: what batch it is, which sizes are captured, which plan serves it."""
