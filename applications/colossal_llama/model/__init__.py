"""A model with rows for new tokens: where its rows per token are, what the new ones begin as, and the files.

Tensors go from file to file, so that little memory is needed."""
