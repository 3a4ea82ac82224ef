"""What is kept of a run and how it is shown: results on disk, statistics, sentences, tables, plots."""
