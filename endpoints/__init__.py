"""Ready-made network services."""
