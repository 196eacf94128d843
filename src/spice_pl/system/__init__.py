"""What depends on the machine: files, processes, signals, progress, versions."""
