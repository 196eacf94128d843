"""Sources of images: folders, tables, archives, arrays and published data sets."""
