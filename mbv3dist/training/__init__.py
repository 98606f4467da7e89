"""Training: one loop for both tasks under Accelerate."""
