"""Leaves what a lab's engine leaves that was killed: python lab.py NAME PHASE."""

import os
import sys

from labs import state
from labs.alive import Mark
from labs.paths import Paths
from labs.state import State

name, phase = sys.argv[1:]
paths = Paths(name)
os.makedirs(paths.folder)
state.write(paths, State(name, "x.yaml", phase, 0.0, Mark(4_000_000, 1)))
