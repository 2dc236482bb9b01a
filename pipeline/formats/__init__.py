"""How values and texts get into files and out of them, also out of files that are damaged."""
