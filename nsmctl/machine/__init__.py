"""What this machine can do: the questions of `nsmctl doctor`, a line each.

`questions.py` lists them; the other modules hold them by subject, `asking.py` asks. A
question looks, or tries in a namespace of its own; it changes nothing that stays.
"""
