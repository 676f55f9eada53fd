"""The way to a recording: what a warm-up shows, what is captured, how inputs get in, the capture itself."""
