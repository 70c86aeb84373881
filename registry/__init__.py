"""Who offers what in a domain: find, watch, expiry."""
