"""What a run will take before it runs: memory, time and disk from shapes and rows, and whether the machine has them."""
