"""What rank-8 requests wait for beside larger ranks."""
