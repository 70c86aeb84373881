"""The command people use: one function for each verb, tables for them, JSON for scripts."""
