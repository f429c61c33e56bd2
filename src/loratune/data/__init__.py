"""Rows, chat templates, masks, packing: from a file to documents whose trained tokens are known one by one."""
