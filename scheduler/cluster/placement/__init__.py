"""Which adapter lives on which node, and what part of its traffic each node takes: policies of one
protocol."""
