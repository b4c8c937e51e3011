"""Rows of one file dealt to clients, as studies of non-IID data do it."""
