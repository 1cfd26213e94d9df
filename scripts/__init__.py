"""What is run beside the library; each folder and module starts as `python -m scripts.NAME`."""
