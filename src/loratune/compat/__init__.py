"""Other libraries' names over loratune's values."""
