"""Base models: loading a folder, a hub id or a GGUF file, and the embedded Gemma 3 270M."""
