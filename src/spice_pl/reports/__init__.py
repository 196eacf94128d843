"""Pages, tables and pictures about data sets and runs: arrays in, text and files out."""
