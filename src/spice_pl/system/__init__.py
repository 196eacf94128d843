"""The machine: files, processes, signals, progress, versions."""
