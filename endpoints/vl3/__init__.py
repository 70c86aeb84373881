"""A vL3 domain's router: members' wires end here, and it passes packets between them."""
