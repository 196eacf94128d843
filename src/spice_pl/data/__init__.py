"""Data sets, and the views of images that stages train on."""
