"""What LoRA is and what its settings do, in words and, with a model, in that model's own numbers."""
