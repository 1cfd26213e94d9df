"""Run the step loop in a thread of its own, and turn what comes of it into the outputs of live requests."""
