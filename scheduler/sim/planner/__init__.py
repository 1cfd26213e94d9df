"""Find how many nodes a workload needs."""
