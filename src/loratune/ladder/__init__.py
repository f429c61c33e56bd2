"""The ladder: training begins with a small adapter, which grows as far as the held-out rows show that it pays."""
