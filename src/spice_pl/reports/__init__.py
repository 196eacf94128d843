"""Pictures, tables and one page about a clustering run: arrays in, text and files out."""
