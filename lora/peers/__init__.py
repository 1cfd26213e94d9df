"""Share adapters with other nodes: publish what this node has, find and pull what it lacks."""
