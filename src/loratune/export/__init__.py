"""Exports: a tuned model for others to load. `merged` adds an adapter into the files of its base, tensor by tensor."""
