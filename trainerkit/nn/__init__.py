"""What the networks of several tasks share."""
