"""Whole meshes on one machine: nodes are network namespaces, the programs are the real ones."""
