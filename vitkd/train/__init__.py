"""Training a student: the job, the step, and the machinery around it."""
