"""Sources of images: folders, tables, archives, arrays, Hugging Face and published data sets."""
