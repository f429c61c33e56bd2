"""Reports: what a run, an adapter or a comparison looks like, as plain values and as figures."""
