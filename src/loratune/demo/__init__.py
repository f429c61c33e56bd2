"""The demo: a real run on a real corpus, small enough for a laptop's processor."""
