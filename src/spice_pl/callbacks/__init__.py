"""What happens beside training: progress, truth, guards, files."""
