"""What the benchmark scripts are made of: workloads, contenders, limits, load and its report."""
