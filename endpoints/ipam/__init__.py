"""A vL3 domain's address plan: which router hands out which addresses."""
