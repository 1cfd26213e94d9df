"""One engine on several devices: the first process decides and serves, a worker for each other computes along."""
