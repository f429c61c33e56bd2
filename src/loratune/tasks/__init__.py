"""Every task but continuing text: rows with labels, the head and its loss, predictions and figures."""
