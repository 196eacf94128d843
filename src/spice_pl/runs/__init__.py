"""What a run leaves: artifacts, cluster table, scores, page, edits, comparison."""
