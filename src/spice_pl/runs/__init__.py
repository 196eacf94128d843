"""The files of a run: folder, cluster table, scores, page, edits, comparison."""
