"""What a student learns from besides labels: one file a method."""
