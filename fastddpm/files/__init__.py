"""Files: readers that check before they take memory, atomic writes, and the folder of a run."""
