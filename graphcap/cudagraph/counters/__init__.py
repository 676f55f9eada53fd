"""What is counted while calls are served, and what can be told from it."""
