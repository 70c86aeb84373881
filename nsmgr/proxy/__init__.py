"""A domain's door to other domains: requests and registrations pass through it, both ways."""
