"""Start the capacity planner as `python -m scheduler.sim plan`; the planner's own folder does the rest."""

import sys

from scheduler.sim.planner.command import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
