"""A model cut in three: which families, which blocks where, reading only those, running packed rows through them."""
