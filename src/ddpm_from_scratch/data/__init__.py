"""Images from files, folders, archives and the Hub, as batches that follow from a seed."""
