"""What the notebook needs to talk to a federation, and to be run from a shell."""
