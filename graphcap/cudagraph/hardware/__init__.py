"""What graphs run on: the CUDA device and the simulated one, their memory, and whom they tell."""
