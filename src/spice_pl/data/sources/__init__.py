"""Where images come from: folders, archives, arrays, tables, published data sets."""
