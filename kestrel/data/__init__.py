"""From a dialogue file to the dataset: readers of each format, repairs, splits, Arrow rows."""
