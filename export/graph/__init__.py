"""The module, its loss and its backward pass as one pure graph: traced, differentiated, tidied, cut in two."""
