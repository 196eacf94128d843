"""Images and the views that stages train on."""
