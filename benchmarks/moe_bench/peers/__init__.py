"""What is compared: one file for each way to run a layer."""
